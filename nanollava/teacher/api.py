"""A client for language models over REST: messages in, one answer out.

It speaks /chat/completions, as OpenAI and most other servers do. The key comes from OPENAI_API_KEY
and appears in no file and no message.
"""

import json
import re
import threading
from concurrent import futures
from urllib.parse import SplitResult

import requests

from ..infra import http
from ..infra.io import InputError
from .ledger import Answer, RequestError, guess_tokens

OPENAI = "https://api.openai.com/v1"
ATTEMPTS = 8  # per request, while the network or the server fails
FIRST_ATTEMPTS = 3  # as long as no server has ever been reached
# status, code or type of an error that would repeat for every request
FATAL_CODES = {"401", "402", "403", "404", "insufficient_quota", "billing_not_active",
               "invalid_api_key", "model_not_found"}
RETRY_STATUSES = {408, 409, 425, 429}  # and all from 500 up
MAX_RAW = 2**16  # characters kept of a reply without text
COMPLETE = {"stop", "eos", "end_turn", "none"}  # every other finish reason means: cut off
# in a reply that the server may bill, whatever else is in it
BILLED = re.compile(rb'"(choices|usage)"')
# in errors: the model has no system role; prompt or reply are too long for it
NO_SYSTEM_ROLE = re.compile(r"system\W*(role|message|prompt)|role.*\bsystem\b|roles must alternate"
                            r"|only user and assistant", re.IGNORECASE)
TOO_LONG = re.compile(r"context.?(length|window|size)|max\w*_tokens|too many tokens"
                      r"|(prompt|input|messages?) (is|are) too long", re.IGNORECASE)


class RetryableError(Exception):
    """(problem, headers): this attempt failed, another may succeed; the headers may say when."""


class Chat:
    """chat(messages) -> Answer. Thread-safe; setting `stop` ends all waiting.

    Raises InputError, with the server's own words, if no request can succeed (a wrong key, an
    unknown model, no credit), and RequestError if this one cannot.
    timeout: seconds for one complete reply. max_reply_tokens: the model stops there.
    """

    def __init__(self, model: str, base_url: str = OPENAI, timeout: float = 600.0,
                 max_reply_tokens: int = 2048):
        self.model, self.stop = model, threading.Event()
        self.timeout = min(timeout, 86_400.0)  # one day: sockets and threads have a limit
        self.server_reached = False
        self.options = {"temperature": 1.0, "max_tokens": max_reply_tokens}
        self.has_system_role = True
        self.key = http.read_api_key("OPENAI_API_KEY")
        if base_url == OPENAI and not self.key:
            raise InputError("OPENAI_API_KEY is not set: set it, or use --base-url to name "
                             "a server that needs no key")
        address = completions_address(base_url)
        self.url = address.geturl()
        # for messages: without user, password and query
        host = address.netloc.rpartition("@")[2]
        self.public_url = address._replace(netloc=host, query="", fragment="").geturl()
        self.secrets = http.find_secrets(self.key, address)
        azure = address.hostname.endswith(".azure.com")
        self.auth = http.BearerAuth(self.key, "api-key", "") if azure else http.BearerAuth(self.key)

    def __call__(self, messages: list[dict]) -> Answer:
        with http.secrets_hidden(self.secrets, RequestError):
            return self.request_with_retries(messages)

    def request_with_retries(self, messages: list[dict]) -> Answer:
        problem, headers = "", None
        for attempt in range(ATTEMPTS):
            if attempt and self.stop.wait(http.retry_delay(attempt, headers, self.public_url)):
                raise RequestError("stopped")
            try:
                return self.request(messages)
            except RetryableError as error:
                problem, headers = error.args
            except requests.RequestException as error:
                problem, headers = f"{type(error).__name__}: {error}", None
                no_server = ("NewConnectionError" in repr(error)
                             or "NameResolutionError" in repr(error))
                give_up = no_server and not self.server_reached and attempt + 1 >= FIRST_ATTEMPTS
                if give_up or http.is_invalid_request(error):
                    raise InputError(f"cannot reach {self.public_url}: {problem}") from None
        raise RequestError(f"{problem} ({ATTEMPTS} attempts)")

    def request(self, messages: list[dict]) -> Answer:
        """One attempt. Raises RetryableError or requests.RequestException if it may be repeated."""
        if not self.has_system_role and messages[0]["role"] == "system":
            messages = merge_system(messages)
        request = {"model": self.model, "messages": messages, **self.options}
        reply, body = self.post(request)
        self.server_reached = True
        content = parse_body(body)
        if (reply.status_code == 200 and BILLED.search(body)
                and ("error" not in content or "choices" in content)):
            return self.read_answer(content, body, messages)
        raise RetryableError(self.check_error(reply, content, body, request), reply.headers)

    def post(self, request: dict) -> tuple[requests.Response, bytes]:
        """Send a request and wait for the complete reply. Returns the reply and its body.

        Raises requests.Timeout after `timeout` seconds in all. The timeout of requests restarts
        with every byte, so a server that sends a byte now and then could block a worker forever.
        Therefore each request has a thread of its own, which is abandoned after the timeout.
        """
        result = futures.Future()

        def send():
            try:
                reply = requests.post(self.url, json=request, auth=self.auth, stream=True,
                                      allow_redirects=False, timeout=self.timeout)
                with reply:
                    result.set_result((reply, http.read_body(reply)))
            except Exception as error:
                result.set_exception(error)

        threading.Thread(target=send, daemon=True).start()
        try:
            return result.result(timeout=self.timeout)
        except futures.TimeoutError:
            problem = f"no complete answer within {self.timeout:g} seconds"
            raise requests.Timeout(problem) from None

    def read_answer(self, content: dict, body: bytes, messages: list[dict]) -> Answer:
        """The answer in a reply, which has been paid for even if it holds no text.

        Token counts that the reply does not give are estimated.
        """
        raw = self.without_key(body.decode("utf-8", "replace"))[:MAX_RAW]
        try:
            text, complete = read_choice(content["choices"][0])
        except (LookupError, TypeError, AttributeError):
            text, complete = "", False
        text, usage = self.without_key(text), content.get("usage")
        guesses = {"prompt_tokens": sum(guess_tokens(message["content"]) for message in messages),
                   "completion_tokens": guess_tokens(text or raw)}
        counts = []
        for name, guess in guesses.items():
            count = usage.get(name) if isinstance(usage, dict) else None
            counts.append(count if type(count) is int and 0 < count < 1e9 else guess)
        return Answer(text, *counts, complete, raw="" if text else raw)

    def check_error(self, reply: requests.Response, content: dict, body: bytes,
                    request: dict) -> str:
        """The server's error message, if the request may be repeated.

        Raises InputError or RequestError otherwise.
        """
        status, error = reply.status_code, content.get("error") or content
        if not isinstance(error, dict) or "message" not in error:
            text = error if isinstance(error, str) else body.decode("utf-8", "replace")
            error = {"message": http.hide(text, self.secrets)[:200]}
        problem = f"{status} {error['message']}"
        codes = {str(status), str(error.get("code")), str(error.get("type"))}
        if reply.is_redirect:
            raise InputError(f"{self.public_url} redirects to another address: "
                             "if that is correct, name it with --base-url")
        if FATAL_CODES & codes:
            raise InputError(f"{self.public_url}: {problem}")
        if status == 200 and "error" not in content:
            return f"the reply of {self.public_url} holds no answer: {error['message']}"
        if status in (400, 422, 500) and self.adapt(problem, request):
            return problem
        if status >= 500 or status in RETRY_STATUSES:
            return problem
        if TOO_LONG.search(" ".join([problem, *codes])):
            problem += " (a smaller --max-reply-tokens leaves more room for the prompt)"
        raise RequestError(problem)

    def adapt(self, problem: str, request: dict) -> bool:
        """Change what a model rejects in a request; False if `problem` is about something else.

        OpenAI's newer models call max_tokens max_completion_tokens and accept no temperature.
        Other models have no system role.
        """
        if "max_completion_tokens" in problem and "max_tokens" in request:
            names = {"max_tokens": "max_completion_tokens"}
            self.options = {names.get(name, name): value for name, value in self.options.items()}
        elif "temperature" in problem and "temperature" in request:
            self.options = {name: value for name, value in self.options.items()
                            if name != "temperature"}
        elif NO_SYSTEM_ROLE.search(problem) and request["messages"][0]["role"] == "system":
            self.has_system_role = False
        else:
            return False
        return True

    def without_key(self, text: str) -> str:
        """The text of a reply without the key, unless that is a mere word, as local servers use."""
        return text.replace(self.key, "[hidden]") if len(self.key) >= 8 else text


