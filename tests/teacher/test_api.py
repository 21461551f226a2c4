"""The REST client against a server on this machine that has the faults of real ones."""

import threading

import pytest

from nanollava.infra.io import InputError
from nanollava.teacher.api import ATTEMPTS, FIRST_ATTEMPTS, Chat
from nanollava.teacher.ledger import Answer, RequestError

MESSAGES = [{"role": "user", "content": "What is there?"}]


@pytest.fixture
def chat(server, monkeypatch):
    """A client that records its delays in `delays` instead of waiting."""
    chat = Chat("toy", f"http://127.0.0.1:{server.server_port}/v1", timeout=0.3)
    chat.delays = []
    monkeypatch.setattr(chat.stop, "wait", lambda seconds: chat.delays.append(seconds))
    return chat


def content(text):
    return {"choices": [{"message": {"content": text}}]}


# ---------------------------------------------------------------------------------------------
# Answers


def test_answer_has_text_and_token_counts(chat, server):
    assert chat(MESSAGES) == Answer("A cat.", 10, 3, complete=True)
    assert server.requests[0] == {"model": "toy", "messages": MESSAGES, "temperature": 1.0,
                                  "max_tokens": 2048}
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


def test_answer_cut_off_by_a_limit_is_incomplete(chat, server):
    server.faults = ["length limit"]
    assert not chat(MESSAGES).complete


def test_missing_token_counts_are_estimated(chat, server):
    server.faults = [(200, {**content("A cat \ud83d sits."), "usage": {"prompt_tokens": None}})]
    assert chat(MESSAGES) == Answer("A cat ? sits.", 4, 5, complete=True)


@pytest.mark.parametrize(
    "usage", [[1], "many", {"prompt_tokens": "many"}, {"prompt_tokens": -1000}, None])
def test_malformed_usage_does_not_lose_the_answer(chat, server, usage):
    server.faults = [(200, {**content("A cat."), "usage": usage})]
    answer = chat(MESSAGES)
    assert answer.text == "A cat." and answer.prompt_tokens > 0 and len(server.requests) == 1


# ---------------------------------------------------------------------------------------------
# Retries


@pytest.mark.parametrize("fault", [
    "reset", "cut", "not JSON", "slow", "drip", (500, "oops"), (503, {"message": "busy"}),
    (408, {"message": "timeout"})])
def test_temporary_fault_is_retried_with_growing_delays(chat, server, fault):
    server.faults = [fault] * 3
    assert chat(MESSAGES).text == "A cat."
    assert len(server.requests) == 4
    for delay, least in zip(chat.delays, (1, 2, 4), strict=True):
        assert least < delay <= 1.5 * least


@pytest.mark.parametrize("body", [
    {"choices": []}, content(["a"]), {"choices": [{"message": None}]}, [], None])
def test_reply_without_an_answer_is_retried(chat, server, body):
    server.faults = [(200, body)]
    assert chat(MESSAGES).text == "A cat." and len(server.requests) == 2


def test_retry_after_is_respected(chat, server):
    server.faults = [(429, {"message": "slow down", "code": "rate_limit_exceeded"})]
    chat(MESSAGES)
    assert 3 <= chat.delays[0] <= 4.5


def test_attempts_are_limited(chat, server):
    server.faults = [(500, "oops")] * 100
    with pytest.raises(RequestError, match="500 oops .8 attempts"):
        chat(MESSAGES)
    assert len(server.requests) == ATTEMPTS


def test_stop_ends_the_retries(server):
    chat = Chat("toy", f"http://127.0.0.1:{server.server_port}/v1")
    server.faults = [(500, "oops")] * 100
    threading.Timer(0.2, chat.stop.set).start()
    with pytest.raises(RequestError, match="stopped"):
        chat(MESSAGES)
    assert len(server.requests) == 1


# ---------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("status, error, message", [
    (401, {"message": "Incorrect API key provided: sk-secret"},
     r"Incorrect API key provided: \[hidden\]"),
    (404, {"message": "The model `gpt-9` does not exist", "code": "model_not_found"}, "gpt-9"),
    (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}, "quota"),
    (302, {}, "redirects to another address"),
])
def test_fatal_error_is_not_retried(chat, server, status, error, message):
    server.faults = [(status, error)]
    with pytest.raises(InputError, match=message) as caught:
        chat(MESSAGES)
    assert len(server.requests) == 1 and "sk-secret" not in str(caught.value)


def test_fatal_error_with_status_200_is_reported(chat, server):
    server.faults = [(200, {"error": {"message": "top up first", "code": 402}})]
    with pytest.raises(InputError, match="top up first"):
        chat(MESSAGES)


@pytest.mark.parametrize("error", [
    {"message": "too long", "code": "context_length_exceeded"}, {"message": "too long"}])
def test_error_of_one_request_is_not_fatal(chat, server, error):
    server.faults = [(400, error)]
    with pytest.raises(RequestError, match="too long"):
        chat(MESSAGES)
    assert len(server.requests) == 1


def test_options_that_a_model_rejects_are_changed(chat, server):
    server.faults = [(400, {"message": "use max_completion_tokens"}),
                     (400, {"message": "unsupported value: temperature"})]
    chat(MESSAGES)
    assert [set(body) - {"model", "messages"} for body in server.requests] == [
        {"temperature", "max_tokens"}, {"temperature", "max_completion_tokens"},
        {"max_completion_tokens"}]
    assert server.requests[-1]["max_completion_tokens"] == 2048
    chat(MESSAGES)
    assert "max_tokens" not in server.requests[-1]


@pytest.mark.parametrize("problems", [
    ("use max_completion_tokens", "no temperature"),
    ("no temperature", "use max_completion_tokens")])
def test_options_rejected_for_two_requests_in_flight_fail_neither(chat, problems):
    """The second rejection arrives when the first has already changed the options."""
    sent = chat.options
    for problem in problems:
        assert chat.adapt_options(problem, sent) and chat.adapt_options(problem, sent)
    assert chat.options == {"max_completion_tokens": 2048}
    assert not chat.adapt_options("no temperature", chat.options)


def test_unreachable_server_is_reported_soon(monkeypatch):
    chat = Chat("toy", "http://user:password@127.0.0.1:9/v1?key=secret-in-address")
    delays = []
    monkeypatch.setattr(chat.stop, "wait", lambda seconds: delays.append(seconds))
    address = "http://127.0.0.1:9/v1/chat/completions"
    with pytest.raises(InputError, match=f"cannot reach {address}") as caught:
        chat(MESSAGES)
    assert len(delays) == FIRST_ATTEMPTS - 1
    assert "secret-in-address" not in str(caught.value) and "password" not in str(caught.value)


def test_server_that_goes_away_is_waited_for(chat):
    chat(MESSAGES)
    chat.url = "http://127.0.0.1:9/v1/chat/completions"
    with pytest.raises(RequestError, match="ConnectionError"):
        chat(MESSAGES)
    assert len(chat.delays) == ATTEMPTS - 1


# ---------------------------------------------------------------------------------------------
# Keys and addresses


def test_key_is_hidden_wherever_a_server_repeats_it(chat, server):
    server.faults = [(200, content("You are sk-secret."))]
    assert chat(MESSAGES).text == "You are [hidden]."
    server.faults = [(401, "x" * 195 + " sk-secret")]  # before a long message is shortened
    with pytest.raises(InputError) as caught:
        chat(MESSAGES)
    assert "sk-s" not in str(caught.value)


def test_key_is_required_for_openai_alone(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        Chat("gpt-4")
    assert Chat("toy", "http://127.0.0.1:1").key == ""


@pytest.mark.parametrize("key", ["sk-secret\u2019", "sk-\x07secret"])
def test_malformed_key_is_refused_without_showing_it(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
        Chat("gpt-4")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("base_url, header", [
    ("https://x.openai.azure.com/openai", {"api-key": "sk-secret"}),
    ("https://api.openai.com/v1", {"Authorization": "Bearer sk-secret"}),
])
def test_azure_takes_the_key_in_its_own_header(monkeypatch, base_url, header):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\n")
    request = type("Request", (), {"headers": {}})()
    assert Chat("toy", base_url).auth(request).headers == header


@pytest.mark.parametrize("base_url, url", [
    ("http://host/v1", "http://host/v1/chat/completions"),
    ("http://host/v1/", "http://host/v1/chat/completions"),
    ("http://host/v1/chat/completions", "http://host/v1/chat/completions"),
    ("https://x.openai.azure.com/openai/deployments/d?api-version=1",
     "https://x.openai.azure.com/openai/deployments/d/chat/completions?api-version=1"),
])
def test_path_is_added_to_the_base_url(base_url, url):
    assert Chat("toy", base_url).url == url


@pytest.mark.parametrize("base_url", ["localhost:1", "ftp://host", "http://", "http://[::1"])
def test_base_url_must_be_an_address(base_url):
    with pytest.raises(InputError, match="is not the address of a server"):
        Chat("toy", base_url)
