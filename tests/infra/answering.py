"""What the servers of the tests share: an answer, whole or shorter than it says."""

from http.server import BaseHTTPRequestHandler


class Answering(BaseHTTPRequestHandler):
    def send(self, code, body, headers={}, length=None):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass
