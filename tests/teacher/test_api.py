"""The REST client against a server on this machine that has the faults of real ones."""

import gzip
import json
import threading

import pytest

from nanollava.infra import http
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


def text_part(text, kind="text"):
    return {"type": kind, kind: text}


def chunk(text=None, finish_reason=None, **more):
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice], "usage": None, **more}).encode() + b"\n\n"


STREAM = chunk("") + chunk("A ") + chunk("cat.") + chunk(finish_reason="stop")
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 3}}\n\n'


@pytest.mark.parametrize("body, complete", [
    (content([text_part("A "), text_part("cat.")]), True),
    (content([text_part([text_part("Hm.")], "thinking"), text_part("A cat.")]), True),
    (b"\xef\xbb\xbf" + json.dumps(content("A cat.")).encode(), True),
    (b"\n \n" + json.dumps(content("A cat."), indent=1).encode(), True),
    (b'{"choices": [{"message": {"content": "A cat."}}], "x": "\xff"}', True),
    (STREAM + USAGE + b"data: [DONE]\n\n", True),
    (STREAM, True),
    (STREAM.replace(b"\n", b"\r\n"), True),
    (b": keep-alive\n\nevent: message\n" + STREAM, True),
    (chunk("A cat.") + b"data: [DONE]\n\n", True),
    (chunk("A cat."), False),
    (chunk("A cat.", "length") + b"data: [DONE]\n\n", False),
])
def test_text_is_found_in_every_form_of_reply(chat, server, body, complete):
    server.faults = [(200, body)]
    answer = chat(MESSAGES)
    assert (answer.text, answer.complete, answer.raw) == ("A cat.", complete, "")
    assert len(server.requests) == 1


def test_token_counts_of_a_stream_are_read(chat, server):
    server.faults = [(200, STREAM + USAGE)]
    assert chat(MESSAGES) == Answer("A cat.", 10, 3, complete=True)


@pytest.mark.parametrize("reason, complete", [
    ("stop", True), ("eos", True), ("end_turn", True), (None, True), ("STOP", True),
    ("length", False), ("LENGTH", False), ("max_tokens", False), ("content_filter", False),
    ("abort", False), ("tool_calls", False), ("", False), (7, False), (["stop"], False),
])
def test_reply_is_complete_only_for_known_reasons(chat, server, reason, complete):
    choice = {"message": {"content": "A cat."}, "finish_reason": reason}
    server.faults = [(200, {"choices": [choice]})]
    assert chat(MESSAGES).complete is complete


@pytest.mark.parametrize("body", [
    {"choices": []}, {"choices": None}, {"choices": "A cat."}, {"choices": [{"message": None}]},
    {"choices": [{"text": "A cat."}]}, content(None), content(7), content(["A cat."]),
    content({"text": "A cat."}), content([{"type": "text"}]), content([text_part(None)]),
    {"content": [text_part("A cat.")], "usage": {"input_tokens": 3}},
    b'{"choices": [{"message": {"content": "A c', b'data: {"choices": [}\n\n',
    b'data: {"choices": [{"delta": []}]}\n\n', b'{"choices": ' + b"[" * 9999,
    {"choices": [], "usage": {"prompt_tokens": 10**400}},
])
def test_billed_reply_without_text_is_kept_as_it_came(chat, server, body):
    """It counts against the budget and the tries, and is not bought again and again."""
    server.faults = [(200, body)]
    answer = chat(MESSAGES)
    assert answer.text == "" and len(server.requests) == 1
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert answer.raw == sent.decode()
    assert 0 < answer.completion_tokens < 10**6 and 0 < answer.prompt_tokens < 10**6


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
    [], None, {}, {"detail": "no model is loaded"}, b"", b"<html>Sign in</html>", b"[" * 9999])
