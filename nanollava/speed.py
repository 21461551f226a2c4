"""Speed and memory on this machine, compared with its limits and with transformers.

    python -m nanollava.speed                    # on the fastest device, in the dtype fast on it
    python -m nanollava.speed --dtype bfloat16 --repeat 10
    python -m nanollava.speed --compile          # our side with --compile
    python -m nanollava.speed --toy              # how long `python train.py` takes, and how well

The model has random weights and a size between the toy's and the real one's: a ViT-B, a LLaMA of 12
blocks of 768, steps of 4 rows of 324 tokens. transformers takes part if it is installed. Both sides
open the same folder, get the same inputs and run in turns in one process, so that other load slows
both. The fastest of several turns counts.

Trainable weights are float32 and frozen ones have --dtype, on both sides. With bfloat16,
transformers runs under autocast. Ours computes in bfloat16 too, except on a CPU that is slow in it:
there it trains in float32, and generates in float32 with bfloat16 weights.
"""

from .infra.start import on_stop_signals, start

if __name__ == "__main__":
    start()  # before other imports, which take long

import importlib.util
import multiprocessing
import re
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .conversation import IGNORE_INDEX
from .data import Batch, collate
from .infra import distributed
from .infra.cli import Parser, add_device, check_flags, format_table, in_range, one_line_errors
from .infra.device import best_device, best_dtype, compile_blocks, pick_compute_dtype
from .infra.io import InputError
from .infra.progress import print0
from .llama import LlamaConfig
from .llava import Llava, LlavaConfig
from .plan import count_parameters, step_flops
from .toy.speedrun import speedrun
from .training import adamw, forward_backward, freeze, recompute_swiglu
from .vision import VisionConfig

CONFIG = LlavaConfig(
    VisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                 num_attention_heads=12),
    LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                num_attention_heads=12))
ROWS, TOKENS, TARGETS = 4, CONFIG.tokens_per_image + 68, 34  # of a training step; targets of a row
NEW_TOKENS = 64  # to generate
CONFLICTS = {(flag, "--toy"): "the toy run is timed as train.py runs it"
             for flag in ("--dtype", "--device", "--repeat", "--compile")}


def parse_arguments():
    parser = Parser(__doc__, prog="python -m nanollava.speed")
    add = parser.add_argument
    add("--dtype", choices=("float32", "bfloat16"),
        help="of frozen weights (default: bfloat16 where it is fast)")
    add_device(add)
    add("--repeat", type=in_range(1, 1000), default=5,
        help="turns of each measurement (default: %(default)s)")
    add("--compile", action="store_true",
        help="compile our blocks, which takes minutes before the first step")
    add("--toy", action="store_true", help="time the toy run instead, see docs/log.md")
    add("--seeds", type=in_range(1, 100), default=3, help="toy runs (default: %(default)s)")
    arguments = parser.parse_args()
    check_flags(arguments, {"--seeds": ("--toy",)}, CONFLICTS)
    return arguments


def main(arguments) -> None:
    if arguments.toy:
        return print(speedrun(arguments.seeds))
    device = best_device(arguments.device)
    dtype = best_dtype(device, arguments.dtype)
    sides = {"nanollava": Side(partial(training_step, compiled=arguments.compile),
                               partial(generator, compiled=arguments.compile))}
    if importlib.util.find_spec("transformers"):
        sides["transformers"] = Side(transformers_training_step, transformers_generator)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        Llava(CONFIG).save_pretrained(folder)
        limits = machine_limits(dtype, device)
        results = race(sides, folder, dtype, device, arguments.repeat)
    print(results_table(results, limits))


# ---------------------------------------------------------------------------------------------
# What the machine can do


def best_time(function: Callable, device: str, repeat: int = 5) -> float:
    """Seconds of the fastest of several calls, including the work that they start on the device."""
    def synchronize() -> None:
        if device != "cpu":
            torch.accelerator.synchronize(torch.device(device))

    times = []
    for _ in range(repeat):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_flops(dtype: torch.dtype, device: str) -> float:
    """Operations per second in a product of two square matrices, of the fastest size."""
    rates = []
    for size in (512, 1024, 2048) if device == "cpu" else (2048, 4096, 8192):
        x = torch.randn(size, size, device=device).to(dtype)
        rates.append(2 * size**3 / best_time(lambda: x @ x, device, 20))
    return max(rates)


