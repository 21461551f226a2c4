"""What matters, and how much: tables 8 and 4 of the paper on the toy world, `python -m nanollava.evaluate ablations`.

Every figure comes from commands that anybody can type: train.py, then an evaluation. Each runs in a process of its
own, several at once, its words in a .txt beside the folder that it makes. What is finished stays, what was stopped goes
on.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev

from ..benchmarks.scienceqa import ORDERS, read_rows
from ..conversation import INSTRUCTION_KINDS
from ..infra.io import InputError, read_json, write_json
from ..infra.progress import Progress
from .dataset import write_bench, write_world
from .scienceqa import write_problems

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
CLIP, LLM = TRAIN.parent / "assets" / "toy-clip", TRAIN.parent / "assets" / "toy-llama"
BATCH = 16  # rows a step, in both stages
SHARES = (0.25, 0.5, 1)  # of the steps: how fast do the two orders of reason and answer get there?
SCIENCEQA = {  # rows of table 8, and what the paper found
    "best": ("as in the paper", 90.92), "last-layer": ("last layer of the ViT", 89.96),
    "answer-first": ("answer first", 89.77), "no-stage-1": ("without stage 1", 85.81),
    "small-llm": ("smaller LLM", 89.84),
}
DATA = {  # rows of table 4: kinds of instructions, and what the paper found for each kind of question, and for all
    "all-kinds": ("all three kinds", INSTRUCTION_KINDS, (83.1, 75.3, 96.5, 85.1)),
    "no-conversation": ("without conversations", ("detail", "reasoning"), (81.5, 73.3, 90.8, 81.9)),
    "no-reasoning": ("without reasoning", ("conversation", "detail"), ()),
    "conversation": ("conversations alone", ("conversation",), (76.5, 59.8, 84.9, 73.8)),
    "none": ("no instruction tuning", (), (22.0, 24.0, 18.5, 21.5)),
}


@dataclass
class Job:
    """A command, the file that is there once it is finished, and the files that it waits for."""

    product: Path
    command: list
    needs: list[Path]

    @property
    def folder(self) -> Path:
        return self.product.parent


def write_data(root: Path, seed: int = 0) -> None:
    """The toy world, a bench and a ScienceQA with its rows in both orders, whatever is missing."""
    world, problems = root / "world", root / "scienceqa"
    for folder, write in ((world, write_world), (root / "bench", write_bench), (problems, write_problems)):
        if not folder.exists():
            write(folder, seed)
    for order in ORDERS:
        write_json(root / f"{order}.json", read_rows(problems, "train", order))
    instruct = read_json(world / "instruct.json")
    for name, (_, kinds, _) in DATA.items():
        if kinds:
            write_json(world / f"{name}.json", [row for row in instruct if row["id"].partition("-")[2] in kinds])
    if not (root / "small" / "toy-clip").exists():
        shutil.copytree(CLIP, root / "small" / "toy-clip")


def jobs(root: Path, seeds: int, steps: int) -> list[Job]:
    """All that is trained and scored, in an order in which each finds what it needs."""
    world, problems, small = root / "world", root / "scienceqa", root / "small" / "toy-llama"
    todo = [Job(small / "config.json", [TRAIN, "--stage", 0, "--small-llm", "--out", root / "small"], [])]
    length = {path: len(read_json(path)) for path in (*world.glob("*.json"), *root.glob("*-first.json"))}

    for seed in range(seeds):
        folder = root / f"seed{seed}"

        def train(name, stage: int, data: Path, images: Path, start: list, needs=(), share=1.0) -> Job:
            epochs = round(share * steps) * BATCH / length[data]
            command = [TRAIN, "--stage", stage, *start, "--data", data, "--images", images, "--epochs", epochs,
                       "--batch-size", BATCH, "--seed", seed, "--out", folder / name, "--resume"]
            todo.append(Job(folder / name / "config.json", command, list(needs)))
            return todo[-1]

        def score(model: Job, *how) -> None:
            out = model.folder / "score.json"
            command = ["-m", "nanollava.evaluate", *how, "--model", model.folder, "--out", out]
            todo.append(Job(out, command, [model.product]))

        def stage1(name: str, llm: Path, *more, needs=()) -> Job:
            start = ["--vision", CLIP, "--llm", llm, *more]
            return train(f"stage1-{name}", 1, world / "pretrain.json", world / "images", start, needs)

        def after(made: Job) -> dict:
            return {"start": ["--model", made.folder], "needs": [made.product]}

        def school(name: str, start: list, needs=(), order=ORDERS[0], share=1.0) -> None:
            made = train(f"scienceqa-{name}", 2, root / f"{order}.json", problems, start, needs, share)
            score(made, "scienceqa", "--data", problems, "--batch-size", 64)

        full = stage1("best", LLM)
        for share in SHARES:
            school(f"best-{share}", **after(full), share=share)
            school(f"answer-first-{share}", **after(full), order=ORDERS[1], share=share)
        school("no-stage-1", ["--vision", CLIP, "--llm", LLM])
        school("last-layer", **after(stage1("last-layer", LLM, "--feature-layer", -1)))
        for name, (_, kinds, _) in DATA.items():
            made = train(name, 2, world / f"{name}.json", world / "images", **after(full)) if kinds else full
            score(made, "toy", "--data", root / "bench")
        school("small-llm", **after(stage1("small-llm", small, needs=[small / "config.json"])))
    return todo


def run(todo: list[Job], at_once: int) -> None:
    """Run the jobs that are not finished. Raises InputError, with its last line, if one fails; the others that run
    then are asked to stop."""
    threads = str(max(1, os.cpu_count() // at_once))
    waiting, running, finished = [job for job in todo if not job.product.exists()], {}, 0
    begun = len(todo) - len(waiting)
    with Progress("ablations", len(todo), "runs", begun) as progress:
        try:
            while waiting or running:
                for job in [job for job in waiting if all(path.exists() for path in job.needs)]:
                    if len(running) < at_once:
                        waiting.remove(job)
                        job.folder.mkdir(parents=True, exist_ok=True)
                        with open(output(job), "a") as file:
                            running[subprocess.Popen(
                                [sys.executable, *map(str, job.command)], stdout=file, stderr=file,
                                env=os.environ | {"OMP_NUM_THREADS": threads}, start_new_session=True)] = job
                time.sleep(0.2)
                for process in [process for process in running if process.poll() is not None]:
                    job = running.pop(process)
                    if process.returncode or not job.product.exists():
                        said = output(job).read_text(errors="replace").strip().splitlines() or ["it said nothing"]
                        raise InputError(f"{' '.join(map(str, job.command))}: {said[-1]} (see {output(job)})")
                    finished += 1
                    progress.update(begun + finished, str(job.folder))
        finally:
            for process in running:
                process.terminate()  # training saves
            for process in running:
                process.wait()


def output(job: Job) -> Path:
    """Where a job's words go: beside its folder, which train.py wants to find empty."""
    return job.folder.with_name(f"{job.folder.name}.txt")


