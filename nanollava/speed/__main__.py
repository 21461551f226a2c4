"""Speed and memory on this machine, compared with its limits, transformers and llama.cpp.

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

On a CPU, a second table follows if llama_cpp (llama-cpp-python) is installed: prompts and next
tokens in float32, bfloat16 and 8 bits, with one thread and with all. `llama_cpp.py` says what is
compared.
"""

from ..infra.start import start

if __name__ == "__main__":
    start()  # before other imports, which take long

import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from ..infra.cli import Parser, add_device, check_flags, format_table, in_range, one_line_errors
from ..infra.device import best_device, best_dtype
from ..llava import Llava
from ..toy.speedrun import speedrun
from .limits import machine_limits
from .llama_cpp import race_llama_cpp
from .race import race
from .sides import (CONFIG, Side, generator, training_step, transformers_generator,
                    transformers_training_step)

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
    device, compiled = best_device(arguments.device), arguments.compile
    dtype = best_dtype(device, arguments.dtype)
    sides = {"nanollava": Side(partial(training_step, compiled=compiled),
                               partial(generator, compiled=compiled))}
    if find_spec("transformers"):
        sides["transformers"] = Side(transformers_training_step, transformers_generator)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        Llava(CONFIG).save_pretrained(folder)
        limits = machine_limits(dtype, device)
        results = race(sides, folder, dtype, device, arguments.repeat)
        print(results_table(results, limits))
        if device == "cpu" and find_spec("llama_cpp"):
            results = race_llama_cpp(folder, arguments.repeat, compiled)
            print("", results_table(results, {}), slower(results), sep="\n")


def results_table(results: dict[str, dict[str, float]], limits: dict[str, float]) -> str:
    """Results by side. Ratio: the other side / nanollava. Of the limit: the least time that the
    machine needs / nanollava's time."""
    rows = []
    for name, sides in results.items():
        unit, scale = ("GB", 1) if "memory" in name else ("ms", 1000)
        ours, *others = sides.values()
        rows.append([name, *(f"{scale * value:,.1f} {unit}" for value in sides.values()),
                     *(f"{other / ours:.2f}" for other in others),
                     *([f"{limits[name] / ours:.0%}"] if name in limits else [])])
    header = ["", *sides, *["ratio" for _ in others], *["of the limit"] * bool(limits)]
    return format_table(header, rows)


def slower(results: dict[str, dict[str, float]]) -> str:
    """What takes us longer than llama.cpp."""
    names = [name for name, sides in results.items() if sides["nanollava"] > sides["llama.cpp"]]
    return f"nanollava is slower: {'; '.join(names) or 'nowhere'}"


if __name__ == "__main__":
    with one_line_errors():
        main(parse_arguments())
