"""One HTTP request from a client that is not trusted: read within limits, answered in JSON.

Each connection carries one request, so that nothing can hide behind the first one.
"""

import json
import select
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from ..infra.progress import print0
from .openai import RequestError

MAX_BODY = 2**25  # bytes: some photos in base64
READ_SECONDS = 30.0  # for a whole request to arrive
WRITE_SECONDS = 60.0  # for a client to take what is sent
DRAIN_SECONDS = 2.0  # without a byte from a client that does not close its connection


class JsonHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = WRITE_SECONDS
    disable_nagle_algorithm = True  # each piece is sent when it is there

    def setup(self):
        super().setup()
        self.started, self.status = time.perf_counter(), None
        self.what, self.note = "a request", ""  # for the log
        self.is_late = False
        # a client that sends a byte now and then would hold its thread forever
        self.deadline = threading.Timer(READ_SECONDS, self.stop_reading)
        self.deadline.daemon = True
        self.deadline.start()

    def stop_reading(self) -> None:
        self.is_late = True
        try:
            self.connection.shutdown(socket.SHUT_RD)  # reading ends; an answer can still be sent
        except OSError:  # the client is gone
            pass

    def finish(self):
        self.deadline.cancel()
        self.log()
        super().finish()
        if self.status:
            self.drain()

    def drain(self) -> None:
        """Read what is left: a connection closed with unread bytes loses the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(DRAIN_SECONDS)
        until = time.monotonic() + READ_SECONDS
        while time.monotonic() < until and self.connection.recv(2**16):
            pass

    def log(self) -> None:
        """Print one line about the request.

        Headers, bodies, unknown paths and queries stay out of it: they may hold a key or a prompt.
        """
        if self.status or self.note:
            seconds = time.perf_counter() - self.started
            print0(f"{time.strftime('%H:%M:%S')}  {self.what}  {self.status or '-'}  "
                   f"{seconds:.1f} s  {self.note}".rstrip())

    def log_message(self, *_) -> None:
        """The base class would print the request line, with its query."""

    def version_string(self) -> str:
        return "nanollava"

    # Reading

    def check_head(self) -> None:
        """Raise RequestError if a line is no header: what follows it was not read."""
        self.check_in_time()
        if self.headers.defects:
            raise RequestError(400, "the headers are malformed")

    def read_body(self) -> bytes:
        """Raises RequestError if the body has no plain length, is too long, or comes too slowly."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths:
            raise RequestError(411, "send the body with its Content-Length")
        if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
            raise RequestError(400, "Content-Length must be one number")
        if len(lengths[0]) > 12 or int(lengths[0]) > MAX_BODY:
            raise RequestError(413, f"the body has more than {MAX_BODY >> 20} MiB: send smaller "
                               "images")
        body = self.rfile.read(int(lengths[0]))
        self.deadline.cancel()
        self.check_in_time()
        if len(body) < int(lengths[0]):
            raise RequestError(400, "the body is shorter than its Content-Length")
        return body

    def check_in_time(self) -> None:
        if self.is_late:
            raise RequestError(408, f"the request did not arrive within {READ_SECONDS:.0f} s")

    def check_client(self) -> None:
        """Raise ConnectionError if the client has closed the connection.

        What it sends behind its request is dropped.
        """
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(2**16):
            raise ConnectionResetError("the client is gone")

    # Sending

    def send_head(self, status: int, kind: str, headers: dict) -> None:
        self.status = status
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Connection": "close"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def send_bytes(self, status: int, body: bytes, kind: str, headers: dict) -> None:
        self.send_head(status, kind, headers | {"Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, status: int, content, headers: dict | None = None) -> None:
        self.send_bytes(status, json.dumps(content).encode(), "application/json", headers or {})

    def send_event(self, content: dict) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

    def send_error(self, code, message=None, explain=None) -> None:
        """For what the base class refuses, such as an unknown method or too many headers."""
        error = RequestError(int(code), message or HTTPStatus(code).phrase)
        self.request_version = "HTTP/1.1"  # it is unknown if the first line was broken
        self.send_json(error.status, error.content)
        self.close_connection = True
