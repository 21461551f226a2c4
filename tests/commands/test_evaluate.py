"""python -m nanollava.evaluate as a user meets it."""

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from nanollava import evaluate
from nanollava.infra.io import locked_folder
from nanollava.infra.json_io import read_json
from tests.benchmarks.test_scienceqa import COMET, NOUN

ROOT = Path(__file__).parents[2]
REQUIRED = {  # the arguments without which a command does not start
    "toy": (), "ablations": (), "lens": (),
    "report": ("--model", "m", "--data", "d", "--images", "i"),
    "scienceqa": ("--data", "d", "--answers", "a"),
    "bench": ("--questions", "q", "--reference", "r", "--context", "c", "--out", "o",
              "--answers", "a"),
}
VALUES = {**dict.fromkeys(("--workers", "--batch-size", "--limit", "--seeds", "--steps", "--jobs",
                           "--max-reply-tokens"), ["2"]),
          "--dtype": ["float32"], "--quantize": ["int8"], "--split": ["val"],
          "--both-orders": [], "--run": ["runs"], "--ensemble": ["gpt"], "--scenes": ["20"]}


@pytest.fixture
def scienceqa(tmp_path, world):
    """A ScienceQA of two problems, one with an image, and a file of answers to them."""
    (tmp_path / "test" / "7").mkdir(parents=True)
    image = world / "images" / "train_000000.png"
    (tmp_path / "test" / "7" / "image.png").write_bytes(image.read_bytes())
    (tmp_path / "problems.json").write_text(json.dumps({"7": COMET, "8": NOUN}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["8"], "test": ["7", "8"]}))
    answers = [{"question_id": 7, "text": "B"}, {"question_id": 8, "text": "C"}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return "nanollava.evaluate", "scienceqa", "--data", tmp_path


@pytest.fixture
def bench(tmp_path):
    """A LLaVA-Bench of one question; the arguments name its files."""
    for name, row in {
        "questions": {"question_id": 1, "image": "7.jpg", "text": "What?", "category": "conv"},
        "reference": {"question_id": 1, "text": "A cat."},
        "context": {"image": "7.jpg", "caption": "A cat."},
        "answers": {"question_id": 1, "text": "A dog."},
    }.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    return ("nanollava.evaluate", "bench", "--questions", "questions", "--reference", "reference",
            "--context", "context", "--out", "out.json")


def base_url(server) -> tuple[str, str]:
    return "--base-url", f"http://127.0.0.1:{server.server_port}/v1"


def test_help_answers_without_torch():
    code = "import sys, nanollava.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["", *evaluate.COMMANDS])
def test_help_of_each_command(command, name):
    code, out, _ = command("nanollava.evaluate", *name.split(), "--help")
    assert code == 0 and f"usage: python -m nanollava.evaluate {name}" in out


def has_no_effect(name: str, flag: str, flags: tuple[str, ...]) -> bool:
    """The expected behavior, written independently of the program's own table."""
    if name in ("toy", "scienceqa", "bench") and flag == "--vision-tower":
        return "--model" not in flags
    if name in ("scienceqa", "bench") and "--model" not in flags:
        if flag in ("--batch-size", "--dtype", "--device", "--quantize", "--images"):
            return True
    if name == "scienceqa" and "--ensemble" not in flags:
        return flag in ("--gpt", "--base-url", "--workers", "--max-reply-tokens")
    return name == "toy" and flag == "--run" and "--model" in flags


@pytest.mark.parametrize("name", evaluate.COMMANDS)
def test_pair_of_flags_acts_or_is_refused(command, monkeypatch, name):
    add_arguments, _ = evaluate.COMMANDS[name]
    monkeypatch.setitem(evaluate.COMMANDS, name, (add_arguments, lambda _: ("done", None)))
    help_text = command("nanollava.evaluate", name, "--help")[1]
    flags = {line.split()[0] for line in help_text.splitlines() if line.startswith("  --")}
    for pair in combinations(sorted(flags - {*REQUIRED[name]}), 2):
        words = [word for flag in pair for word in (flag, *VALUES.get(flag, ["x"]))]
        code, out, error = command("nanollava.evaluate", name, *REQUIRED[name], *words)
        refused = [flag for flag in pair if has_no_effect(name, flag, pair)]
        assert (code, out) == ((2, "") if refused else (0, "done\n")), (words, error)
        assert not refused or any(f"{flag} has no effect" in error for flag in refused)


@pytest.mark.parametrize("name", ["scienceqa", "bench"])
def test_answers_must_come_from_somewhere(error_of, name):
    assert "give --model" in error_of("nanollava.evaluate", name, *REQUIRED[name][:-2])


def test_bench_with_a_model_needs_images(error_of):
    error = error_of("nanollava.evaluate", "bench", *REQUIRED["bench"], "--model", "m")
    assert "--model needs --images" in error


def test_toy_evaluates_one_model_without_controls(command, run_folder, world):
    code, out, _ = command("nanollava.evaluate", "toy", "--model", run_folder, "--data", world,
                           "--limit", 4, "--out", "out.json", "--device", "cpu")
    assert code == 0 and out.splitlines()[-1].split()[0] == "all"
    assert list(read_json("out.json")) == ["model"]


def test_toy_evaluates_a_run_with_controls_and_writes_its_page(command, run_folder, world,
                                                               tmp_path):
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).symlink_to(run_folder)
    code, out, _ = command("nanollava.evaluate", "toy", "--run", tmp_path, "--data", world,
                           "--limit", 4, "--device", "cpu", "--quantize", "int8")
    columns = re.split(r"\s{2,}", out.splitlines()[0].strip())
    assert (code, columns) == (0, ["after stage 2", "wrong image", "after stage 1"])
    report = (tmp_path / "report.html").read_text()
    assert "<img" in report and "A toy LLaVA with int8 weights" in report


