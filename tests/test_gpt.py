"""The client and its ledger, against a server on this machine that misbehaves as servers do."""

import json
import threading

import pytest

from nanollava import gpt
from nanollava.files import InputError
from nanollava.gpt import Answer, Chat, Ledger, RequestError, in_parallel

ASK = [{"role": "user", "content": "What is there?"}]


@pytest.fixture
def chat(server, monkeypatch):
    """A client that does not wait, but writes down how long it would have."""
    chat = Chat("toy", f"http://127.0.0.1:{server.server_port}/v1", timeout=0.3)
    chat.waited = []
    monkeypatch.setattr(chat.stop, "wait", lambda seconds: chat.waited.append(seconds))
    return chat


def test_an_answer_is_its_text_and_what_it_took(chat, server):
    assert chat(ASK) == Answer("A cat.", 10, 3, whole=True)
    assert server.heard[0]["messages"] == ASK and server.heard[0]["model"] == "toy"
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("mood", ["reset", "cut", "nonsense", "slow", (500, "oops"), (503, {"message": "busy"})])
def test_what_may_pass_is_asked_again_after_ever_longer_waits(chat, server, mood):
    server.moods = [mood] * 3
    assert chat(ASK).text == "A cat."
    assert len(server.heard) == 4
    for wait, least in zip(chat.waited, (1, 2, 4)):
        assert least <= wait <= 1.5 * least


def test_a_busy_server_is_waited_for_as_long_as_it_says(chat, server):
    server.moods = [(429, {"message": "slow down", "code": "rate_limit_exceeded"})]
    chat(ASK)
    assert 3 <= chat.waited[0] <= 4.5


def test_it_never_asks_forever(chat, server):
    server.moods = [(500, "oops")] * 100
    with pytest.raises(RequestError, match="500 oops .8 attempts"):
        chat(ASK)
    assert len(server.heard) == gpt.ATTEMPTS


@pytest.mark.parametrize("code, error, words", [
    (401, {"message": "Incorrect API key provided: sk-secret"}, r"Incorrect API key provided: \[key\]"),
    (404, {"message": "The model `gpt-9` does not exist", "code": "model_not_found"}, "gpt-9"),
    (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}, "quota"),
    (400, {"message": "Unknown parameter"}, "Unknown parameter"),
])
def test_what_will_not_pass_stops_at_once_with_the_servers_words(chat, server, code, error, words):
    server.moods = [(code, error)]
    with pytest.raises(InputError, match=words) as caught:
        chat(ASK)
    assert len(server.heard) == 1 and "sk-secret" not in str(caught.value)


def test_what_concerns_one_request_alone_does_not_stop_the_others(chat, server):
    server.moods = [(400, {"message": "too long", "code": "context_length_exceeded"})]
    with pytest.raises(RequestError, match="too long"):
        chat(ASK)


def test_an_answer_that_was_cut_off_says_so(chat, server):
    server.moods = ["too long"]
    assert not chat(ASK).whole


def test_a_key_is_needed_for_openai_alone(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="set OPENAI_API_KEY"):
        Chat("gpt-4")
    assert Chat("toy", "http://127.0.0.1:1").headers == {}
    with pytest.raises(InputError, match="--base-url localhost:1 is no address"):
        Chat("toy", "localhost:1")


@pytest.mark.parametrize("base, url", [
    ("http://host/v1", "http://host/v1/chat/completions"), ("http://host/v1/", "http://host/v1/chat/completions"),
    ("http://host/v1/chat/completions", "http://host/v1/chat/completions"),
    ("https://x.openai.azure.com/openai/deployments/d?api-version=1",
     "https://x.openai.azure.com/openai/deployments/d/chat/completions?api-version=1"),
])
def test_the_address_is_the_base_and_what_all_servers_share(base, url):
    assert Chat("toy", base).url == url


# ---------------------------------------------------------------------------------------------
# The ledger


def test_a_ledger_remembers_all_answers_to_a_key_in_order(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        for text in ("one", "two"):
            ledger.add("key", Answer(text, 5, 2, True), rejected=None)
    with Ledger(tmp_path / "ledger") as ledger:
        assert [answer["text"] for answer in ledger["key"]] == ["one", "two"]
        assert ledger["other"] == [] and (ledger.prompt_tokens, ledger.completion_tokens) == (10, 4)


def test_a_line_half_written_is_cut_off_and_the_rest_stays(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.add("key", Answer("ä", 5, 2, True))
    whole = (tmp_path / "ledger").read_bytes()
    for cut in range(1, len(whole)):
        (tmp_path / "ledger").write_bytes(whole + whole[:cut])
        with Ledger(tmp_path / "ledger") as ledger:
            ledger.add("next", Answer("b", 5, 2, True))
        lines = (tmp_path / "ledger").read_bytes().splitlines(keepends=True)
        assert lines[0] == whole and len(lines) == 2 and json.loads(lines[1])["key"] == "next"


def test_a_line_that_is_no_answer_is_named(tmp_path):
    (tmp_path / "ledger").write_text('{"key": 1}\n')
    with pytest.raises(InputError, match="ledger, line 1 is not an answer"), Ledger(tmp_path / "ledger"):
        pass


def test_a_ledger_has_one_writer(tmp_path):
    with Ledger(tmp_path / "ledger"), pytest.raises(InputError, match="in use by another run"):
        with Ledger(tmp_path / "ledger"):
            pass


def test_threads_do_not_mix_their_lines(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        list(in_parallel(lambda n: ledger.add(str(n), Answer("x" * 1000, 1, 1, True)), range(40), 8, threading.Event()))
    assert sorted(int(json.loads(line)["key"]) for line in open(tmp_path / "ledger")) == list(range(40))


# ---------------------------------------------------------------------------------------------
# Workers


def test_items_are_drawn_only_when_a_worker_is_free():
    drawn, gate = [], threading.Event()

    def items():
        for n in range(10):
            drawn.append(n)
            if n == 3:
                gate.set()
            yield n

    results = in_parallel(lambda n: gate.wait(5) and n, items(), 4, threading.Event())
    next(results)
    assert len(drawn) <= 5
    assert len(list(results)) == 9


def test_where_one_fails_for_good_no_other_begins_and_those_under_way_end():
    begun, ended, stop, both = [], [], threading.Event(), threading.Barrier(2, timeout=5)

    def work(n):
        begun.append(n)
        if n < 2:
            both.wait()
        if n == 0:
            raise InputError("no credit")
        stop.wait(5)
        ended.append(n)

    with pytest.raises(InputError, match="no credit"):
        list(in_parallel(work, range(10), 2, stop))
    assert stop.is_set() and sorted(ended) == [n for n in sorted(begun) if n] and len(begun) <= 3