# ---------------------------------------------------------------------------------------------
# The tables


def results(root: Path, seeds: int) -> dict:
    """Percent right, a list of one number a seed: {"scienceqa": {row: [...]}, "orders": {share: {order: [...]}},
    "data": {row: {kind of question, or "all": [...]}}}."""

    def score(seed: int, name: str) -> dict:
        return read_json(root / f"seed{seed}" / name / "score.json")

    def school(name: str) -> list[float]:
        return [score(seed, f"scienceqa-{name}")["accuracy"]["AVG"] for seed in range(seeds)]

    orders = {share: {order: school(f"{name}-{share}") for order, name in zip(ORDERS, ("best", "answer-first"))}
              for share in SHARES}
    table = {name: school(f"{name}-1" if name in ("best", "answer-first") else name) for name in SCIENCEQA}
    data = {}
    for name in DATA:
        scores = [score(seed, name if name != "none" else "stage1-best")["model"] for seed in range(seeds)]
        data[name] = {kind: [one[kind] for one in scores] for kind in (*INSTRUCTION_KINDS, "all")}
    return {"scienceqa": table, "orders": orders, "data": data}


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, "81.3 ± 0.7"."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def agrees(less: list[float], paper: float) -> str:
    """Do the differences, one a seed, have the sign of the paper's?"""
    same = [difference * paper > 0 for difference in less]
    return "yes" if all(same) else "no" if not any(same) else "not clear"


def grid(rows: list[list[str]]) -> str:
    """Rows of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) + 3 for column in zip_longest(*rows, fillvalue="")]
    return "\n".join("".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


def text(found: dict) -> str:
    """The tables beside the paper's."""
    best, (_, paper_best) = found["scienceqa"]["best"], SCIENCEQA["best"]
    school = [["ScienceQA, table 8", "here", "to the first", "the paper", "to the first", "as there?"]]
    for name, (label, paper) in SCIENCEQA.items():
        values = found["scienceqa"][name]
        less = [one - other for one, other in zip(values, best)]
        compared = [spread(less), f"{paper:.2f}", f"{paper - paper_best:+.2f}", agrees(less, paper - paper_best)]
        school.append([label, spread(values), *(["", f"{paper:.2f}"] if name == "best" else compared)])
    orders = [["share of the steps", *ORDERS]]
    orders += [[f"{share:g}", *map(spread, row.values())] for share, row in found["orders"].items()]
    kinds = (*INSTRUCTION_KINDS, "all")
    data = [["instructions, table 4", *kinds, *(f"paper: {kind}" for kind in kinds)]]
    data += [[label, *(spread(found["data"][name][kind]) for kind in kinds), *map(str, paper)]
             for name, (label, _, paper) in DATA.items()]
    return "\n\n".join(map(grid, (school, orders, data)))
