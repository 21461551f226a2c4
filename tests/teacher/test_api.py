"""The client and its ledger, against a server on this machine that misbehaves as servers do."""

import json
import threading

import pytest

from nanollava.teacher import ledger as ledger_module

from nanollava.infra.io import InputError
from nanollava.teacher.api import ATTEMPTS, Chat
from nanollava.teacher.jobs import in_parallel
from nanollava.teacher.ledger import Answer, Ledger, RequestError, guess_tokens

ASK = [{"role": "user", "content": "What is there?"}]


@pytest.fixture
def chat(server, monkeypatch):
    """A client that does not wait, but writes down how long it would have."""
    chat = Chat("toy", f"http://127.0.0.1:{server.server_port}/v1", timeout=0.3)
    chat.waited = []
    monkeypatch.setattr(chat.stop, "wait", lambda seconds: chat.waited.append(seconds))
    return chat


def test_an_answer_is_its_text_and_what_it_took(chat, server):
    assert chat(ASK) == Answer("A cat.", 10, 3, complete=True)
    assert server.heard[0]["messages"] == ASK and server.heard[0]["model"] == "toy"
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("mood", [
    "reset", "cut", "nonsense", "slow", "drips", (500, "oops"), (503, {"message": "busy"})])
def test_what_may_pass_is_asked_again_after_ever_longer_waits(chat, server, mood):
    server.moods = [mood] * 3
    assert chat(ASK).text == "A cat."
    assert len(server.heard) == 4
    for wait, least in zip(chat.waited, (1, 2, 4)):
        assert least < wait <= 1.5 * least  # by chance, lest all workers come back at once


def test_a_busy_server_is_waited_for_as_long_as_it_says(chat, server):
    server.moods = [(429, {"message": "slow down", "code": "rate_limit_exceeded"})]
    chat(ASK)
    assert 3 <= chat.waited[0] <= 4.5


def test_it_never_asks_forever(chat, server):
    server.moods = [(500, "oops")] * 100
    with pytest.raises(RequestError, match="500 oops .8 attempts"):
        chat(ASK)
    assert len(server.heard) == ATTEMPTS


@pytest.mark.parametrize("code, error, words", [
    (401, {"message": "Incorrect API key provided: sk-secret"}, r"Incorrect API key provided: \[hidden\]"),
    (404, {"message": "The model `gpt-9` does not exist", "code": "model_not_found"}, "gpt-9"),
    (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}, "quota"),
    (302, {}, "another address"),
])
def test_what_will_not_pass_stops_at_once_with_the_servers_words(chat, server, code, error, words):
    server.moods = [(code, error)]
    with pytest.raises(InputError, match=words) as caught:
        chat(ASK)
    assert len(server.heard) == 1 and "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("error", [{"message": "too long", "code": "context_length_exceeded"}, {"message": "too long"}])
def test_what_concerns_one_request_alone_does_not_stop_the_others(chat, server, error):
    server.moods = [(400, error)]
    with pytest.raises(RequestError, match="too long"):
        chat(ASK)
    assert len(server.heard) == 1


def test_models_that_want_other_options_get_them(chat, server):
    server.moods = [(400, {"message": f"{text}, please"}) for text in ("max_completion_tokens", "no temperature")]
    chat(ASK)
    assert [set(body) - {"model", "messages"} for body in server.heard] == [
        {"temperature", "max_tokens"}, {"temperature", "max_completion_tokens"}, {"max_completion_tokens"}]
    chat(ASK)
    assert "max_tokens" not in server.heard[-1]


def test_a_server_that_was_never_there_is_told_soon(monkeypatch):
    chat = Chat("toy", "http://127.0.0.1:9/v1?key=secret-in-address")
    monkeypatch.setattr(chat.stop, "wait", lambda seconds: None)
    with pytest.raises(InputError, match="cannot reach http://127.0.0.1:9/v1/chat/completions") as caught:
        chat(ASK)
    assert "secret-in-address" not in str(caught.value)


@pytest.mark.parametrize("odd", [
    {"choices": []}, {"choices": [{"message": {"content": ["a"]}}]}, {"choices": [{"message": None}]}, [], None])
def test_a_reply_without_an_answer_is_asked_again(chat, server, odd):
    server.moods = [(200, odd)]
    assert chat(ASK).text == "A cat."


def test_what_a_reply_does_not_say_is_guessed(chat, server):
    choices = [{"message": {"content": "A cat \ud83d sits."}}]
    server.moods = [(200, {"choices": choices, "usage": {"prompt_tokens": None}})]
    assert chat(ASK) == Answer("A cat ? sits.", 4, 5, complete=True)


