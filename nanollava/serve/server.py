"""The endpoint: who may ask, and what is at which path.

    POST /v1/chat/completions    as OpenAI's API, streamed or whole
    GET  /v1/models, /health
    GET  /, /example.jpg         the page and an image to try it with
    POST /patch_words            {"image": data URL} -> the words nearest to each patch

The page of another site can reach a server on this machine through the user's browser. So Host and
Origin must be this server's.
"""

import contextlib
import hmac
import socket
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from socketserver import ThreadingTCPServer
from urllib.parse import urlsplit

from ..chat import Usage
from ..settings import TOY_IMAGE
from .engine import Engine
from .handler import JsonHandler
from .openai import (
    Completion,
    Request,
    RequestError,
    as_request_error,
    parse_body,
    parse_data_url,
    parse_request,
)
from .replies import Replies

MAX_CONNECTIONS = 128
CLOSE_SECONDS = 5.0  # for the reply under way when the server ends
PAGE = Path(__file__).with_name("page.html")
SECURITY = {  # the page loads nothing, and talks to this server alone
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Server(ThreadingTCPServer):
    """key: what clients must send, "" for none. max_waiting: requests that may wait for their turn.

    Raises OSError if it cannot listen at the address.
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], replies: Replies, key: str, max_waiting: int):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)
        self.replies, self.key, self.engine = replies, key, Engine()
        self.is_local = ip_address(self.server_address[0]).is_loopback
        self.queue = threading.BoundedSemaphore(max_waiting + 1)  # and one that is answered
        self.num_connections, self.lock = 0, threading.Lock()
        self.parsing = threading.Lock()  # a body may grow thirtyfold: one at a time

    @contextlib.contextmanager
    def place_in_queue(self):
        """Raises RequestError if the queue is full."""
        if not self.queue.acquire(blocking=False):
            raise RequestError(429, "too many requests wait already: try again later",
                               kind="rate_limit_error", code="rate_limit_exceeded",
                               headers={"Retry-After": str(self.engine.seconds_to_wait())})
        try:
            yield
        finally:
            self.queue.release()

    def verify_request(self, request, client_address) -> bool:
        with self.lock:
            self.num_connections += 1
            return self.num_connections <= MAX_CONNECTIONS

    def shutdown_request(self, request) -> None:
        """The end of every connection, refused ones included."""
        super().shutdown_request(request)
        with self.lock:
            self.num_connections -= 1

    def handle_error(self, request, client_address) -> None:
        """The connection broke; the base class would print a traceback."""

    def close(self) -> None:
        """Take no more requests, and end: the reply under way has CLOSE_SECONDS to finish."""
        self.server_close()
        until = time.monotonic() + CLOSE_SECONDS
        self.engine.close(CLOSE_SECONDS)
        until = min(until, time.monotonic() + 1.0)  # for the last pieces to be sent
        while self.num_connections and time.monotonic() < until:
            time.sleep(0.02)


class Handler(JsonHandler):
    paths = ("/", "/example.jpg", "/health", "/v1/models", "/v1/chat/completions", "/patch_words")

    def do_GET(self):
        self.answer({"/": self.get_page, "/example.jpg": self.get_example,
                     "/health": self.get_health, "/v1/models": self.get_models})

    def do_POST(self):
        self.answer({"/v1/chat/completions": self.post_completion,
                     "/patch_words": self.post_patch_words})

    def answer(self, routes: dict) -> None:
        """Call the function for the path, and send its error."""
        path = self.path.partition("?")[0]
        if path in self.paths:
            self.what = f"{self.command} {path}"
        try:
            self.check_head()
            self.check_sender(path)
            if path not in routes:
                raise RequestError(405, f"{path} does not take {self.command}") \
                    if path in self.paths else RequestError(404, "there is nothing at this path")
            routes[path]()
        except OSError:
            self.note = "the client is gone"
        except Exception as error:
            error = as_request_error(error)
            if self.status is None:
                self.send_json(error.status, error.content, error.headers)
            else:  # in a stream it is too late for a status
                self.note = "failed"
                self.send_event(error.content)

    def check_sender(self, path: str) -> None:
        """Raise RequestError unless the request is meant for this server and has its key."""
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(hosts) != 1:
            raise RequestError(400, "the Host header is missing, or there is another one")
        if self.server.is_local and not is_local_name(hosts[0]):
            raise RequestError(403, "the Host header does not name this server: use "
                               "http://127.0.0.1 or http://localhost, with its port")
        if origin is not None and origin.lower() not in (
                f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"):
            raise RequestError(403, "a page of another site must not use this server")
        if self.server.key and path not in ("/", "/example.jpg", "/health"):
            sent = self.headers.get("Authorization", "")
            expected = f"Bearer {self.server.key}"
            if not hmac.compare_digest(sent.encode(errors="replace"), expected.encode()):
                raise RequestError(401, "the API key is missing or wrong: send it as "
                                   "Authorization: Bearer KEY", code="invalid_api_key",
                                   headers={"WWW-Authenticate": "Bearer"})

    def get_page(self) -> None:
        self.send_bytes(200, PAGE.read_bytes(), "text/html; charset=utf-8", SECURITY)

    def get_example(self) -> None:
        if not TOY_IMAGE.is_file():  # an installed package is without it
            raise RequestError(404, "this server has no example image")
        self.send_bytes(200, TOY_IMAGE.read_bytes(), "image/jpeg", SECURITY)

    def get_health(self) -> None:
        self.send_json(200, {"status": "ok"})

    def get_models(self) -> None:
        replies = self.server.replies
        self.send_json(200, {"object": "list", "data": [{
            "id": replies.name, "object": "model", "created": replies.created,
            "owned_by": "nanollava"}]})

    def read(self, parse: Callable[[dict], Request | bytes]) -> Request | bytes:
        """What the body asks for."""
        body = self.read_body()
        with self.server.parsing:
            return parse(parse_body(body))

    def post_completion(self) -> None:
        replies = self.server.replies
        with self.server.place_in_queue():
            request = self.read(parse_request)
            job = self.server.engine.submit(lambda: replies.reply(request))
            pieces, completion = job.pieces(self.check_client), Completion(replies.name)
            if request.stream:
                usage = self.stream(pieces, completion, request.include_usage)
            else:
                *texts, usage = pieces
                self.send_json(200, completion.whole("".join(texts), usage))
        self.note = (f"{usage.prompt_tokens} tokens, {usage.cached_tokens} of them cached; "
                     f"reply {usage.completion_tokens} tokens")

    def stream(self, pieces, completion: Completion, include_usage: bool) -> Usage:
        """Send the pieces as server-sent events. An error before the first has its status."""
        piece = next(pieces)
        self.send_head(200, "text/event-stream", {"Cache-Control": "no-store"})
        self.send_event(completion.chunk({"role": "assistant", "content": ""}))
        while not isinstance(piece, Usage):
            if piece:
                self.send_event(completion.chunk({"content": piece}))
            piece = next(pieces)
        self.send_event(completion.chunk({}, piece.finish_reason))
        if include_usage:
            self.send_event(completion.usage_chunk(piece))
        self.wfile.write(b"data: [DONE]\n\n")
        return piece

    def post_patch_words(self) -> None:
        with self.server.place_in_queue():
            file = self.read(parse_image)
            job = self.server.engine.submit(lambda: self.server.replies.patch_words(file))
            (words,) = job.pieces(self.check_client)
            self.send_json(200, words)


def is_local_name(host: str) -> bool:
    """Whether a Host header names this machine as seen from itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def parse_image(content: dict) -> bytes:
    """The file in the body of /patch_words."""
    url = content.get("image")
    if not isinstance(url, str):
        raise RequestError(400, "image must be a data: URL", "image")
    return parse_data_url(url, "image")