def memory_bandwidth(device: str) -> float:
    """Bytes per second read from memory, by a sum over a gigabyte."""
    x = torch.ones(2**28, device=device)
    return x.nbytes / best_time(x.sum, device)


def machine_limits(dtype: torch.dtype, device: str) -> dict[str, float]:
    """The least seconds that this machine needs, by its matrix products or its memory bandwidth."""
    compute_dtype = pick_compute_dtype(dtype, device)
    flops, bandwidth = matmul_flops(compute_dtype, device), memory_bandwidth(device)
    print0(f"this machine: {flops / 1e9:,.0f} GFLOP/s in {str(compute_dtype)[6:]} matrix products, "
           f"reads {bandwidth / 1e9:,.1f} GB/s")
    with torch.device("meta"):
        model = Llava(CONFIG)
    limits = {}
    for stage in (1, 2):
        freeze(model, stage)
        limits[f"stage {stage} step"] = step_flops(model, ROWS, TOKENS, TARGETS) / flops
    # a new token reads every weight once, except the embeddings, and the keys and values so far
    D, V = CONFIG.text.hidden_size, CONFIG.text.vocab_size
    weights = count_parameters(model.language_model) - V * D
    cache = 2 * CONFIG.text.num_hidden_layers * (TOKENS + NEW_TOKENS / 2) * D
    num_bytes = dtype.itemsize * weights + compute_dtype.itemsize * cache
    return limits | {"next token": num_bytes / bandwidth}


# ---------------------------------------------------------------------------------------------
# The two sides. Each opens a folder and returns a function to measure.


@dataclass
class Side:
    training_step: Callable  # (folder, dtype, device, stage) -> step() -> loss
    generator: Callable  # (folder, dtype, device) -> generate(number of new tokens)


