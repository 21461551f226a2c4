import json
import signal
import threading

import pytest

from nanollava.infra.io import InputError
from nanollava.toy.ablations import (
    SCORES,
    SHARES,
    TABLE_4,
    TABLE_8,
    Task,
    format_results,
    list_tasks,
    mean_and_deviation,
    read_results,
    run_tasks,
    same_sign,
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "world").mkdir()
    instruct = [f"world/{name}" for name in TABLE_4]
    for file in ("reason-first", "answer-first", "world/pretrain", *instruct):
        (tmp_path / f"{file}.json").write_text(json.dumps([0] * 32))
    return tmp_path


def test_every_task_comes_after_its_models_and_has_its_own_product(root):
    tasks = list_tasks(root, seeds=2, steps=10)
    products = [task.product for task in tasks]
    assert len(products) == len(set(products)) == 1 + 2 * 30
    for number, task in enumerate(tasks):
        assert set(task.needs) <= set(products[:number])
    without_needs = {task.folder.name for task in tasks if not task.needs}
    assert without_needs == {
        "toy-llama", "stage1-best", "stage1-last-layer", "scienceqa-no-stage-1"}


def test_all_trainings_take_the_same_number_of_steps(root):
    (root / "world" / "conversation.json").write_text(json.dumps([0] * 80))
    for task in list_tasks(root, seeds=1, steps=10):
        if "--epochs" in task.arguments:
            flags = dict(zip(task.arguments, task.arguments[1:]))
            num_rows = len(json.loads(flags["--data"].read_text()))
            steps = flags["--epochs"] * num_rows / flags["--batch-size"]
            shares = [share for share in SHARES if task.folder.name.endswith(f"-{share}")] or [1]
            assert steps == pytest.approx(round(10 * shares[0]))


def make_task(folder, *models, fail=False) -> Task:
    """A task that needs the models and writes its product."""
    product = folder / "config.json"
    program = f"import pathlib; pathlib.Path({str(product)!r}).write_text('x'); print('done')"
    if fail:
        program = "import sys; sys.exit('error: disk full')"
    needs = [word for model in models for word in ("--model", model)]
    return Task(product, ["-c", program, *needs])


def test_tasks_run_once_and_after_what_they_need(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    tasks = [make_task(a), make_task(c, b), make_task(b, a)]
    run_tasks(tasks, num_processes=2)
    times = [(folder / "config.json").stat().st_mtime_ns for folder in (a, b, c)]
    assert times == sorted(times)
    assert (tmp_path / "a.txt").read_text() == "done\n"
    run_tasks(tasks, num_processes=2)
    assert times == [(folder / "config.json").stat().st_mtime_ns for folder in (a, b, c)]


def test_failed_task_is_reported_with_its_last_line(tmp_path):
    with pytest.raises(InputError, match=r"error: disk full \(see .*bad.txt\)"):
        run_tasks([make_task(tmp_path / "bad", fail=True)], num_processes=1)


def test_interrupt_stops_running_processes(tmp_path):
    started = tmp_path / "started"
    program = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    # a shell starts background processes with Ctrl-C disabled
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1.5, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):  # without waiting for the 60 seconds
        run_tasks([Task(tmp_path / "slow" / "config.json", ["-c", program])], num_processes=1)
    assert started.exists()


def test_sign_is_the_same_only_if_all_seeds_agree():
    assert same_sign([-1.0, -0.1], -5.11) == "yes"
    assert same_sign([1.0, 0.0], -5.11) == "no"
    assert same_sign([-1.0, 0.1], -5.11) == "unclear"


def test_deviation_is_shown_for_several_seeds():
    assert mean_and_deviation([80.0, 82.0]) == "81.0 ± 1.4"
    assert mean_and_deviation([80.0]) == "80.0"


def test_tables_show_our_numbers_beside_the_papers(tmp_path):
    accuracies = {
        "best": 90, "last-layer": 89, "answer-first": 91, "no-stage-1": 80, "small-llm": 70}

    def write(seed, name, value):
        folder = tmp_path / f"seed{seed}" / name
        folder.mkdir(parents=True)
        (folder / "score.json").write_text(json.dumps(value))

    for seed in range(2):
        for name, accuracy in accuracies.items():
            runs = {name: accuracy + seed}
            if name in ("best", "answer-first"):  # the run with all steps is the one of table 8
                runs = {f"{name}-{share}": (accuracy + seed) * share for share in SHARES}
            for run, value in runs.items():
                write(seed, f"scienceqa-{run}", {"accuracy": {"AVG": value}})
        for number, name in enumerate(TABLE_4):
            score = {"model": {kind: 10.0 * number for kind in SCORES}}
            write(seed, name if name != "none" else "stage1-best", score)
    lines = format_results(read_results(tmp_path, 2)).splitlines()
    assert len(lines) == 1 + len(TABLE_8) + 2 + len(SHARES) + 2 + len(TABLE_4)
    assert lines[1].split() == ["as", "in", "the", "paper", "90.5", "±", "0.7", "90.92"]
    assert lines[3].endswith("no")
    assert lines[-len(TABLE_4) - 4].split() == ["0.5", "45.2", "±", "0.4", "45.8", "±", "0.4"]
    assert lines[4].startswith("without stage 1")
    assert lines[4].split()[-6:] == ["-10.0", "±", "0.0", "85.81", "-5.11", "yes"]
    assert lines[-1].startswith("no instruction tuning")
    assert "40.0 ± 0.0" in lines[-1] and lines[-1].endswith("21.5")
