import json
import signal
import threading

import pytest

from nanollava.conversation import INSTRUCTION_KINDS
from nanollava.infra.io import InputError
from nanollava.toy import ablations
from nanollava.toy.ablations import DATA, SCIENCEQA, Job, agrees, jobs, results, run, spread, text


@pytest.fixture
def root(tmp_path):
    (tmp_path / "world").mkdir()
    for file in ("reason-first", "answer-first", "world/pretrain", *(f"world/{name}" for name in DATA)):
        (tmp_path / f"{file}.json").write_text(json.dumps([0] * 32))
    return tmp_path


def test_every_job_finds_what_it_needs_and_no_two_make_the_same(root):
    todo = jobs(root, seeds=2, steps=10)
    made = [job.product for job in todo]
    assert len(made) == len(set(made)) == 1 + 2 * 30
    for number, job in enumerate(todo):
        assert set(job.needs) <= set(made[:number])
        for option, place in zip(job.command, job.command[1:]):
            if option in ("--model", "--llm") and place != ablations.LLM:
                assert place / "config.json" in job.needs


def test_all_rows_get_the_same_number_of_steps(root):
    (root / "world" / "conversation.json").write_text(json.dumps([0] * 80))
    for job in jobs(root, seeds=1, steps=10):
        if "--epochs" in job.command:
            epochs, data = (job.command[job.command.index(option) + 1] for option in ("--epochs", "--data"))
            share = next((share for share in ablations.SHARES if job.folder.name.endswith(f"-{share}")), 1)
            assert epochs * len(json.loads(data.read_text())) / ablations.BATCH == pytest.approx(round(10 * share))


def touch(path, *needs, fail=False) -> Job:
    """A job that writes the names of what it found, then its product."""
    program = f"import pathlib; pathlib.Path({str(path)!r}).write_text('x'); print('done')"
    return Job(path, ["-c", program if not fail else "import sys; sys.exit('error: no luck')"], list(needs))


def test_jobs_run_when_what_they_need_is_there_and_never_twice(tmp_path):
    a, b, c = (tmp_path / name / "made" for name in "abc")
    run([touch(a), touch(c, b), touch(b, a)], at_once=2)
    times = [path.stat().st_mtime_ns for path in (a, b, c)]
    assert times == sorted(times) and (tmp_path / "a.txt").read_text() == "done\n"
    run([touch(a), touch(c, b), touch(b, a)], at_once=2)
    assert times == [path.stat().st_mtime_ns for path in (a, b, c)]


def test_a_job_that_fails_is_told_with_its_own_words(tmp_path):
    with pytest.raises(InputError, match=r"error: no luck \(see .*bad.txt\)"):
        run([touch(tmp_path / "bad" / "made", fail=True)], at_once=1)


def test_whoever_stops_it_stops_what_it_began(tmp_path):
    program = f"import pathlib, time; pathlib.Path({str(tmp_path / 'begun')!r}).write_text('x'); time.sleep(60)"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts into the background without
    threading.Timer(1.5, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        run([Job(tmp_path / "slow" / "made", ["-c", program], [])], at_once=1)  # returns long before a minute
    assert (tmp_path / "begun").exists()


def test_a_difference_agrees_with_the_paper_only_if_all_seeds_do():
    assert agrees([-1.0, -0.1], -5.11) == "yes"
    assert agrees([1.0, 0.0], -5.11) == "no"
    assert agrees([-1.0, 0.1], -5.11) == "not clear"
    assert spread([80.0, 82.0]) == "81.0 ± 1.4" and spread([80.0]) == "80.0"


def test_the_tables_stand_beside_the_papers(tmp_path):
    right = {"best": 90, "last-layer": 89, "answer-first": 91, "no-stage-1": 80, "small-llm": 70}
    for seed in range(2):
        def write(name, value):
            (tmp_path / f"seed{seed}" / name).mkdir(parents=True)
            (tmp_path / f"seed{seed}" / name / "score.json").write_text(json.dumps(value))

        for name, value in right.items():
            shares = [f"-{share}" for share in ablations.SHARES] if name in ("best", "answer-first") else [""]
            for share in shares:
                write(f"scienceqa-{name}{share}", {"accuracy": {"AVG": value + seed}})
        for number, name in enumerate(DATA):
            scores = {kind: 10.0 * number for kind in (*INSTRUCTION_KINDS, "all")}
            write(name if name != "none" else "stage1-best", {"model": scores})
    lines = text(results(tmp_path, 2)).splitlines()
    assert lines[1].split() == ["as", "in", "the", "paper", "90.5", "±", "0.7", "90.92"]
    assert lines[4].startswith("without stage 1")
    assert lines[4].split()[-6:] == ["-10.0", "±", "0.0", "85.81", "-5.11", "yes"]
    assert lines[3].endswith("no") and len(lines) == 1 + len(SCIENCEQA) + 2 + len(ablations.SHARES) + 2 + len(DATA)
    assert lines[-1].startswith("no instruction tuning") and "40.0 ± 0.0" in lines[-1] and lines[-1].endswith("21.5")
