"""Jobs: every request is paid for once, rejected replies are retried, budgets and failures."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanollava.infra.io import InputError
from nanollava.teacher.jobs import TRIES, Job, in_parallel
from nanollava.teacher.ledger import Answer, Ledger, RequestError

ITEMS = list(range(30))
GOOD, BAD = "good reply", "bad reply"


class FakeChat:
    """Stands in for the client: `reply(item)` answers, `items` records what was requested."""

    def __init__(self, reply=lambda item: GOOD, complete=True):
        self.reply, self.complete = reply, complete
        self.items, self.stop = [], threading.Event()

    def __call__(self, messages):
        item = int(messages[-1]["content"])
        self.items.append(item)
        return Answer(self.reply(item), 10, 2, self.complete)


def parse(item, reply):
    if reply.startswith("bad"):
        raise ValueError(f"it is a {reply}")
    return f"{item}: {reply}"


def make_job(ledger, items=ITEMS, kind="numbers", model="toy"):
    return Job(kind, model, ledger, items, "numbers", item_id=str, parse=parse,
               messages=lambda item: [{"role": "user", "content": str(item)}])


def results_of(job):
    return [result for result in job.result()[0] if result]


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        yield ledger


# ---------------------------------------------------------------------------------------------
# Nothing is paid for twice


def test_interrupted_job_continues_without_repeating_a_request(tmp_path):
    def fail_at_13(item):
        if item == 13:
            raise InputError("no credit")
        return GOOD

    first, second, third = FakeChat(fail_at_13), FakeChat(), FakeChat()
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(InputError, match="no credit"):
        make_job(ledger).run(first, workers=4)
    with Ledger(tmp_path / "ledger") as ledger:
        assert not make_job(ledger).run(second, workers=4)
        results = results_of(make_job(ledger))
    with Ledger(tmp_path / "ledger") as ledger:
        assert not make_job(ledger).run(third) and not third.items
        assert results_of(make_job(ledger)) == results
    paid = [item for item in first.items if item != 13] + second.items
    assert sorted(paid) == ITEMS
    assert results == [f"{item}: {GOOD}" for item in ITEMS]


def test_answers_of_an_older_version_are_not_requested_again(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        make_job(ledger).run(FakeChat())
    rows = [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]
    with open(tmp_path / "ledger", "w") as file:
        for row in rows:
            file.write(json.dumps({**row, "whole": row.pop("complete")}) + "\n")
    with Ledger(tmp_path / "ledger") as ledger:
        job = make_job(ledger)
        assert job.pending() == [] and len(results_of(job)) == len(ITEMS)


def test_key_depends_on_model_and_messages():
    job = make_job(None)
    assert job.key(7) == "7-numbers-49a8bee30ba0259d"  # ledgers on disk rely on it
    assert make_job(None, model="other").key(7) != job.key(7) != job.key(8)


def test_answers_in_flight_when_a_job_ends_are_kept(ledger):
    """A failing worker ends the job while another one waits for its answer."""
    ended = threading.Event()

    def reply(item):
        if item == 0:
            ended.wait(10)
            return GOOD
        raise RequestError("no")

    job, chat = make_job(ledger), FakeChat(reply)
    stop = chat.stop.set
    chat.stop.set = lambda: (stop(), ended.set())
    with pytest.raises(InputError, match="failed in a row") as caught:
        job.run(chat, workers=2)
    assert ended.is_set() and caught  # not only when the exception is garbage-collected
    assert results_of(job) == [f"0: {GOOD}"]


@pytest.mark.parametrize("change", [{"kind": "letters"}, {"model": "other"}])
def test_ledger_of_another_job_is_refused(ledger, change):
    make_job(ledger).run(FakeChat())
    with pytest.raises(InputError, match="another kind or model"):
        make_job(ledger, **change).pending()


# ---------------------------------------------------------------------------------------------
# Rejected replies


def test_rejected_reply_is_kept_with_its_reason_and_retried(ledger):
    replies = iter([BAD, GOOD])
    job = make_job(ledger, [7])
    assert not job.run(FakeChat(lambda _: next(replies)))
    rejected, accepted = ledger[job.key(7)]
    assert (rejected["text"], rejected["rejected"]) == (BAD, "it is a bad reply")
    assert (accepted["text"], accepted["rejected"]) == (GOOD, None)
    assert results_of(job) == [f"7: {GOOD}"]


def test_item_is_given_up_after_all_tries(ledger):
    chat = FakeChat(lambda _: BAD)
    assert make_job(ledger, [7]).run(chat) == {"it is a bad reply": 1}
    assert len(chat.items) == TRIES
    assert not make_job(ledger, [7]).run(chat) and len(chat.items) == TRIES


def test_failed_request_costs_no_try(ledger):
    def fail(_):
        raise RequestError("too long")

    assert make_job(ledger, [7, 8]).run(FakeChat(fail)) == {"too long": 2}
    assert not make_job(ledger, [7, 8]).run(FakeChat())
    assert len(results_of(make_job(ledger, [7, 8]))) == 2


def test_cut_off_reply_is_rejected(ledger):
    chat = FakeChat(complete=False)
    assert make_job(ledger, [7]).run(chat) == {"the reply was cut off": 1}
    assert len(chat.items) == TRIES


def test_result_counts_rejected_replies_and_items_given_up(ledger):
    replies = {0: iter([BAD, GOOD]), 1: iter(["bad joke", BAD, BAD])}
    make_job(ledger, [0, 1]).run(FakeChat(lambda item: next(replies[item])))
    results, rejected, given_up = make_job(ledger, [0, 1, 2]).result()
    assert results == [f"0: {GOOD}", None, None] and given_up == 1
    assert rejected == {"it is a bad reply": 3, "it is a bad joke": 1}


# ---------------------------------------------------------------------------------------------
# Limits


def test_job_ends_when_nothing_succeeds(ledger):
    chat = FakeChat(lambda _: BAD)
    with pytest.raises(InputError, match="12 numbers failed in a row.*it is a bad reply"):
        make_job(ledger).run(chat, workers=2)
    assert len(chat.items) < TRIES * 20


def test_token_budget_spans_all_runs(tmp_path):
    for _ in range(3):
        with Ledger(tmp_path / "ledger") as ledger:
            make_job(ledger).run(FakeChat(lambda _: BAD), workers=1, max_tokens=60)  # 12 a reply
            assert ledger.total_tokens == 60


def test_first_failure_is_reported_immediately(ledger, capsys):
    def fail(item):
        if item == 1:
            raise RequestError("too long")
        return GOOD

    make_job(ledger).run(FakeChat(fail), workers=1, price=(30.0, 60.0))
    error = capsys.readouterr().err
    assert error.startswith("first failure among the numbers: too long\n")
    assert "0K tokens  $0.01  1 failed" in error


def test_items_are_drawn_only_when_a_worker_is_free():
    drawn, permit = [], threading.Semaphore(0)
    items = (drawn.append(number) for number in range(10))
    results = in_parallel(lambda _: permit.acquire(timeout=5), items, 4, threading.Event())
    for done in range(10):
        permit.release()  # one item finishes
        assert next(results) and len(drawn) == min(done + 4, 10)
    assert list(results) == []


def test_fatal_error_starts_no_new_item_and_lets_others_finish():
    begun, ended = [], []
    stop, both_running = threading.Event(), threading.Barrier(2, timeout=5)

    def work(number):
        begun.append(number)
        if number < 2:
            both_running.wait()
        if number == 0:
            raise InputError("no credit")
        stop.wait(5)
        ended.append(number)

    with pytest.raises(InputError, match="no credit"):
        list(in_parallel(work, range(10), 2, stop))
    assert stop.is_set() and len(begun) <= 3
    assert sorted(ended) == [number for number in sorted(begun) if number > 0]


def test_only_the_client_imports_requests():
    code = """if True:
        import sys
        from nanollava.teacher import captions, coco, jobs, ledger, prompts
        from nanollava.toy import dataset
        sys.exit("requests" in sys.modules)"""
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# ---------------------------------------------------------------------------------------------
# What is looked at before a reply is parsed


@pytest.mark.parametrize("reply, complete, outcome", [
    ("<think>Hm, a cat?</think>\n\ngood", True, "1: good"),
    ("<think>\n\n</think>\n\ngood", True, "1: good"),
    ("Hm, a cat?\n</think>\ngood", True, "1: good"),  # the prompt ended with the opening tag
    ("<THINKING>bad</THINKING>good", True, "1: good"),
    ("<think>Hm, <think>deep</think> a cat?</think>good", True, "1: good"),
    ("good\n<think>Was that right?", True, "1: good"),
    ("<think>good", True, "the reply has no text"),
    ("<think>good", False, "the reply was cut off"),
    (" \n", True, "the reply has no text"),
    ("", False, "the reply has no text"),
    ("good", False, "the reply was cut off"),
    ("bad form", False, "the reply was cut off"),
    ("bad form", True, "it is a bad form"),
])
def test_thoughts_are_removed_and_length_comes_before_form(ledger, reply, complete, outcome):
    answer = {"text": reply, "complete": complete}
    result, reason = make_job(ledger).check(1, answer)
    assert (result or reason) == outcome


def test_reply_without_text_is_kept_and_counts(ledger):
    job = make_job(ledger, [1])
    job.ask(1, lambda messages: Answer("", 10, 2, False, raw='{"choices": []}'), lambda: True)
    assert ledger.total_tokens == 12 * TRIES and job.pending() == []
    assert [row["raw"] for row in ledger[job.key(1)]] == ['{"choices": []}'] * TRIES
