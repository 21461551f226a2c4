"""A client for language models over REST: messages in, one answer out.

It speaks /chat/completions, as OpenAI and most other servers do. The key comes from OPENAI_API_KEY
and appears in no file and no message.
"""

import threading
from concurrent import futures
from dataclasses import replace
from urllib.parse import SplitResult, urlsplit

import requests

from ..infra.http import BearerAuth, is_invalid_request, read_api_key, retry_delay
from ..infra.io import InputError
from .ledger import Answer, RequestError, guess_tokens

OPENAI = "https://api.openai.com/v1"
ATTEMPTS = 8  # per request, while the network or the server fails
FIRST_ATTEMPTS = 3  # as long as no server has ever been reached
# status, code or type of an error that would repeat for every request
FATAL_CODES = {"401", "402", "403", "404", "insufficient_quota", "billing_not_active",
               "invalid_api_key", "model_not_found"}
RETRY_STATUSES = {408, 409, 425, 429}  # and all from 500 up


class RetryableError(Exception):
    """(problem, headers): this attempt failed, another may succeed; the headers may say when."""


class Chat:
    """chat(messages) -> Answer. Thread-safe; setting `stop` ends all waiting.

    Raises InputError, with the server's own words, if no request can succeed (a wrong key, an
    unknown model, no credit), and RequestError if this one cannot.
    timeout: seconds for one complete reply.
    """

    def __init__(self, model: str, base_url: str = OPENAI, timeout: float = 600.0):
        self.model, self.stop = model, threading.Event()
        self.timeout = min(timeout, 86_400.0)  # one day: sockets and threads have a limit
        self.server_reached = False
        self.options = {"temperature": 1.0, "max_tokens": 2048}
        self.key = read_api_key("OPENAI_API_KEY")
        if base_url == OPENAI and not self.key:
            raise InputError("OPENAI_API_KEY is not set: set it, or use --base-url to name "
                             "a server that needs no key")
        address = completions_address(base_url)
        self.url = address.geturl()
        # for messages: without user, password and query
        host = address.netloc.rpartition("@")[2]
        self.public_url = address._replace(netloc=host, query="", fragment="").geturl()
        secrets = (self.key, address.query, address.username, address.password)
        self.secrets = [text for text in secrets if text and len(text) >= 4]
        azure = address.hostname.endswith(".azure.com")
        self.auth = BearerAuth(self.key, "api-key", "") if azure else BearerAuth(self.key)

    def __call__(self, messages: list[dict]) -> Answer:
        problem, headers = "", None
        for attempt in range(ATTEMPTS):
            if attempt > 0 and self.stop.wait(retry_delay(attempt, headers)):
                raise RequestError("stopped")
            try:
                return self.request(messages)
            except RetryableError as error:
                problem, headers = error.args
            except requests.RequestException as error:
                problem, headers = self.one_line(f"{type(error).__name__}: {error}"), None
                no_server = ("NewConnectionError" in repr(error)
                             or "NameResolutionError" in repr(error))
                give_up = no_server and not self.server_reached and attempt + 1 >= FIRST_ATTEMPTS
                if give_up or is_invalid_request(error):
                    raise InputError(f"cannot reach {self.public_url}: {problem}") from None
        raise RequestError(f"{problem} ({ATTEMPTS} attempts)")

    def request(self, messages: list[dict]) -> Answer:
        """One attempt. Raises RetryableError or requests.RequestException if it may be repeated."""
        options = self.options
        reply = self.post({"model": self.model, "messages": messages, **options})
        self.server_reached = True
        if reply.ok and not reply.is_redirect:
            try:
                body = reply.json()
                # some servers report an error with status 200
                if "error" not in body or "choices" in body:
                    answer = parse_answer(body, messages)
                    return replace(answer, text=self.redact(answer.text))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                problem = f"the reply holds no answer: {type(error).__name__} {error}"
                raise RetryableError(self.one_line(problem), reply.headers) from None
        raise RetryableError(self.check_error(reply, options), reply.headers)

    def post(self, body: dict) -> requests.Response:
        """Send a request and wait for the complete reply.

        Raises requests.Timeout after `timeout` seconds in all. The timeout of requests restarts
        with every byte, so a server that sends a byte now and then could block a worker forever.
        Therefore each request has a thread of its own, which is abandoned after the timeout.
        """
        reply = futures.Future()

        def send():
            try:
                reply.set_result(requests.post(self.url, json=body, auth=self.auth,
                                               allow_redirects=False, timeout=self.timeout))
            except Exception as error:
                reply.set_exception(error)

        threading.Thread(target=send, daemon=True).start()
        try:
            return reply.result(timeout=self.timeout)
        except futures.TimeoutError:
            problem = f"no complete answer within {self.timeout:g} seconds"
            raise requests.Timeout(problem) from None

    def check_error(self, reply: requests.Response, options: dict) -> str:
        """The server's error message, if the request may be repeated.

        options: what the request was sent with. Raises InputError or RequestError otherwise.
        """
        status = reply.status_code
        try:
            error = reply.json()["error"]
            error = error if isinstance(error, dict) else {"message": error}
        except (ValueError, KeyError, TypeError, RecursionError):
            error = {"message": self.one_line(reply.text)[:200]}
        problem = self.one_line(f"{status} {error.get('message')}")
        if reply.is_redirect:
            raise InputError(f"{self.public_url} redirects to another address: "
                             "if that is correct, name it with --base-url")
        if FATAL_CODES & {str(status), str(error.get("code")), str(error.get("type"))}:
            raise InputError(f"{self.public_url}: {problem}")
        adapted = status == 400 and self.adapt_options(problem, options)
        if not adapted and status < 500 and status not in RETRY_STATUSES:
            raise RequestError(problem)
        return problem

    def adapt_options(self, problem: str, options: dict) -> bool:
        """Change the option that a model rejects; False if `problem` is about something else.

        OpenAI's newer models call max_tokens max_completion_tokens and accept no temperature.
        """
        if "max_completion_tokens" in problem and "max_tokens" in options:
            names = {"max_tokens": "max_completion_tokens"}
            self.options = {names.get(name, name): value for name, value in self.options.items()}
        elif "temperature" in problem and "temperature" in options:
            self.options = {name: value for name, value in self.options.items()
                            if name != "temperature"}
        else:
            return False
        return True

    def redact(self, text: str) -> str:
        """The text without the key and without secrets from the address."""
        for secret in self.secrets:
            text = text.replace(secret, "[hidden]")
        return text

    def one_line(self, text: str) -> str:
        """The redacted text on one line."""
        return " ".join(self.redact(text).split())


