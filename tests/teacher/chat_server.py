"""A chat server for the tests, with the faults that real servers have."""

import json
import threading
from http.server import ThreadingHTTPServer

from tests.infra.handler import ReplyHandler

HEADERS = {429: {"Retry-After": "3"}, 302: {"Location": "http://127.0.0.1:9/elsewhere"}}


class Server(ThreadingHTTPServer):
    """Answers /chat/completions with `reply(body)`.

    `faults` says what goes wrong with the next answers, one entry each: None, a name (below), or a
    tuple (status, content), sent with `more_headers`. `requests` and `headers` are what has
    arrived.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.headers, self.more_headers = [], [], [], {}
        self.reply = lambda body: "A cat."
        self.closing = threading.Event()  # ends the delay of slow answers


class Handler(ReplyHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(body)
        server.headers.append(dict(self.headers))
        fault = server.faults.pop(0) if server.faults else None
        choice = {"message": {"content": server.reply(body)}, "finish_reason": "stop"}
        if fault == "length limit":
            choice["finish_reason"] = "length"
        answer = {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 3}}
        text = json.dumps(answer).encode()
        if fault == "reset":
            self.connection.close()
        elif fault == "cut":
            self.send(200, text[:20], length=len(text))
        elif fault == "not JSON":
            self.send(200, b"<html>")
        elif fault == "slow":
            server.closing.wait(5)
        elif fault == "drip":  # keeps the connection alive with spaces; the answer comes late
            self.send(200, b"", length=20 + len(text))
            for _ in range(20):
                server.closing.wait(0.1)
                self.wfile.write(b" ")
            self.wfile.write(text)
        elif isinstance(fault, tuple):
            status, content = fault
            content = content if status == 200 else {"error": content}
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send(status, content, HEADERS.get(status, {}) | server.more_headers)
        else:
            self.send(200, text)
