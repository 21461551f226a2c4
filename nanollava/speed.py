"""How fast it is: beside what the machine could do at best, and beside transformers where that is installed.

    python -m nanollava.speed                    # on whatever device is there, in the dtype that is fast on it
    python -m nanollava.speed --dtype bfloat16 --repeat 10
    python -m nanollava.speed --compile          # our side with --compile

A LLaVA of random weights, between the toy's size and the real one's: a ViT-B, a LLaMA of 12 blocks of 768, steps of
4 rows of 324 tokens. Both sides open the same folder and get the same tokens, pictures and labels, in turns in one
process, so that whatever else the machine does slows both; the quickest of several turns counts. On both sides what
learns is float32 and what is frozen has the dtype that is asked for; where that is bfloat16 transformers runs under
autocast, and ours, too, computes in it, but on a processor where float32 is faster (`device.arithmetic`): there our
steps are float32 altogether, and tokens are generated in float32 with weights kept in bfloat16.
"""

import importlib.util
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from .infra.cli import Parser, one_line_errors, positive
from .infra.io import InputError
from .infra.progress import print0


def parse_arguments():
    parser = Parser(__doc__, prog="python -m nanollava.speed")
    add = parser.add_argument
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and arithmetic (default: bfloat16 where fast)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--repeat", type=positive(int), default=5, help="times that each thing is measured (default: %(default)s)")
    add("--compile", action="store_true", help="our blocks go through torch.compile, which takes minutes first")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # now, for torch takes seconds: --help and mistakes are answered at once

import torch
from PIL import Image

from .conversation import IGNORE_INDEX
from .image import open_image, preprocess
from .infra import distributed
from .infra.device import pick_compute_dtype, best_device, best_dtype
from .llama import LlamaConfig
from .llava import Llava, LlavaConfig
from .plan import count, operations
from .training import adamw, freeze
from .vision import VisionConfig

CONFIG = LlavaConfig(
    VisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12))
ROWS, TOKENS, LEARNED, NEW = 4, CONFIG.tokens_per_image + 68, 34, 64  # of a step; tokens that are generated


# ---------------------------------------------------------------------------------------------
# What the machine could do


def seconds(run, device: str, repeat: int = 5) -> float:
    """How long a call takes at its quickest, all that it started on the device included."""
    wait = (lambda: None) if device == "cpu" else partial(torch.accelerator.synchronize, torch.device(device))
    taken = []
    for _ in range(repeat):
        wait()
        start = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - start)
    return min(taken)


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second in the product of two big matrices, of the size at which it is fastest."""
    rates = []
    for size in (512, 1024, 2048) if device == "cpu" else (2048, 4096, 8192):
        x = torch.randn(size, size, device=device).to(dtype)
        rates.append(2 * size**3 / seconds(lambda: x @ x, device, 20))
    return max(rates)


def bandwidth(device: str) -> float:
    """Bytes a second that are read from memory, by a sum over a gigabyte."""
    x = torch.ones(2**28, device=device)
    return x.nbytes / seconds(x.sum, device)


# ---------------------------------------------------------------------------------------------
# The two sides: a folder to what is measured


def batch(device: str):
    """Tokens (B, T), labels (B, T) and pictures (B, 3, H, W) of one step, the same every time."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, CONFIG.text.vocab_size, (ROWS, TOKENS), generator=random)
    tokens[:, 1 : 1 + CONFIG.tokens_per_image] = CONFIG.image_token_id
    labels = tokens.clone()
    labels[:, :-LEARNED] = IGNORE_INDEX
    images = torch.randn(ROWS, 3, CONFIG.image_size, CONFIG.image_size, generator=random)
    return tokens.to(device), labels.to(device), images.to(device)


