"""The paper's ablations on the toy world: tables 8 and 4, `python -m nanollava.evaluate ablations`.

Every number comes from commands that you can type yourself: train.py, then an evaluation. Each runs
in a process of its own, several at a time, and writes its output to a .txt file next to its folder.
Finished commands are not repeated, and stopped ones are resumed.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from ..benchmarks.scienceqa import ORDERS, read_rows
from ..conversation import INSTRUCTION_KINDS
from ..infra.cli import format_table
from ..infra.io import InputError
from ..infra.json_io import read_json, write_json
from ..infra.progress import Progress
from .dataset import write_bench, write_world
from .scienceqa import write_problems

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
CLIP, LLM = TRAIN.parent / "assets" / "toy-clip", TRAIN.parent / "assets" / "toy-llama"
BATCH_SIZE = 16  # in both stages
SHARES = (0.25, 0.5, 1)  # of the steps: how fast does the model learn with either order of reasons?
TABLE_8 = {  # ScienceQA: name of the row, its label, the paper's accuracy
    "best": ("as in the paper", 90.92), "last-layer": ("last layer of the ViT", 89.96),
    "answer-first": ("answer first", 89.77), "no-stage-1": ("without stage 1", 85.81),
    "small-llm": ("smaller LLM", 89.84),
}
TABLE_4 = {  # instruction data: name of the row, its label, its kinds, the paper's scores
    "all-kinds": ("all three kinds", INSTRUCTION_KINDS, (83.1, 75.3, 96.5, 85.1)),
    "no-conversation": (
        "without conversations", ("detail", "reasoning"), (81.5, 73.3, 90.8, 81.9)),
    "no-reasoning": ("without reasoning", ("conversation", "detail"), ()),
    "conversation": ("conversations alone", ("conversation",), (76.5, 59.8, 84.9, 73.8)),
    "none": ("no instruction tuning", (), (22.0, 24.0, 18.5, 21.5)),
}
SCORES = (*INSTRUCTION_KINDS, "all")  # the columns of table 4: kinds of questions


def write_data(root: Path) -> None:
    """Write what is missing: the toy world, its bench and its ScienceQA, and the training rows."""
    world, problems = root / "world", root / "scienceqa"
    writers = {world: write_world, root / "bench": write_bench, problems: write_problems}
    for folder, write in writers.items():
        if not folder.exists():
            write(folder)
    for order in ORDERS:
        write_json(root / f"{order}.json", read_rows(problems, "train", order))
    instruct = read_json(world / "instruct.json", [{"id": str}])
    for name, (_, kinds, _) in TABLE_4.items():
        if kinds:
            rows = [row for row in instruct if row["id"].partition("-")[2] in kinds]
            write_json(world / f"{name}.json", rows)
    # stage 0 trains the small LLM with the vocabulary of the CLIP that it finds
    if not (root / "small" / "toy-clip").exists():
        shutil.copytree(CLIP, root / "small" / "toy-clip")


# ---------------------------------------------------------------------------------------------
# The commands


@dataclass
class Task:
    """A Python command, and the file that exists once it has finished."""

    product: Path
    arguments: list

    @property
    def folder(self) -> Path:
        return self.product.parent

    @property
    def output(self) -> Path:
        """The file of its output: not in its folder, because train.py wants that empty."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    @property
    def needs(self) -> list[Path]:
        """The files of other tasks that must exist before it starts."""
        return [folder / "config.json" for flag, folder in zip(self.arguments, self.arguments[1:])
                if flag in ("--model", "--llm") and folder != LLM]


