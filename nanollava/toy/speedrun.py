"""The speedrun: how soon does `python train.py` make a toy LLaVA that sees?

Each run draws the world of its seed in an empty folder, trains both stages and evaluates them, as a
first user would. docs/log.md has the table of records and its rules.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

from ..infra.cli import format_table
from ..infra.io import InputError
from ..infra.progress import print0

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
GOALS = 97, 99  # percent of the questions, the mean over the seeds


def speedrun(seeds: int) -> str:
    """Run train.py with the seeds 0, 1, ...; the results as a table.

    Raises InputError if a run fails.
    """
    results = []
    for seed in range(seeds):
        print0(f"speedrun {seed + 1} of {seeds}: python train.py --seed {seed}")
        results.append(run_once(seed))
    return results_table(results)


def run_once(seed: int) -> tuple[float, dict[str, float]]:
    """Seconds of one run, and the accuracy after stage 2 in percent, {question type: percent}."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = subprocess.run([sys.executable, TRAIN, "--seed", str(seed)], cwd=folder,
                                stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
    if result.returncode:
        raise InputError(f"the run with seed {seed} failed, see above")
    return seconds, read_accuracy(result.stdout)


def read_accuracy(table: str) -> dict[str, float]:
    """The first column of the table that train.py prints."""
    _, *lines = table.splitlines()
    cells = (line.partition("%")[0].rsplit(maxsplit=1) for line in lines)
    return {name: float(percent) for name, percent in cells}


def results_table(results: list[tuple[float, dict[str, float]]]) -> str:
    """A row for each seed and one for their mean, then the goals that the mean reaches."""
    rows = []
    for seed, (seconds, accuracy) in enumerate(results):
        worst = min(accuracy, key=accuracy.get)
        rows.append([f"seed {seed}", f"{seconds:.0f}", f"{accuracy['all']:.1f}%",
                     f"{worst} {accuracy[worst]:.1f}%"])
    seconds, percent = (mean(values) for values in
                        zip(*((seconds, accuracy["all"]) for seconds, accuracy in results)))
    rows.append(["mean", f"{seconds:.0f}", f"{percent:.1f}%"])
    goals = [f"{goal} % in {seconds:.0f} seconds" if percent >= goal else f"{goal} % not reached"
             for goal in GOALS]
    table = format_table(["", "seconds", "accuracy", "worst type"], rows)
    return "\n".join([table, "; ".join(goals)])
