"""The endpoint over HTTP: what it answers, and what hostile or broken clients get from it."""

import base64
import gc
import io
import json
import socket
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanollava.chat import TooLongError, stream_reply
from nanollava.image import open_image, preprocess
from nanollava.serve import handler
from nanollava.serve.openai import RequestError
from nanollava.serve.replies import Replies
from nanollava.serve.server import Handler, Server

GOLDEN = Path(__file__).parents[1] / "golden"
PHOTO = GOLDEN / "images" / "flat.png"
CHAT = "/v1/chat/completions"


class Client:
    """Sends bytes to a server, and reads what it answers."""

    def __init__(self, server):
        self.socket = socket.create_connection(server.server_address, timeout=20)

    def send(self, data: bytes) -> "Client":
        try:
            self.socket.sendall(data)
        except OSError:  # the server has answered and closed
            pass
        return self

    def read_until(self, words: bytes) -> bytes:
        data = b""
        while words not in data:
            block = self.socket.recv(2**16)
            assert block, data
            data += block
        return data

    def read(self) -> tuple[int, dict, bytes]:
        """(status, headers, body) of the answer, up to its end."""
        data = b""
        while block := self.socket.recv(2**16):
            data += block
        self.close()
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        assert first.startswith("HTTP/1.1 "), first
        return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body

    def error(self) -> tuple[int, str]:
        """(status, code or type) of an answer that must be an error in OpenAI's form."""
        status, headers, body = self.read()
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        assert headers["Content-Type"] == "application/json" and headers["Connection"] == "close"
        return status, error["code"] or error["type"]

    def close(self) -> None:
        self.socket.close()


def request(path=CHAT, body=b"", method="POST", **headers) -> bytes:
    """A request as bytes. A header None is left out."""
    headers = {"Host": "localhost", "Content_Length": len(body)} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()
             if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


def chat(content, **settings) -> bytes:
    """The request of a chat with one question, or with these messages."""
    if isinstance(content, str) or "type" in content[0]:
        content = [{"role": "user", "content": content}]
    return request(body=json.dumps({"messages": content, "max_tokens": 8} | settings).encode())


def image_part(file: bytes) -> dict:
    url = f"data:image/png;base64,{base64.b64encode(file).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def wait_until(condition) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def speak(model, tokenizer, text: str, forever=False) -> None:
    """Make a model say this text, whose tokens all differ, to every question; or repeat it.

    Its blocks add nothing, and the output of each token is the one that follows it.
    """
    tokens = [tokenizer.encode(" ASSISTANT:")[-1], *tokenizer.encode(text)]
    tokens.append(tokens[1] if forever else tokenizer.eos_id)
    assert forever or len({*tokens}) == len(tokens)
    language_model = model.language_model
    with torch.no_grad():
        for block in language_model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        language_model.lm_head.weight.zero_()
        embeds = language_model.model.embed_tokens.weight
        for token, following in zip(tokens, tokens[1:]):
            language_model.lm_head.weight[following] += embeds[token]


@pytest.fixture
def start(model, tokenizer):
    """start(key="", max_waiting=4) -> a running server of the tiny model."""
    servers = []

    def run(key="", max_waiting=4, host="127.0.0.1"):
        server = Server((host, 0), Replies(model, tokenizer, "tiny", 2**24), key, max_waiting)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield run
    for server in servers:
        server.shutdown()
        server.close()


@pytest.fixture
def server(start):
    """A server, which must still be as good as new after the test."""
    server = start()
    yield server
    wait_until(lambda: not server.num_connections)
    assert Client(server).send(chat("What is it?", max_tokens=1)).read()[0] == 200
    wait_until(lambda: not server.num_connections)
    assert server.queue._value == 5  # all places are free
    wait_until(lambda: not any(
        isinstance(thread, threading.Timer) or "process_request_thread" in thread.name
        for thread in threading.enumerate()))


class Gate:
    """Stands in for the model: yields pieces, each after `more` was released."""

    def __init__(self, server):
        self.server, self.reply = server, server.replies.reply
        self.requests, self.more, self.ended = [], threading.Semaphore(0), threading.Event()
        server.replies.reply = self.pieces

    def pieces(self, request):
        self.requests.append(request)
        try:
            while self.more.acquire(timeout=60):
                yield "piece "
        finally:
            self.ended.set()

    def leave(self, client: Client, under_way=True) -> None:
        """Close a connection, wait until the server notices, and see the reply end."""
        before = self.server.num_connections
        client.close()
        wait_until(lambda: self.server.num_connections < before)
        if under_way:  # another connection may have closed: pieces follow until the reply ends
            wait_until(lambda: self.more.release() or self.ended.wait(0.2))
            self.ended.clear()
            while self.more.acquire(blocking=False):
                pass


