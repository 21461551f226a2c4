"""Bad command lines for all commands: each ends in one line, before the work starts."""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanollava.infra.cli import Parser, add_command, one_line_errors, out_file, out_folder

ROOT = Path(__file__).parents[2]
MODULES = ("train", "sample", "prepare_data", "nanollava.evaluate",
           "nanollava.speed.__main__", "nanollava.tour")


def parsers() -> dict[str, Parser]:
    """{"prepare_data toy": its parser}, of all commands."""
    found = {}

    def capture(parser, *_):
        subparsers = [action.choices for action in parser._actions
                      if isinstance(action, argparse._SubParsersAction)]
        found.update({f"{module} {name}": child for choices in subparsers
                      for name, child in choices.items()} or {module: parser})
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", capture)
        for module in MODULES:
            with pytest.raises(SystemExit):
                importlib.import_module(module).parse_arguments()
    return found


PARSERS = parsers()
OPTIONS = {name: [action for action in parser._actions if action.option_strings]
           for name, parser in PARSERS.items()}
NO_NUMBERS = ("nan", "inf", "-1", "-inf", "1e308", "1e999", "9" * 5000, "", "x\x1b[2J\n")


@pytest.fixture
def refuse(monkeypatch, capsys):
    """refuse("train", "--lr=0") -> the line with which the parser refuses it."""

    def run(name, *words):
        module, *command = name.split()
        monkeypatch.setattr(sys, "argv", [module, *command, *map(str, words)])
        with pytest.raises(SystemExit) as exit, one_line_errors():
            importlib.import_module(module).parse_arguments()
        out, error = capsys.readouterr()
        assert (exit.value.code, out) == (2, "") and is_one_line(error), error
        return error

    return run


def is_one_line(error: str) -> bool:
    return error.startswith("error: ") and error[:-1].isprintable() and len(error) < 1100


@pytest.mark.parametrize("name", PARSERS)
def test_number_is_refused_with_its_range(refuse, name):
    for action in OPTIONS[name]:
        if action.choices or action.type in (None, Path, out_file, out_folder):
            continue
        flag = action.option_strings[0]
        for text in NO_NUMBERS:
            text = f"{text},{text}" if flag == "--price" else text
            error = refuse(name, f"{flag}={text}")
            assert flag in error and " from " in error, error


@pytest.mark.parametrize("name, words, limits", [
    ("train", "--epochs=1e-320", "from 1e-06 to 1000"),
    ("train", "--epochs=1001", "from 1e-06 to 1000"),
    ("train", "--lr=1e-320", "from 1e-12 to 100"),
    ("train", "--batch-size=1000000000", "from 1 to 65,536"),
    ("train", "--micro-batch-size=1000000000", "from 1 to 65,536"),
    ("train", "--lora-rank=1000000000", "from 1 to 4,096"),
    ("train", "--max-length=0", "from 1 to 1,000,000,000"),
    ("train", "--workers=65", "from 0 to 64"),
    ("train", "--seed=9223372036854775808", "from 0 to 9,223,372,036,854,775,807"),
    ("sample", "--temperature=1e-320", "0 or a number from 0.001 to 100"),
    ("sample", "--top-p=1.1", "from 0 to 1"),
    ("prepare_data instruct", "--timeout=0.01", "from 0.1 to 86400"),
    ("prepare_data instruct", "--price=1,1e9", "from 0 to 100000"),
    ("prepare_data instruct", "--price=3", "IN,OUT"),
    ("prepare_data instruct", "--workers=5000", "from 1 to 1,024"),
    ("prepare_data toy", "--scenes=1000001", "from 1 to 1,000,000"),
    ("nanollava.evaluate ablations", "--jobs=0", "from 1 to 256"),
    ("nanollava.speed.__main__", "--repeat=1e3", "from 1 to 1,000"),
])
def test_limit_of_a_number(refuse, name, words, limits):
    assert limits in refuse(name, words)


