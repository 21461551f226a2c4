import pytest

from nanollava.infra.io import InputError
from nanollava.toy import speedrun

TABLE = """             after stage 2   wrong image
kind                100.0%         14.3%
same color           87.0%          2.0%
all                  97.5%         19.1%
"""


def fake_train(tmp_path, monkeypatch, lines):
    train = tmp_path / "train.py"
    train.write_text("\n".join(["import os, sys", *lines]))
    monkeypatch.setattr(speedrun, "TRAIN", train)


def test_speedrun_times_a_run_of_each_seed_in_an_empty_folder(tmp_path, monkeypatch):
    fake_train(tmp_path, monkeypatch, [
        "assert sys.argv[1] == '--seed' and not os.listdir()",
        f"print({TABLE!r}.replace('97.5', '9' + str(6 + int(sys.argv[2])) + '.5'), end='')"])
    lines = speedrun.speedrun(2).splitlines()
    assert lines[1].split()[:2] == ["seed", "0"]
    assert lines[1].endswith("96.5%   same color 87.0%")
    assert lines[3].split()[0] == "mean" and lines[3].endswith(" 97.0%")
    assert lines[4].startswith("97 % in ") and lines[4].endswith("99 % not reached")


def test_run_that_fails_is_an_error(tmp_path, monkeypatch):
    fake_train(tmp_path, monkeypatch, ["sys.exit(2)"])
    with pytest.raises(InputError, match="seed 0 failed"):
        speedrun.speedrun(1)


def test_the_program_that_is_timed_is_train_py():
    assert "Train LLaVA" in speedrun.TRAIN.read_text()
