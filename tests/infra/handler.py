"""The base of the test servers: an HTTP handler that sends a reply, complete or cut short."""

from http.server import BaseHTTPRequestHandler


class ReplyHandler(BaseHTTPRequestHandler):
    def send(self, code, body, headers={}, length=None):
        """`length` is what the reply claims to have; None: the length of `body`."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Keep the output of the tests clean."""
