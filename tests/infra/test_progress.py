import os

import pytest

from nanollava.infra.progress import Progress, format_time, print0, progress


def test_time_is_formatted_as_clock_time():
    times = [format_time(seconds) for seconds in (0, 75, 3600, 7325)]
    assert times == ["0:00", "1:15", "1:00:00", "2:02:05"]


def test_message_is_one_short_line(capsys):
    print0("row 3 (id \x1b[2J\n" + "a" * 200_000 + "): remove it")
    error = capsys.readouterr().err
    assert error.startswith(r"row 3 (id \x1b[2J\naaa") and error.endswith("): remove it\n")
    assert len(error) < 1100 and error.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_reader_that_is_gone_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr("sys.stderr", open("/dev/full", "w"))
    print0("loss 1.25")


def test_progress_ends_with_a_line_on_standard_error(capsys):
    assert list(progress([1, 2, 3], "drawing", "images")) == [1, 2, 3]
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("drawing  3/3 images") and error.endswith("0:00 left\n")


def test_line_shows_note_and_rate(capsys):
    with Progress("stage 1", 10, "steps") as line:
        line.update(5, "loss 1.25")
    error = capsys.readouterr().err
    assert "5/10 steps  loss 1.25" in error and "steps/s" in error


def test_rate_ignores_what_was_done_before_a_resume(capsys):
    with Progress("stage 1", 110, "steps", initial=100) as line:
        line.start -= 10
        line.update(105)
    assert "105/110 steps  0.5 steps/s  0:10 elapsed, 0:10 left" in capsys.readouterr().err


def test_message_has_its_own_line_and_no_line_is_repeated(capsys):
    with Progress("stage 1", 10, "steps") as line:
        print0("an image failed")
        line.last_shown -= 10
        line.update(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "an image failed" and len(lines) == 2
