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

from ..infra.start import on_stop_signals, start

if __name__ == "__main__":
    start()  # before other imports, which take long

import multiprocessing
import re
import resource
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from ..infra.cli import Parser, add_device, check_flags, format_table, in_range, one_line_errors
from ..infra.device import best_device, best_dtype
from ..infra.io import InputError
from ..infra.progress import print0
from ..llava import Llava
from ..toy.speedrun import speedrun
from .limits import best_time, machine_limits
from .llama_cpp import race_llama_cpp
from .sides import (CONFIG, NEW_TOKENS, Side, generator, training_step, transformers_generator,
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