def make_batch() -> Batch:
    """The rows of one step, always the same."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, CONFIG.text.vocab_size, (ROWS, TOKENS), generator=random)
    tokens[:, 1 : 1 + CONFIG.tokens_per_image] = CONFIG.image_token_id
    labels = tokens.clone()
    labels[:, :-TARGETS] = IGNORE_INDEX
    images = torch.randint(256, (ROWS, 3, CONFIG.image_size, CONFIG.image_size),
                           dtype=torch.uint8, generator=random)
    rows = zip(tokens.tolist(), labels.tolist(), images[:, None])  # one image a row
    return collate(list(rows), CONFIG.image_token_id)


def training_step(folder: Path, dtype: torch.dtype, device: str, stage: int,
                  compiled: bool = False) -> Callable:
    """Our training step, as train.py takes it."""
    batch = [make_batch()]  # one micro-batch
    model = Llava.from_pretrained(folder, torch.float32)
    freeze(model, stage)
    model.compute_dtype = pick_compute_dtype(dtype, device)
    recompute_swiglu(model.language_model)
    if compiled:
        compile_blocks(model)
    distributed.shard_model(model, model.language_model.model.layers, model.compute_dtype, device)
    (optimizer,) = adamw(model, 1e-4)

    def step() -> torch.Tensor:
        loss, _ = forward_backward(model, batch, device)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def transformers_training_step(folder: Path, dtype: torch.dtype, device: str,
                               stage: int) -> Callable:
    """The same step in transformers."""
    from transformers import LlavaForConditionalGeneration

    tokens, labels, images, *_ = make_batch().to(device)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).train()
    model.requires_grad_(False)
    # linear_2 is the identity that the public layout adds to our linear projector
    model.model.multi_modal_projector.linear_1.requires_grad_(True)
    model.model.language_model.requires_grad_(stage == 2)
    model.lm_head.requires_grad_(stage == 2)
    for weight in model.parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.to(dtype)
    (optimizer,) = adamw(model, 1e-4)

    def step() -> torch.Tensor:
        with torch.autocast(device.partition(":")[0], dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=tokens, pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def generator(folder: Path, dtype: torch.dtype, device: str, compiled: bool = False) -> Callable:
    """Our generation of new tokens for one row."""
    tokens, _, images, *_ = make_batch().to(device)
    model = Llava.from_pretrained(folder, dtype, device)
    model.compute_dtype = pick_compute_dtype(dtype, device)
    if compiled:
        compile_blocks(model)
    return lambda new: list(model.generate(tokens[:1], images[:1], max_new_tokens=new))


def transformers_generator(folder: Path, dtype: torch.dtype, device: str) -> Callable:
    """The same generation in transformers."""
    from transformers import LlavaForConditionalGeneration

    tokens, _, images, *_ = make_batch().to(device)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None  # on neither side does a stop token end a row
    inputs = dict(input_ids=tokens[:1], pixel_values=images[:1].to(dtype),
                  attention_mask=torch.ones_like(tokens[:1]))
    return lambda new: model.generate(**inputs, max_new_tokens=new, do_sample=False)


# ---------------------------------------------------------------------------------------------
# Measurements


def race(sides: dict[str, Side], folder: Path, dtype: torch.dtype, device: str,
         repeat: int) -> dict[str, dict[str, float]]:
    """{measurement: {side: seconds or gigabytes}}."""
    results = {}
    for stage in (1, 2):
        steps = {name: side.training_step(folder, dtype, device, stage)
                 for name, side in sides.items()}
        losses = [float(step()) for step in steps.values()]
        if max(losses) > 1.01 * min(losses):  # bfloat16 makes a smaller difference
            raise InputError("the sides do not compute the same: the first losses of stage "
                             f"{stage} are {losses}")
        results[f"stage {stage} step"] = take_turns(f"stage {stage} step", steps, device, repeat)
    generate = {name: side.generator(folder, dtype, device) for name, side in sides.items()}
    for label, new in (("first token", 1), ("next token", 1 + NEW_TOKENS)):
        functions = {name: partial(function, new) for name, function in generate.items()}
        results[label] = take_turns(label, functions, device, repeat)
    for name, first in results["first token"].items():
        results["next token"][name] = (results["next token"][name] - first) / NEW_TOKENS
    results["stage 2 memory"] = peaks = {}
    for name, side in sides.items():
        print0(f"measuring: memory of {name}")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a new process
            with on_stop_signals(signal.SIG_IGN):  # the process inherits this: it ends with ours
                future = pool.submit(peak_memory, side.training_step, folder, dtype, device)
            peaks[name] = future.result()
    return results


def take_turns(label: str, functions: dict[str, Callable], device: str,
               repeat: int) -> dict[str, float]:
    """The best time of each function; they run in turns."""
    print0(f"measuring: {label}")
    for function in functions.values():
        function()  # the first call is always slower
    turns = [{name: best_time(function, device, 1) for name, function in functions.items()}
             for _ in range(repeat)]
    return {name: min(turn[name] for turn in turns) for name in functions}


def peak_memory(make_step: Callable, folder: Path, dtype: torch.dtype, device: str) -> float:
    """Peak gigabytes of two steps of stage 2; on a CPU that includes the process's imports."""
    step = make_step(folder, dtype, device, 2)
    step()
    step()
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss starts at the value of the parent process
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes


def results_table(results: dict[str, dict[str, float]], limits: dict[str, float]) -> str:
    """Results by side. Ratio: transformers / nanollava. Of the limit: the least time that the
    machine needs / nanollava's time."""
    sides = list(next(iter(results.values())))
    has_both = "transformers" in sides
    rows = []
    for name, values in results.items():
        unit, scale = ("GB", 1) if "memory" in name else ("ms", 1000)
        row = [name, *(f"{scale * value:,.1f} {unit}" for value in values.values())]
        if has_both:
            row.append(f"{values['transformers'] / values['nanollava']:.2f}")
        if name in limits:
            row.append(f"{limits[name] / values['nanollava']:.0%}")
        rows.append(row)
    return format_table(["", *sides, *["ratio"] * has_both, "of the limit"], rows)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_arguments())