def merge_system(messages: list[dict]) -> list[dict]:
    """The messages without a system role: its text goes before the first user message."""
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def completions_address(base_url: str) -> SplitResult:
    """The address of a server's /chat/completions. Raises InputError if base_url is not a URL."""
    address = http.parse_address(base_url, "--base-url")
    # Azure has a query, ?api-version=, behind the path
    path = address.path.rstrip("/").removesuffix("/chat/completions")
    return address._replace(path=f"{path}/chat/completions")


def parse_body(body: bytes) -> dict:
    """The JSON object of a reply; {} if it is none.

    Some servers stream although no stream was requested: lines of "data:" with a chunk each.
    """
    try:
        text = body.decode("utf-8-sig", "replace")
        chunks = [line[5:].strip() for line in text.split("\n") if line.startswith("data:")]
        content = join_chunks(chunks) if chunks else json.loads(text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def join_chunks(chunks: list[str]) -> dict:
    """The chunks of a stream as the one reply that they make."""
    content, text = {}, ""
    finish_reason = None if "[DONE]" in chunks else "broke off"
    for chunk in chunks:
        if chunk == "[DONE]":
            break
        chunk = json.loads(chunk)
        for choice in chunk.pop("choices", []):
            text += read_text(choice["delta"])
            finish_reason = choice.get("finish_reason") or finish_reason
        content |= {name: value for name, value in chunk.items() if value is not None}
    choice = {"message": {"content": text}, "finish_reason": finish_reason}
    return content if "error" in content else {**content, "choices": [choice]}


def read_text(message: dict) -> str:
    """The text of a message: its content, or the text parts of it."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
    return content.encode("utf-8", "replace").decode()  # an unpaired surrogate becomes "?"


def read_choice(choice: dict) -> tuple[str, bool]:
    """The text of a choice, and whether it is complete."""
    return read_text(choice["message"]), str(choice.get("finish_reason")).lower() in COMPLETE