@pytest.mark.parametrize("name", PARSERS)
def test_output_that_cannot_be_written_is_refused(refuse, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("old")
    os.mkfifo("fifo")
    places = ["", "file/a", "/dev/null", "/proc/none/a", "fifo", "file/" + "x" * 200_000]
    for action in OPTIONS[name]:
        extra = {out_file: [".", "/", ".."], out_folder: ["file"]}.get(action.type)
        for place in places + extra if extra else ():
            error = refuse(name, f"{action.option_strings[0]}={place}")
            assert "cannot write" in error or "the name is empty" in error
    assert Path("file").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_outputs_of_all_commands_are_checked():
    outputs = {(name, action.option_strings[0]) for name in PARSERS for action in OPTIONS[name]
               if action.type in (out_file, out_folder)}
    named_out = {(name, "--out") for name in PARSERS for action in OPTIONS[name]
                 if "--out" in action.option_strings}
    assert outputs - named_out == {("nanollava.evaluate ablations", "--run"),
                                   ("nanollava.evaluate scienceqa", "--ensemble")}
    assert named_out < outputs


@pytest.mark.parametrize("words", ["--no\x1b[2J\n", "--device", "\udcff", "x" * 200_000])
@pytest.mark.parametrize("name", MODULES)
def test_unknown_argument_is_refused_in_one_line(refuse, name, words):
    refuse(name, words)


# ---------------------------------------------------------------------------------------------
# What commands do with names that come from a user or a file


@pytest.mark.parametrize("file", ["no\x1b[2J\n\u202e\udcff", "x" * 200_000], ids=["odd", "long"])
@pytest.mark.parametrize("words", [
    "train --stage 1 --images . --data", "train --stage 1 --data WORLD --llm",
    "train --stage 1 --data WORLD --vision-tower", "train --stage 2 --data WORLD --model",
    "train --stage 1 --data WORLD --eval-data", "train --device",
    "sample --image", "sample --prompt x --model", "sample --prompt x --device",
    "prepare_data show --data", "prepare_data show --model", "prepare_data stats",
    "prepare_data instruct --out o --captions",
    "prepare_data captions --out o --captions", "prepare_data scienceqa --out o --data",
    "prepare_data weights",
    "nanollava.evaluate toy --run", "nanollava.evaluate toy --model",
    "nanollava.evaluate report --data d --images i --model",
    "nanollava.evaluate scienceqa --answers a --data",
    "nanollava.evaluate bench --out o --context c --reference r --answers a --questions",
    "nanollava.speed.__main__ --device", "nanollava.tour --model",
    "nanollava.tour --model run --image", "nanollava.tour --model run --device"])
def test_missing_file_with_an_odd_name_is_refused_in_one_line(
        command, world, run_folder, words, file):
    module, *words = words.replace("WORLD", str(world)).split()
    code, out, error = command(module, *words, file)
    assert (code, out) == (2, "") and is_one_line(error), error


@pytest.mark.parametrize("words, name", [
    ("prepare_data captions --captions captions.json", "captions.json"),
    ("prepare_data captions --captions captions.json", "link"),
    ("prepare_data instruct --dry-run --kind detail --captions captions.json "
     "--instances instances.json", "instances.json"),
    ("prepare_data scienceqa --data .", "problems.json"),
    ("nanollava.evaluate toy --model run --data . --limit 1", "test.json"),
    ("nanollava.evaluate toy --model run --data . --limit 1", "run/config.json"),
])
def test_input_is_not_overwritten(command, world, run_folder, tmp_path, words, name):
    for path in (*world.glob("annotations/*.json"), world / "test.json"):
        shutil.copy(path, tmp_path)
    Path(tmp_path, "images").symlink_to(world / "images")
    Path(tmp_path, "link").symlink_to("captions.json")
    problem = {"question": "?", "choices": ["a", "b"], "answer": 0, "split": "train",
               "hint": "", "image": None, "grade": "grade1", "subject": "natural science",
               "lecture": "", "solution": ""}
    Path(tmp_path, "problems.json").write_text(json.dumps({"1": problem}))
    Path(tmp_path, "pid_splits.json").write_text(json.dumps({"train": ["1"]}))
    before = Path(tmp_path, name).read_bytes()
    module, *words = words.split()
    code, _, error = command(module, *words, "--out", name)
    assert code == 2 and error.endswith(f"error: --out {name} is an input of this command: "
                                        "choose another\n"), error
    assert Path(tmp_path, name).read_bytes() == before


# ---------------------------------------------------------------------------------------------
# Start-up

INTERRUPT = """
import runpy, signal, sys

class Finder:
    def find_spec(name, *_):
        if name == module:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder)
_, module, *sys.argv = sys.argv
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("words", [
    "torch train.py", "torch sample.py", "requests prepare_data.py toy", "torch nanollava.speed",
    "torch prepare_data.py stats x", "requests nanollava.evaluate toy",
    "torch nanollava.evaluate toy"])
def test_ctrl_c_during_imports_is_one_line(words):
    done = subprocess.run([sys.executable, "-c", INTERRUPT, *words.split()], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "stopped\n")


def test_parser_works_without_docstrings():
    """`python -OO` removes them."""
    parser = Parser(None)
    add_command(parser.add_subparsers(parser_class=Parser), "one", None)
    assert "one" in parser.format_help()