@dataclass
class Repetition:
    """Makes the tasks of one seed. `steps`: of every training."""

    root: Path
    seed: int
    steps: int

    def train(self, name: str, stage: int, start: list, data: Path, images: Path,
              share: float = 1.0) -> Task:
        """Train for a share of the steps. `start`: the flags that name the initial model."""
        out = self.root / f"seed{self.seed}" / name
        epochs = round(share * self.steps) * BATCH_SIZE / len(read_json(data, list))
        return Task(out / "config.json", [
            TRAIN, "--stage", stage, *start, "--data", data, "--images", images,
            "--epochs", epochs, "--batch-size", BATCH_SIZE, "--seed", self.seed,
            "--out", out, "--resume"])

    def stage1(self, name: str, llm: Path, *flags) -> Task:
        world, start = self.root / "world", ["--vision-tower", CLIP, "--llm", llm, *flags]
        return self.train(f"stage1-{name}", 1, start, world / "pretrain.json", world / "images")

    def scienceqa(self, name: str, start: list, order: str = ORDERS[0],
                  share: float = 1.0) -> list[Task]:
        """Fine-tune on ScienceQA, then evaluate."""
        problems, data = self.root / "scienceqa", self.root / f"{order}.json"
        model = self.train(f"scienceqa-{name}", 2, start, data, problems, share)
        return [model, evaluate(model, "scienceqa", "--data", problems, "--batch-size", 64)]

    def tasks(self) -> list[Task]:
        """All tasks, each after those whose models it needs."""
        world, bench = self.root / "world", self.root / "bench"
        best = self.stage1("best", LLM)
        last_layer = self.stage1("last-layer", LLM, "--feature-layer", -1)
        small_llm = self.stage1("small-llm", self.root / "small" / "toy-llama")
        after_best, no_stage1 = ["--model", best.folder], ["--vision-tower", CLIP, "--llm", LLM]
        tasks = [best, last_layer, small_llm]
        # table 8
        for share in SHARES:
            tasks += self.scienceqa(f"best-{share}", after_best, share=share)
            tasks += self.scienceqa(f"answer-first-{share}", after_best, "answer-first", share)
        tasks += self.scienceqa("no-stage-1", no_stage1)
        tasks += self.scienceqa("last-layer", ["--model", last_layer.folder])
        tasks += self.scienceqa("small-llm", ["--model", small_llm.folder])
        # table 4
        for name, (_, kinds, _) in TABLE_4.items():
            if kinds:
                data = world / f"{name}.json"
                model = self.train(name, 2, after_best, data, world / "images")
                tasks += [model, evaluate(model, "toy", "--data", bench)]
        return [*tasks, evaluate(best, "toy", "--data", bench)]


def evaluate(model: Task, *arguments) -> Task:
    out = model.folder / "score.json"
    command = ["-m", "nanollava.evaluate", *arguments]
    return Task(out, [*command, "--model", model.folder, "--out", out])


def list_tasks(root: Path, seeds: int, steps: int) -> list[Task]:
    """All trainings and evaluations, each after those whose models it needs."""
    small = root / "small"
    tasks = [Task(small / "toy-llama" / "config.json",
                  [TRAIN, "--stage", 0, "--small-llm", "--out", small])]
    for seed in range(seeds):
        tasks += Repetition(root, seed, steps).tasks()
    return tasks


# ---------------------------------------------------------------------------------------------
# Running them


def run_tasks(tasks: list[Task], num_processes: int) -> None:
    """Run the unfinished tasks, `num_processes` at a time.

    Raises InputError if a task fails. The other processes are then told to stop, as they are by
    Ctrl-C; training saves a checkpoint.
    """
    waiting, running = [task for task in tasks if not task.product.exists()], {}
    num_threads = max(1, os.cpu_count() // num_processes)
    with Progress("ablations", len(tasks), "runs", len(tasks) - len(waiting)) as progress:
        try:
            while waiting or running:
                ready = [task for task in waiting if all(path.exists() for path in task.needs)]
                for task in ready[: num_processes - len(running)]:
                    waiting.remove(task)
                    running[start_process(task, num_threads)] = task
                time.sleep(0.2)
                for process in [process for process in running if process.poll() is not None]:
                    task = running.pop(process)
                    check_success(task, process.returncode)
                    done = len(tasks) - len(waiting) - len(running)
                    progress.update(done, str(task.folder))
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def start_process(task: Task, num_threads: int) -> subprocess.Popen:
    task.folder.mkdir(parents=True, exist_ok=True)
    with open(task.output, "a") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, task.arguments)], stdout=output, stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": str(num_threads)},
            start_new_session=True)  # Ctrl-C reaches only this process, which stops the others


