"""A language model on this machine that misbehaves as servers do."""

import json
import threading
from http.server import ThreadingHTTPServer

from tests.infra.handler import ReplyHandler


class Server(ThreadingHTTPServer):
    """Answers /chat/completions; `moods` say how the next answers go wrong."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.moods, self.heard, self.headers, self.reply = [], [], [], lambda body: "A cat."
        self.slept = threading.Event()  # ends the sleep of slow answers


class Handler(ReplyHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.heard.append(body)
        server.headers.append(dict(self.headers))
        mood = server.moods.pop(0) if server.moods else None
        answer = {"choices": [{"message": {"content": server.reply(body)}, "finish_reason": "stop"}],
                  "usage": {"prompt_tokens": 10, "completion_tokens": 3}}
        if mood == "reset":
            self.connection.close()
        elif mood == "cut":
            text = json.dumps(answer).encode()
            self.send(200, text[:20], length=len(text))
        elif mood == "nonsense":
            self.send(200, b"<html>")
        elif mood == "slow":
            server.slept.wait(5)
        elif mood == "drips":  # a space now and then, as some servers keep a connection open; the answer after seconds
            text = json.dumps(answer).encode()
            self.send(200, b"", length=20 + len(text))
            for _ in range(20):
                server.slept.wait(0.1)
                self.wfile.write(b" ")
            self.wfile.write(text)
        elif mood == "too long":
            answer["choices"][0]["finish_reason"] = "length"
            self.send(200, json.dumps(answer).encode())
        elif isinstance(mood, tuple):
            code, content = mood
            headers = {429: {"Retry-After": "3"}, 302: {"Location": "http://127.0.0.1:9/elsewhere"}}.get(code, {})
            self.send(code, json.dumps(content if code == 200 else {"error": content}).encode(), headers)
        else:
            self.send(200, json.dumps(answer).encode())