def test_ablations_run_alone_in_their_folder(error_of, tmp_path):
    with locked_folder(tmp_path / "run"):
        error = error_of("nanollava.evaluate", "ablations", "--run", tmp_path / "run")
    assert "run is in use by another run" in error


def test_ablations_refuse_other_steps_in_the_same_folder(error_of, tmp_path):
    (tmp_path / "steps.json").write_text("400")
    error = error_of("nanollava.evaluate", "ablations", "--run", tmp_path, "--steps", 20)
    assert f"{tmp_path} has runs of 400 steps" in error


def test_report_adds_replies_to_the_page_of_a_run(command, run_folder, world):
    (run_folder / "log.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n')
    code, out, _ = command("nanollava.evaluate", "report", "--model", "run",
                           "--data", world / "instruct.json", "--images", world / "images",
                           "--limit", 2, "--device", "cpu")
    assert (code, out) == (0, "run/report.html\n")
    page = Path("run/report.html").read_text()
    assert "<polyline" in page and page.count("<img") == 2


def test_report_shows_no_image_from_outside_its_folder(error_of, run_folder, world):
    rows = read_json(world / "instruct.json")[:1]
    rows[0]["image"] = "../images/" + rows[0]["image"]
    Path("rows.json").write_text(json.dumps(rows))
    error = error_of("nanollava.evaluate", "report", "--model", "run", "--data", "rows.json",
                     "--images", world / "images", "--device", "cpu")
    assert "rows.json, row 0: '../images/" in error and "is outside of" in error
    assert not Path("run/report.html").exists()


def test_scienceqa_scores_a_model(command, scienceqa, run_folder):
    code, out, error = command(*scienceqa, "--model", run_folder, "--out", "out.json",
                               "--device", "cpu")
    assert code == 0 and "AVG" in out and "2 replies name no option" in error
    assert read_json("out.json")["accuracy"]["AVG"] == 0.0
    assert len((run_folder / "scienceqa-test.jsonl").read_text().splitlines()) == 2


def test_scienceqa_keeps_replies_of_quantized_weights_apart(command, scienceqa, run_folder):
    evaluation = (*scienceqa, "--model", run_folder, "--device", "cpu")
    for flags, count in ((), 2), (("--quantize", "int8"), 4), ((), 4), (("--quantize", "int8"), 4):
        code, *_ = command(*evaluation, *flags)
        rows = (run_folder / "scienceqa-test.jsonl").read_text().splitlines()
        assert (code, len(rows)) == (0, count)


def test_scienceqa_scores_a_file_of_answers(command, scienceqa):
    code, out, _ = command(*scienceqa, "--answers", "answers.jsonl")
    assert code == 0 and out.splitlines()[-1].split() == ["AVG", "50.0%"]


def test_ensemble_asks_gpt_once_and_combines_its_answers(command, scienceqa, server):
    def reply(body):
        if "Two others" in body["messages"][0]["content"]:
            return "The answer is A."  # wrong for both problems
        is_comet = "a comet" in body["messages"][-1]["content"]
        return "I see no picture." if is_comet else "The answer is B."

    server.reply = reply
    for _ in range(2):
        code, out, _ = command(*scienceqa, "--answers", "answers.jsonl", "--ensemble", "gpt",
                               *base_url(server), "--out", "out.json")
        assert code == 0
        assert out.splitlines()[0].split() == ["LLaVA", "GPT-4", "complement", "judge"]
        assert out.splitlines()[-1].split() == ["AVG", "50.0%", "50.0%", "100.0%", "0.0%"]
    # two problems alone, both in dispute; the second run asks nothing
    assert len(server.requests) == 4
    roles = [message["role"] for message in server.requests[0]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]  # one solved example, of train
    result = read_json("out.json")
    assert result["accuracy"]["AVG"] == 50 and result["judge"]["accuracy"]["AVG"] == 0


def test_signal_keeps_the_answers_in_flight(command, scienceqa, bench, server, signal_in_flight):
    server.reply = lambda body: "8 6\nIt is B."
    signum = signal_in_flight(2)
    code, *_ = command(*scienceqa, "--answers", "answers.jsonl", "--ensemble", "gpt",
                       *base_url(server))
    assert code == 128 + signum and len(server.requests) == 2
    assert len(Path("gpt/alone.jsonl").read_text().splitlines()) == 2
    signal_in_flight(4)
    code, *_ = command(*bench, "--answers", "answers", *base_url(server), "--both-orders")
    assert code == 128 + signum and len(server.requests) == 4
    assert len(Path("out.json.ledger.jsonl").read_text().splitlines()) == 2


def test_bench_asks_for_each_grade_once(command, bench, server):
    server.reply = lambda body: "8 6\nIt is a cat."
    for _ in range(2):
        code, out, _ = command(*bench, "--answers", "answers", *base_url(server))
        assert code == 0 and out.splitlines()[-1].split() == ["all", "75.0%"]
    assert len(server.requests) == 1
    assert read_json("out.json")["grades"][0]["reasons"] == "It is a cat."


def test_bench_refuses_two_questions_with_one_id(error_of, bench):
    rows = Path("questions").read_text() * 2
    Path("questions").write_text(rows)
    assert "several questions with the same question_id" in error_of(*bench, "--answers", "answers")


def test_bench_names_the_questions_without_grade(command, bench, server):
    server.reply = lambda body: "Both are good."
    code, out, error = command(*bench, "--answers", "answers", *base_url(server))
    assert code == 0 and "no grade for 1" in error
    assert read_json("out.json")["scores"] == {}