def check_success(task: Task, return_code: int) -> None:
    """Raise InputError with the last line of output if a task failed."""
    if return_code or not task.product.exists():
        lines = task.output.read_text(errors="replace").strip().splitlines() or ["no output"]
        command = " ".join(map(str, task.arguments))
        raise InputError(f"{command}: {lines[-1]} (see {task.output})")


# ---------------------------------------------------------------------------------------------
# The tables


def read_results(root: Path, seeds: int) -> dict:
    """Accuracies in percent, always a list with one number a seed.

    {"scienceqa": {row of table 8: [...]}, "orders": {share of the steps: {order: [...]}},
    "data": {row of table 4: {kind of questions or "all": [...]}}}
    """

    def scores(name: str, shape: dict) -> list[dict]:
        paths = [root / f"seed{seed}" / name / "score.json" for seed in range(seeds)]
        return [read_json(path, shape) for path in paths]

    def scienceqa(name: str) -> list[float]:
        shape = {"accuracy": {"AVG": float}}
        return [score["accuracy"]["AVG"] for score in scores(f"scienceqa-{name}", shape)]

    def bench(name: str) -> dict[str, list[float]]:
        results = scores(name, {"model": dict.fromkeys(SCORES, float)})
        return {kind: [result["model"][kind] for result in results] for kind in SCORES}

    runs = dict(zip(ORDERS, ("best", "answer-first"), strict=True))  # trained for several shares
    orders = {share: {order: scienceqa(f"{name}-{share}") for order, name in runs.items()}
              for share in SHARES}
    table_8 = {name: scienceqa(f"{name}-1" if name in runs.values() else name) for name in TABLE_8}
    table_4 = {name: bench(name if kinds else "stage1-best")
               for name, (_, kinds, _) in TABLE_4.items()}
    return {"scienceqa": table_8, "orders": orders, "data": table_4}


def format_results(results: dict) -> str:
    """The three tables as text, with the paper's numbers."""
    orders = [[f"{share:g}", *map(mean_and_deviation, row.values())]
              for share, row in results["orders"].items()]
    return "\n\n".join([
        format_table_8(results["scienceqa"]),
        format_table(["share of the steps", *ORDERS], orders),
        format_table_4(results["data"])])


def format_table_8(accuracies: dict[str, list[float]]) -> str:
    """ScienceQA. Differences are from the first row; over seeds, from the same seed's."""
    label, paper_baseline = TABLE_8["best"]
    rows = [[label, mean_and_deviation(accuracies["best"]), "", f"{paper_baseline:.2f}"]]
    for name, (label, paper) in list(TABLE_8.items())[1:]:
        differences = [value - best for value, best in zip(accuracies[name], accuracies["best"])]
        paper_difference = paper - paper_baseline
        rows.append([
            label, mean_and_deviation(accuracies[name]), mean_and_deviation(differences),
            f"{paper:.2f}", f"{paper_difference:+.2f}", same_sign(differences, paper_difference)])
    header = ["ScienceQA, table 8", "toy", "difference", "paper", "difference", "same sign"]
    return format_table(header, rows)


def format_table_4(accuracies: dict[str, dict[str, list[float]]]) -> str:
    """Kinds of instruction data (rows) and kinds of questions (columns)."""
    rows = [[label, *(mean_and_deviation(accuracies[name][kind]) for kind in SCORES),
             *map(str, paper)] for name, (label, _, paper) in TABLE_4.items()]
    header = ["instruction data, table 4", *SCORES, *(f"paper: {kind}" for kind in SCORES)]
    return format_table(header, rows)


def mean_and_deviation(values: list[float]) -> str:
    """Mean and standard deviation over seeds, "81.3 ± 0.7"."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def same_sign(differences: list[float], paper_difference: float) -> str:
    """Whether the differences, one a seed, all have the sign of the paper's."""
    same = [difference * paper_difference > 0 for difference in differences]
    return "yes" if all(same) else "no" if not any(same) else "unclear"