def completions_address(base_url: str) -> SplitResult:
    """The address of a server's /chat/completions. Raises InputError if base_url is not a URL."""
    try:
        address = urlsplit(base_url)
        if not address.hostname or address.scheme not in ("http", "https"):
            raise ValueError
    except ValueError:
        raise InputError(f"--base-url {base_url} is not the address of a server: "
                         "it must begin with http:// or https://") from None
    # Azure has a query, ?api-version=, behind the path
    path = address.path.rstrip("/").removesuffix("/chat/completions")
    return address._replace(path=f"{path}/chat/completions")


def parse_answer(body: dict, messages: list[dict]) -> Answer:
    """The answer in a reply. Token counts that the reply does not give are estimated."""
    choice, usage = body["choices"][0], body.get("usage")
    text = choice["message"].get("content") or ""
    text = text.encode("utf-8", "replace").decode()  # an unpaired surrogate becomes "?"
    guesses = {"prompt_tokens": sum(guess_tokens(message["content"]) for message in messages),
               "completion_tokens": guess_tokens(text)}
    counts = []
    for name, guess in guesses.items():
        count = usage.get(name) if isinstance(usage, dict) else None
        counts.append(count if type(count) is int and count > 0 else guess)
    complete = choice.get("finish_reason") not in ("length", "content_filter")
    return Answer(text, *counts, complete)
