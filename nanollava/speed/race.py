"""Training steps, generated tokens and memory, measured on all sides in turns."""

import multiprocessing
import re
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from ..infra.io import InputError
from ..infra.progress import print0
from ..infra.start import on_stop_signals
from .limits import best_time
from .sides import NEW_TOKENS, Side


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