def test_reply_that_nobody_bills_is_retried(chat, server, body):
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
    sent = {**chat.options, "messages": MESSAGES}
    for problem in problems:
        assert chat.adapt(problem, sent) and chat.adapt(problem, sent)
    assert chat.options == {"max_completion_tokens": 2048}
    assert not chat.adapt("no temperature", {**chat.options, "messages": MESSAGES})


@pytest.mark.parametrize("status, problem", [
    (400, "System role not supported"), (500, "Jinja: System role not supported"),
    (400, "messages[0].role does not support 'system' with this model"),
    (400, "Conversation roles must alternate user/assistant/user/assistant/..."),
    (422, "Only user and assistant roles are supported!"),
])
def test_model_without_a_system_role_reads_its_text_before_the_first_message(
        chat, server, status, problem):
    server.faults = [(status, {"message": problem})]
    for _ in range(2):
        chat([{"role": "system", "content": "Be short."}, *MESSAGES])
    assert [body["messages"] for body in server.requests[1:]] == 2 * [
        [{"role": "user", "content": "Be short.\n\nWhat is there?"}]]
    assert len(server.requests) == 3
    assert chat(MESSAGES).text == "A cat."  # has no system text


@pytest.mark.parametrize("status, error", [
    (400, {"message": "the request is too long", "code": "context_length_exceeded"}),
    (400, {"message": "This model's maximum context length is 2048 tokens. However, you requested "
                      "2500 tokens (452 in the messages, 2048 in the completion)."}),
    (400, {"message": "max_tokens is too large: 2048. This model supports at most 1024."}),
    (400, {"message": "no", "type": "exceed_context_size_error"}),
    (422, "max_new_tokens must be at most 1024"),
    (413, {"message": "prompt is too long"}),
])
def test_request_that_is_too_long_names_the_flag_that_helps(chat, server, status, error):
    server.faults = [(status, error)]
    with pytest.raises(RequestError, match="--max-reply-tokens"):
        chat(MESSAGES)
    assert len(server.requests) == 1


def test_length_of_the_reply_is_a_setting(server):
    address = f"http://127.0.0.1:{server.server_port}"
    Chat("toy", address, max_reply_tokens=99)(MESSAGES)
    assert server.requests[0]["max_tokens"] == 99


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


@pytest.mark.parametrize("message", [
    "no sk-secret", "no pass%40word", "no pass@word", "no letmein", "see ?key=letmein",
    "ask http://someone:other@host/v1"])
def test_secrets_of_the_address_are_hidden(server, message):
    address = f"http://user:pass%40word@127.0.0.1:{server.server_port}/v1?key=letmein"
    server.faults = [(401, {"message": message})]
    with pytest.raises(InputError) as caught:
        Chat("toy", address)(MESSAGES)
    for secret in ("sk-secret", "pass", "letmein", "someone"):
        assert secret not in str(caught.value)


def test_short_key_of_a_local_server_is_no_secret(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "cat")
    assert Chat("toy", f"http://me:dogs@127.0.0.1:{server.server_port}")(MESSAGES).text == "A cat."


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", None])
def test_endless_or_compressed_body_is_not_read_to_the_end(chat, server, monkeypatch, encoding):
    monkeypatch.setattr(http, "MAX_BODY", 1 << 20)
    body = json.dumps(content("a" * (3 << 20))).encode()
    for _ in (encoding or "").split():
        body = gzip.compress(body)
    server.faults = [(200, body)]
    server.more_headers = {"Content-Encoding": encoding} if encoding else {}
    with pytest.raises(InputError, match="/v1/chat/completions sends more than 1 MB"):
        chat(MESSAGES)
    assert len(server.requests) == 1


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


@pytest.mark.parametrize("base_url", [
    "localhost:1", "ftp://host", "http://", "http://[::1", "http://host:0", "http://host:99999",
    "http//me:letmein@host", "me:letmein@host", ""])
def test_base_url_must_be_an_address(base_url):
    with pytest.raises(InputError, match="--base-url is not the address of a server") as caught:
        Chat("toy", base_url)
    assert "letmein" not in str(caught.value)