@pytest.fixture
def gate(server):
    gate = Gate(server)
    yield gate
    server.replies.reply = gate.reply


# ---------------------------------------------------------------------------------------------
# Answers


def whole(server, data: bytes) -> dict:
    status, headers, body = Client(server).send(data).read()
    assert status == 200 and int(headers["Content-Length"]) == len(body)
    return json.loads(body)


def events(server, data: bytes) -> list[dict]:
    """The events of a stream, which must be complete."""
    status, headers, body = Client(server).send(data).read()
    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    *lines, done, end = body.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


@pytest.fixture
def expected(model, tokenizer):
    """The reply to "What is it?" about the photo, made without a server."""
    pixels = preprocess(open_image(PHOTO), model.config.image_size)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}]
    return "".join(stream_reply(model, tokenizer, turns, [pixels], max_new_tokens=8))


QUESTION = [image_part(PHOTO.read_bytes()), {"type": "text", "text": "What is it?"}]


def test_reply_is_the_models(server, expected):
    answer = whole(server, chat(QUESTION))
    assert text_of(answer) == expected and answer["model"] == "tiny"
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"


def test_pieces_of_a_stream_make_the_same_reply(server, expected):
    first, *chunks, last, usage = events(
        server, chat(QUESTION, stream=True, stream_options={"include_usage": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
    assert "".join(pieces) == expected and len(pieces) > 2
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None,
                                  "finish_reason": "length"}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 8


def test_stream_tells_usage_only_if_asked(server):
    assert all(event["choices"] for event in events(server, chat("What?", stream=True)))


def test_piece_is_sent_when_it_is_there(server, gate):
    client = Client(server).send(chat("What?", stream=True))
    for _ in range(3):
        gate.more.release()
        client.read_until(b"piece")
    gate.leave(client)


def test_requests_of_openais_client_are_answered(server):
    plain, streamed = json.loads((GOLDEN / "openai.json").read_text())["requests"]
    data = [request(**recorded | {"body": json.dumps(recorded["body"]).encode()},
                    **recorded.pop("headers")) for recorded in (plain, streamed)]
    answer, chunks = whole(server, data[0]), events(server, data[1])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == text_of(answer)


def test_stop_ends_the_reply(server, model, tokenizer):
    speak(model, tokenizer, "A cat.")
    answer = whole(server, chat("What?"))
    assert (text_of(answer), answer["choices"][0]["finish_reason"]) == ("A cat.", "stop")
    answer = whole(server, chat("What?", stop=["x", "a"]))
    assert (text_of(answer), answer["choices"][0]["finish_reason"]) == ("A c", "stop")


def test_seed_repeats_a_random_reply(server):
    one, two, other = (text_of(whole(server, chat("What?", temperature=2, seed=seed)))
                       for seed in (1, 1, 2))
    assert one == two != other


def test_without_seed_replies_differ(server):
    replies = {text_of(whole(server, chat("What?", temperature=2))) for _ in range(3)}
    assert len(replies) == 3


def test_next_turn_reads_what_is_kept_of_the_turns_before(server, model, tokenizer):
    speak(model, tokenizer, "A cat.")
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."},
                {"role": "user", "content": "Which?"}]
    before = whole(server, chat(messages[:1]))["usage"]
    after = whole(server, chat(messages))["usage"]
    assert after["prompt_tokens_details"]["cached_tokens"] >= before["prompt_tokens"]


def test_models_and_health(server):
    (entry,) = whole(server, request("/v1/models", method="GET"))["data"]
    assert (entry["id"], entry["object"]) == ("tiny", "model")
    assert whole(server, request("/health?from=monitor", method="GET")) == {"status": "ok"}


def test_patch_words_have_the_side_of_the_grid(server):
    body = json.dumps({"image": QUESTION[0]["image_url"]["url"]}).encode()
    words = whole(server, request("/patch_words", body))
    assert words["side"] == 4 and len(words["words"]) == 16 and -1 <= words["near"] <= 1
    assert words["padded"] is False


# ---------------------------------------------------------------------------------------------
# Requests that cannot be answered


@pytest.mark.parametrize("content", [{}, {"image": 7}, {"image": "http://x"}, {"image": None}])
def test_patch_words_need_an_image(server, content):
    data = request("/patch_words", json.dumps(content).encode())
    assert Client(server).send(data).error()[0] == 400


def png(width, height) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("file", [
    b"", b"no image", PHOTO.read_bytes()[:300], b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", png(2000, 10)],
    ids=lambda file: repr(file[:12]))
def test_file_that_is_no_image_is_refused(server, file):
    data = chat([image_part(file), *QUESTION])
    assert Client(server).send(data).error() == (400, "image_parse_error")


def test_image_of_too_many_pixels_is_refused(server, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = chat([image_part(png(50, 50)), *QUESTION])
    assert Client(server).send(data).error() == (400, "image_parse_error")


@pytest.mark.parametrize("content", ["cat " * 3000, "a" * 10**6, [image_part(b"no image")] * 128],
                         ids=["tokens", "characters", "images"])
def test_prompt_beyond_the_context_is_refused(server, content):
    assert Client(server).send(chat(content)).error() == (400, "context_length_exceeded")


def test_text_that_cannot_fit_is_not_tokenized(server, monkeypatch):
    monkeypatch.setattr("nanollava.serve.replies.stream_reply", None)
    assert Client(server).send(chat("a" * 10**6)).error() == (400, "context_length_exceeded")


def test_prompt_that_fills_the_context_gets_the_tokens_that_remain(server, model, tokenizer):
    speak(model, tokenizer, "A cat.", forever=True)
    model.config.text.max_position_embeddings = 40
    usage = whole(server, chat("What?", max_tokens=2**31 - 1))["usage"]
    assert usage["total_tokens"] == 40


@pytest.mark.parametrize("data, status", [
    (request(body=b"{"), 400),
    (request(body=b"[" * 10**5), 400),
    (request(body=b""), 400),
    (request("/", method="PUT"), 501),
    (request("/v1/models", method="OPTIONS", Origin="http://evil.example"), 501),
    (request("/", method="BREW"), 501),
    (request("/v1/models", method="POST"), 405),
    (request(CHAT, method="GET"), 405),
    (request("/v1/embeddings"), 404),
    (request("/../../etc/passwd", method="GET"), 404),
    (request("http://localhost/health", method="GET"), 404),
    (request("/" + "a" * 70_000, method="GET"), 414),
    (request("/health", method="GET", **{f"X-{number}": "a" for number in range(1000)}), 431),
    (request("/health", method="GET", X="a" * 70_000), 431),
    (b"GET /health HTTP/1.1\r\n\r\n", 400),
    (b"GET /health HTTP/2.0\r\n\r\n", 505),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", 400),
    (b"GET /health HTTP/one\r\n\r\n", 400),
    (b"POST\r\n\r\n", 400),
    (b"SSH-2.0-OpenSSH_9.0\r\n", 400),
], ids=lambda value: repr(value)[:60])
def test_malformed_request_gets_its_status(server, data, status):
    assert Client(server).send(data).error()[0] == status


@pytest.mark.parametrize("lines, status, words", [
    ("X: y", 411, "send the body with its Content-Length"),
    ("Transfer-Encoding: chunked", 411, "send the body with its Content-Length"),
    ("Content-Length: 2\r\nTransfer-Encoding: chunked", 411, "send the body"),
    ("Content-Length: 2\r\nContent-Length: 2", 400, "must be one number"),
    ("Content-Length: 2\r\nContent-Length: 3", 400, "must be one number"),
    *((f"Content-Length: {value}", 400, "must be one number")
      for value in ("+2", "-2", "0x2", "2, 2", "two", "", "2.0", "\xb2", "2\r\n 3")),
    ("Content-Length : 2", 400, "the headers are malformed"),
    ("no header\r\nContent-Length: 2", 400, "the headers are malformed"),
    ("Content-Length: 100000000", 413, "more than 32 MiB"),
    (f"Content-Length: {'9' * 5000}", 413, "more than 32 MiB"),
    ("Content-Length: 3", 400, "shorter than its Content-Length"),
])
def test_length_must_be_plain(server, lines, status, words):
    client = Client(server).send(
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n\r\n{{}}".encode("latin-1"))
    client.socket.shutdown(socket.SHUT_WR)
    answer, _, body = client.read()
    assert answer == status and words in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("data", [b"", b"\r\n", b"GET", b"GET /health HTTP/1.1\r\nHost: loc",
                                  request(body=b"{}", Content_Length=100),
                                  b"GET /health\r\n\r\n"])
def test_request_that_breaks_off_harms_nothing(server, data):
    Client(server).send(data).close()
    client = Client(server).send(data)
    client.socket.shutdown(socket.SHUT_WR)
    while client.socket.recv(2**16):
        pass
    client.close()


def test_client_can_send_all_of_a_body_that_is_refused(server, monkeypatch):
    """A connection that is closed with unread bytes may lose the answer."""
    monkeypatch.setattr(handler, "MAX_BODY", 1000)
    client = Client(server)
    client.socket.sendall(request(body=b"a" * 10**7))
    assert client.error()[0] == 413


def test_second_request_on_a_connection_is_dropped(server, gate):
    """The first one is answered, and its client is seen to leave."""
    client = Client(server).send(chat("What?"))
    wait_until(lambda: gate.requests)
    gate.leave(client.send(chat("Which?")))
    assert len(gate.requests) == 1


def test_client_can_send_more_than_its_request(server):
    client = Client(server)
    client.socket.sendall(chat("What?") + b"a" * 10**7)
    assert client.read()[0] == 200


def test_head_has_no_body(server):
    status, _, body = Client(server).send(request("/health", method="HEAD")).read()
    assert (status, body) == (501, b"")


@pytest.mark.parametrize("begin", [
    b"", b"GET /health HTTP/1.1\r\n", request(body=b"", Content_Length=1000)],
    ids=["line", "headers", "body"])
def test_request_that_drips_ends_in_time(server, monkeypatch, begin):
    monkeypatch.setattr(handler, "READ_SECONDS", 0.2)
    client = Client(server).send(begin)
    client.socket.settimeout(0.05)
    for _ in range(400):
        client.send(b"a")
        try:
            data = client.socket.recv(2**16)
            break
        except TimeoutError:
            continue
    client.close()
    status = data.split()[1]
    assert status == b"408" or status == b"400" and not begin  # half a line is no request


def test_reply_may_take_longer_than_its_request_may(server, gate, monkeypatch):
    monkeypatch.setattr(handler, "READ_SECONDS", 0.2)
    client = Client(server).send(chat("What?", stream=True))
    wait_until(lambda: gate.requests)
    time.sleep(0.25)
    gate.more.release()
    client.read_until(b"piece")
    gate.leave(client)


def test_client_that_does_not_close_is_closed(server, monkeypatch):
    monkeypatch.setattr(handler, "DRAIN_SECONDS", 0.05)
    client = Client(server).send(chat("What?"))
    wait_until(lambda: server.num_connections == 1)
    wait_until(lambda: server.num_connections == 0)
    client.close()


def test_bug_is_an_error_of_the_server(server, monkeypatch, capsys):
    monkeypatch.setattr(Handler, "get_health", lambda self: 1 / 0)
    assert Client(server).send(request("/health", method="GET")).error() == (500, "server_error")
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_error_of_the_model_is_an_error_of_the_server(server, model, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", None)
        for stream in (False, True):
            data = chat("What?", stream=stream)
            assert Client(server).send(data).error() == (500, "server_error")
    assert "TypeError" in capsys.readouterr().err


def test_error_in_a_stream_is_its_last_event(server, gate, monkeypatch, capsys):
    def fail_late(request):
        yield "piece "
        raise ValueError("no")

    server.replies.reply = fail_late
    status, _, body = Client(server).send(chat("What?", stream=True)).read()
    *_, last, end = body.decode().split("\n\n")
    assert (status, end) == (200, "") and '"content": "piece "' in body.decode()
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in body.decode()


def test_request_that_failed_is_forgotten_at_once(server, monkeypatch):
    """A cycle of references would keep its body until Python looks for cycles."""
    requests = []

    def fail(request):
        requests.append(weakref.ref(request))
        raise TooLongError("no")
        yield

    monkeypatch.setattr(server.replies, "reply", fail)
    gc.disable()
    try:
        assert Client(server).send(chat("What?")).error()[0] == 400
        wait_until(lambda: not server.num_connections)
        monkeypatch.undo()
        whole(server, chat("What?"))  # the engine has another job
        wait_until(lambda: requests[0]() is None)
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------
# Who may ask


@pytest.mark.parametrize("host, origin, status", [
    ("127.0.0.1:{}", None, 200), ("localhost:{}", None, 200), ("localhost", None, 200),
    ("LOCALHOST:{}", "http://localhost:{}", 200), ("127.0.0.1:{}", "http://127.0.0.1:{}", 200),
    ("[::1]:{}", None, 200), ("127.9.9.9", None, 200),
    ("evil.example", None, 403), ("evil.example:{}", "http://evil.example:{}", 403),
    ("127.0.0.1.evil.example", None, 403), ("localhost.evil.example", None, 403),
    ("10.0.0.1", None, 403), ("0.0.0.0:{}", None, 403), ("[::", None, 403), ("", None, 403),
    ("localhost:{}", "null", 403), ("localhost:{}", "", 403),
    ("localhost:{}", "http://evil.example", 403), ("localhost:{}", "http://localhost:1", 403),
    ("localhost:{}", "http://localhost:{}.evil.example", 403),
    ("localhost:{}", "http://127.0.0.1:{}", 403), ("localhost:{}", "file://", 403),
    (None, None, 400), ("localhost\r\nHost: localhost", None, 400),
])
def test_page_of_another_site_cannot_ask(server, host, origin, status):
    host, origin = (value and value.format(server.server_address[1]) for value in (host, origin))
    for path in ("/health", "/v1/models"):
        data = request(path, method="GET", Host=host, Origin=origin)
        client = Client(server).send(data)
        assert (client.read() if status == 200 else client.error())[0] == status


@pytest.mark.parametrize("sent", [
    None, "", "Bearer", "Bearer ", "Bearer wrong", "sk-right", "Basic sk-right", "Bearer sk-righ",
    "Bearer sk-right2", "Bearer SK-RIGHT", "Bearer \xe9", "Bearer sk-right, Bearer x"])
def test_wrong_key_is_refused(start, sent):
    server = start(key="sk-right")
    for data in (request("/v1/models", method="GET", Authorization=sent),
                 request("/unknown", method="GET", Authorization=sent),
                 request(body=b"{", Authorization=sent),
                 request("/patch_words", body=b"{", Authorization=sent)):
        assert Client(server).send(data).error() == (401, "invalid_api_key")


def test_right_key_is_accepted(start):
    server = start(key="sk-right")
    data = request("/v1/models", method="GET", Authorization="Bearer sk-right")
    assert Client(server).send(data).read()[0] == 200
    assert Client(server).send(request("/health", method="GET")).read()[0] == 200


def test_server_for_other_machines_has_any_name(start):
    server = start(key="sk-right", host="0.0.0.0")
    data = request("/v1/models", method="GET", Host="my-machine:8000",
                   Origin="http://my-machine:8000", Authorization="Bearer sk-right")
    assert Client(server).send(data).read()[0] == 200


def test_log_has_neither_keys_nor_prompts_nor_queries(start, capsys):
    server = start(key="sk-right")
    secret = {"Authorization": "Bearer sk-right"}
    messages = b'{"messages": [{"role": "user", "content": "my prompt"}], "max_tokens": 2}'
    for data in (request(body=messages, **secret), request(body=messages[:-1], **secret),
                 request(CHAT + "?api_key=sk-right", messages, **secret),
                 request("/my-prompt", **secret), request(body=messages, Authorization="sk-wrong"),
                 b"my prompt\r\n\r\n", request("/", method="my-prompt")):
        Client(server).send(data).read()
    wait_until(lambda: not server.num_connections)
    log = capsys.readouterr().err
    assert log.count("\n") == 7 and "POST /v1/chat/completions  200" in log
    assert not any(secret in log for secret in ("sk-", "prompt ", "my-", "api_key"))


# ---------------------------------------------------------------------------------------------
# Many clients, and clients that leave


def test_requests_are_answered_in_the_order_of_arrival(server, gate):
    clients = []
    for number in range(5):
        clients.append(Client(server).send(chat(f"Question {number}", stream=True)))
        wait_until(lambda: len(gate.requests) + server.engine.jobs.qsize() == number + 1)
    for number, client in enumerate(clients):
        gate.more.release()
        client.read_until(b"piece")
        assert [request.turns[0]["value"] for request in gate.requests] == [
            f"Question {earlier}" for earlier in range(number + 1)]
        gate.leave(client)


def test_request_beyond_the_queue_is_refused_at_once(server, gate):
    first = Client(server).send(chat("What?"))
    wait_until(lambda: gate.requests)
    waiting = [Client(server).send(chat("What?")) for _ in range(4)]
    wait_until(lambda: server.engine.jobs.qsize() == 4)
    refused = Client(server).send(chat("What?"))
    status, headers, body = refused.read()
    assert status == 429 and int(headers["Retry-After"]) >= 1
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    assert whole(server, request("/health", method="GET")) == {"status": "ok"}
    wait_until(lambda: server.num_connections == 5)  # those two connections are closed
    for client in waiting:
        gate.leave(client, under_way=False)
    gate.leave(first)


def test_fifty_clients_at_once_are_answered(start):
    server, answers = start(max_waiting=100), []

    def ask(number):
        answers.append(Client(server).send(chat(f"Question {number}", max_tokens=2)).read()[0])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 50
    wait_until(lambda: not server.num_connections)


def test_bodies_are_parsed_one_at_a_time(server, monkeypatch):
    """A body of JSON may need thirty times its memory."""
    running, most = [], []

    def parse(body):
        running.append(body)
        most.append(len(running))
        time.sleep(0.01)
        running.remove(body)
        raise RequestError(418, "no")

    monkeypatch.setattr("nanollava.serve.server.parse_body", parse)
    clients = [Client(server).send(chat("What?")) for _ in range(5)]
    assert [client.error()[0] for client in clients] == [418] * 5
    assert most == [1] * 5
    monkeypatch.undo()


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_ends_its_computation_within_a_token(server, gate, stream):
    client = Client(server).send(chat("What?", stream=stream))
    wait_until(lambda: gate.requests)
    gate.more.release(3)
    if stream:
        client.socket.recv(100)
    wait_until(lambda: gate.more._value == 0)
    gate.leave(client)


def test_client_that_leaves_while_it_waits_is_not_answered(server, gate):
    first = Client(server).send(chat("first"))
    wait_until(lambda: gate.requests)
    waiting = Client(server).send(chat("waiting"))
    wait_until(lambda: server.engine.jobs.qsize() == 1)
    gate.leave(waiting, under_way=False)
    gate.leave(first)
    last = Client(server).send(chat("last"))
    wait_until(lambda: len(gate.requests) == 2)
    gate.leave(last)
    assert [request.turns[0]["value"] for request in gate.requests] == ["first", "last"]


def test_client_that_does_not_read_delays_nobody_and_is_left(server, gate, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.2)
    monkeypatch.setattr(handler, "DRAIN_SECONDS", 0.1)

    def long_reply(request):
        try:
            while True:
                yield "a" * 10**6
        finally:
            gate.ended.set()

    server.replies.reply = long_reply
    client = Client(server).send(chat("What?", stream=True))
    assert gate.ended.wait(20)
    wait_until(lambda: not server.num_connections)
    client.close()


def test_connections_beyond_the_limit_are_closed(server, monkeypatch):
    monkeypatch.setattr("nanollava.serve.server.MAX_CONNECTIONS", 3)
    clients = [Client(server) for _ in range(3)]
    wait_until(lambda: server.num_connections == 3)
    refused = Client(server)
    assert refused.socket.recv(1) == b""
    refused.close()
    for client in clients:
        client.close()


def test_end_waits_neither_for_a_long_reply_nor_for_an_idle_connection(start, monkeypatch):
    monkeypatch.setattr("nanollava.serve.server.CLOSE_SECONDS", 0.1)
    server = start()
    gate = Gate(server)
    idle, under_way = Client(server), Client(server).send(chat("What?"))
    wait_until(lambda: gate.requests)
    server.close()
    assert server.engine.thread.is_alive() and server.num_connections == 2
    gate.leave(under_way)
    idle.close()


def test_waiting_requests_hear_that_the_server_ends(start):
    server = start()
    gate = Gate(server)
    under_way, waiting = Client(server).send(chat("What?")), Client(server)
    wait_until(lambda: gate.requests)
    waiting.send(chat("What?"))
    wait_until(lambda: server.engine.jobs.qsize() == 1)
    server.replies.reply = gate.reply
    closing = threading.Thread(target=server.close)
    closing.start()
    wait_until(lambda: server.engine.closing)
    gate.leave(under_way)
    assert waiting.error() == (503, "server_error")
    closing.join()