def ours(folder: Path, dtype: torch.dtype, device: str, stage: int | None, compiled: bool = False):
    """A training step of a stage, or without one what generates n tokens."""
    if stage is None:
        tokens, _, images = batch(device)
        model = Llava.from_pretrained(folder, dtype, device).set_compute_dtype(pick_compute_dtype(dtype, device))
        if compiled:
            model.compile_blocks()
        return lambda new: list(model.generate(tokens[:1], images[:1], max_new_tokens=new))
    tokens, labels, images = batch("cpu")
    model = Llava.from_pretrained(folder, torch.float32)
    freeze(model, stage)
    computed = pick_compute_dtype(dtype, device)
    distributed.shard_model(model.set_compute_dtype(computed), model.language_model.model.layers, computed, device)
    if compiled:
        model.compile_blocks()
    optimizer, = adamw(model, 1e-4)

    def step() -> torch.Tensor:
        loss = model(tokens, images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def theirs(folder: Path, dtype: torch.dtype, device: str, stage: int | None):
    """The same by transformers."""
    from transformers import LlavaForConditionalGeneration

    tokens, labels, images = batch(device)
    if stage is None:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        model.generation_config.eos_token_id = None  # no token is looked at on the way, as on our side
        prompt = dict(input_ids=tokens[:1], pixel_values=images[:1].to(dtype),
                      attention_mask=torch.ones_like(tokens[:1]))
        return lambda new: model.generate(**prompt, max_new_tokens=new, do_sample=False)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).train()
    model.requires_grad_(False)
    model.model.multi_modal_projector.linear_1.requires_grad_(True)  # the other is what makes two of our one: identity
    model.model.language_model.requires_grad_(stage == 2)
    model.lm_head.requires_grad_(stage == 2)
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(dtype)
    optimizer, = adamw(model, 1e-4)

    def step() -> torch.Tensor:
        with torch.autocast(device.partition(":")[0], dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=tokens, pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def peak(side, folder: Path, dtype: torch.dtype, device: str) -> float:
    """Gigabytes that two steps of stage 2 take at most, in a fresh process; on a CPU, with all that it imports."""
    step = side(folder, dtype, device, 2)
    step()
    step()
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss begins with what the process had that started this one
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---------------------------------------------------------------------------------------------
# The tables


def compare(sides: dict, folder: Path, dtype: torch.dtype, device: str, repeat: int) -> dict[str, dict[str, float]]:
    """What each side takes: seconds a step or a token, and gigabytes."""
    found = {}

    def measure(name: str, runs: dict) -> None:
        print0(f"measuring: {name}")
        for run in runs.values():
            run()  # the first time is always slower
        turns = [{side: seconds(run, device, 1) for side, run in runs.items()} for _ in range(repeat)]
        found[name] = {side: min(turn[side] for turn in turns) for side in runs}

    for stage in (1, 2):
        steps = {name: side(folder, dtype, device, stage) for name, side in sides.items()}
        losses = [float(step()) for step in steps.values()]
        if max(losses) > 1.01 * min(losses):  # bfloat16 differs by less
            raise InputError(f"no fair race: the losses of the first step of stage {stage} differ, {losses}")
        measure(f"stage {stage} step", steps)
    generate = {name: side(folder, dtype, device, None) for name, side in sides.items()}
    measure("first token", {name: partial(run, 1) for name, run in generate.items()})
    measure("next token", {name: partial(run, 1 + NEW) for name, run in generate.items()})
    for name in sides:
        found["next token"][name] = (found["next token"][name] - found["first token"][name]) / NEW
    found["stage 2 memory"] = {}
    for name, side in sides.items():
        print0(f"measuring: memory of {name}")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            found["stage 2 memory"][name] = fresh.submit(peak, side, folder, dtype, device).result()
    return found


def limits(dtype: torch.dtype, device: str) -> dict[str, float]:
    """The fewest seconds that this machine could take for each, by its matrix products or its memory."""
    computed = pick_compute_dtype(dtype, device)
    rate, speed = matrix_rate(computed, device), bandwidth(device)
    print0(f"this machine: {rate / 1e9:,.0f} GFLOP/s in products of {str(computed)[6:]}, reads {speed / 1e9:,.1f} GB/s")
    with torch.device("meta"):
        model = Llava(CONFIG)
    least = {}
    for stage in (1, 2):
        freeze(model, stage)
        least[f"stage {stage} step"] = operations(model, ROWS, TOKENS, LEARNED) / rate
    D, V = CONFIG.text.hidden_size, CONFIG.text.vocab_size
    model.requires_grad_(False)
    cached = 2 * CONFIG.text.num_hidden_layers * (TOKENS + NEW / 2) * D
    weights = count(model.language_model) - V * D  # but for the embeddings
    least["next token"] = (dtype.itemsize * weights + computed.itemsize * cached) / speed
    return least


def growth(generate, device: str, repeat: int) -> float:
    """How many times as long a late token takes as one of the first: 1 is as it should be."""
    print0("measuring: growth")
    generate(2)  # the first time is always slower
    first, some, many = (seconds(partial(generate, new), device, repeat) for new in (1, 1 + NEW, 1 + 4 * NEW))
    return (many - some) / (3 * NEW) / ((some - first) / NEW)


def photographs(folder: Path) -> dict[int, float]:
    """Photographs of 640 x 480 that one process opens and prepares a second, by the size that the ViT sees."""
    random = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (60, 80, 3), generator=random, dtype=torch.uint8).numpy()
    path = folder / "photo.jpg"
    Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
    return {size: 1 / seconds(lambda: preprocess(open_image(path), size), "cpu", 20) for size in (224, 336)}


def show(found: dict[str, dict[str, float]], least: dict[str, float]) -> str:
    """The table: what each side takes, how many times less ours takes, and its share of the machine's limit."""
    sides = list(next(iter(found.values())))
    lines = [" " * 16 + "".join(f"{side:>15}" for side in sides) + f"{'times less':>12}" * (len(sides) > 1)
             + f"{'of the machine':>16}"]
    for name, taken in found.items():
        unit, scale = ("GB", 1) if "memory" in name else ("ms", 1000)
        line = f"{name:<16}" + "".join(f"{scale * value:>12,.1f} {unit}" for value in taken.values())
        line += f"{taken['transformers'] / taken['nanollava']:>12.2f}" if len(sides) > 1 else ""
        lines.append(line + (f"{least[name] / taken['nanollava']:>15.0%}" if name in least else ""))
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    device = best_device(arguments.device)
    dtype = best_dtype(device, arguments.dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        Llava(CONFIG).save_pretrained(folder)
        sides = {"nanollava": partial(ours, compiled=arguments.compile)}
        if importlib.util.find_spec("transformers"):
            sides["transformers"] = theirs
        least = limits(dtype, device)
        found = compare(sides, folder, dtype, device, arguments.repeat)
        longer = growth(sides["nanollava"](folder, dtype, device, None), device, arguments.repeat)
        opened = photographs(folder)
    print(show(found, least))
    print(f"a token after the first {NEW} takes {longer:.2f} times as long as one of those")
    for size, rate in opened.items():
        print(f"photographs of 640 x 480 to {size} pixels: {rate:,.0f} a second, one process")


if __name__ == "__main__":
    with one_line_errors():
        main()