@pytest.mark.parametrize("usage", [[1], "many", {"prompt_tokens": "many"}, {"prompt_tokens": -1000}, None])
def test_an_odd_account_of_tokens_costs_no_answer(chat, server, usage):
    server.moods = [(200, {"choices": [{"message": {"content": "A cat."}}], "usage": usage})]
    answer = chat(ASK)
    assert answer.text == "A cat." and answer.prompt_tokens > 0 and len(server.heard) == 1


def test_the_key_is_hidden_wherever_a_server_repeats_it(chat, server):
    server.moods = [(200, {"choices": [{"message": {"content": "You are sk-secret."}}]})]
    assert chat(ASK).text == "You are [hidden]."
    server.moods = [(401, "x" * 195 + " sk-secret")]
    with pytest.raises(InputError) as caught:
        chat(ASK)
    assert "sk-s" not in str(caught.value)


def test_an_error_with_status_200_is_told_in_the_servers_words(chat, server):
    server.moods = [(200, {"error": {"message": "top up first", "code": 402}})]
    with pytest.raises(InputError, match="top up first"):
        chat(ASK)


def test_numbers_are_many_tokens():
    assert guess_tokens("A gray cat sleeps.") == 5 and guess_tokens("[0.125, 0.5]") == 1 + 5 + 1 + 3 + 1


def test_an_answer_that_was_cut_off_says_so(chat, server):
    server.moods = ["too long"]
    assert not chat(ASK).complete


def test_a_key_is_needed_for_openai_alone(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="set OPENAI_API_KEY"):
        Chat("gpt-4")
    assert Chat("toy", "http://127.0.0.1:1").key == ""
    with pytest.raises(InputError, match="--base-url localhost:1 is no address"):
        Chat("toy", "localhost:1")


@pytest.mark.parametrize("key", ["sk-secret\u2019", "sk-\x07secret"])
def test_a_key_that_cannot_be_one_is_told_without_showing_it(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY has characters that no key has") as caught:
        Chat("gpt-4")
    assert "secret" not in str(caught.value)


def test_azure_has_a_header_of_its_own(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\n")
    for base, header in (("https://x.openai.azure.com/openai", {"api-key": "sk-secret"}),
                         ("https://api.openai.com/v1", {"Authorization": "Bearer sk-secret"})):
        request = type("Request", (), {"headers": {}})()
        assert Chat("toy", base).auth(request).headers == header


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


def test_looking_at_a_ledger_changes_nothing(tmp_path):
    Ledger(tmp_path / "none").load()
    with Ledger(tmp_path / "ledger") as written:
        written.add("key", Answer("a", 5, 2, True))
        with open(tmp_path / "ledger", "ab") as file:
            file.write(b'{"half')
        before = (tmp_path / "ledger").read_bytes()
        seen = Ledger(tmp_path / "ledger")
        seen.load()
        assert len(seen["key"]) == 1 and (tmp_path / "ledger").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["ledger"]


def test_a_line_that_is_no_answer_is_named(tmp_path):
    (tmp_path / "ledger").write_text('{"key": 1}\n')
    with pytest.raises(InputError, match="ledger, line 1 is not an answer"), Ledger(tmp_path / "ledger"):
        pass


def test_a_ledger_has_one_writer(tmp_path):
    with Ledger(tmp_path / "ledger"), pytest.raises(InputError, match="in use by another run"):
        with Ledger(tmp_path / "ledger"):
            pass


def test_an_answer_counts_when_it_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(ledger_module.os, "fsync", lambda file: synced.append((tmp_path / "ledger").read_text()))
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.add("key", Answer("b", 5, 2, True))
    assert '"key": "key"' in synced[-1] and '"key": "key"' not in synced[0]


def test_without_room_on_the_disk_nothing_is_bought(tmp_path, monkeypatch):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.add("key", Answer("b", 5, 2, True))
    monkeypatch.setattr(ledger_module.os, "fsync", lambda file: full())
    with pytest.raises(InputError, match="cannot write .*ledger: No space left"):
        Ledger(tmp_path / "ledger").__enter__()
    monkeypatch.undo()
    with Ledger(tmp_path / "ledger") as ledger:
        assert len(ledger["key"]) == 1


def full():
    raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path, monkeypatch):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.add("one", Answer("b", 5, 2, True))
        with monkeypatch.context() as patch, pytest.raises(InputError, match="cannot write .*No space left"):
            patch.setattr(ledger_module.os, "fsync", lambda file: full())
            ledger.add("two", Answer("c", 5, 2, True))
        ledger.add("three", Answer("d", 5, 2, True))
    with Ledger(tmp_path / "ledger") as ledger:
        assert list(ledger.lines) == ["one", "three"]


def test_an_answer_that_was_under_way_when_the_ledger_closed_is_kept(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.add("one", Answer("a", 5, 2, True))
    ledger.add("two", Answer("b", 5, 2, True))
    with Ledger(tmp_path / "ledger") as ledger:
        assert ledger["two"]


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
