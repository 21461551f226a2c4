from nanollava.infra.progress import Progress, clock, progress


def test_clock():
    assert [clock(seconds) for seconds in (0, 75, 3600, 7325)] == ["0:00", "1:15", "1:00:00", "2:02:05"]


def test_progress_ends_with_what_was_done_on_standard_error(capsys):
    assert list(progress([1, 2, 3], "drawing", "pictures")) == [1, 2, 3]
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("drawing  3/3 pictures") and error.endswith("0:00 left\n")


def test_a_note_and_the_rate_stand_in_the_line(capsys):
    with Progress("stage 1", 10, "steps") as line:
        line.update(5, "loss 1.25")
    error = capsys.readouterr().err
    assert "5/10 steps  loss 1.25" in error and "steps/s" in error


def test_what_is_told_stands_on_a_line_of_its_own_and_no_line_comes_twice(capsys, monkeypatch):
    with Progress("stage 1", 10, "steps") as line:
        line.write("a picture failed")
        line.shown -= 10
        line.update(10)
    assert capsys.readouterr().err.count("\n") == 2
