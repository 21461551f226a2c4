"""A language model over REST: messages in, text out, and no answer that was paid for is ever lost or bought twice.

The client speaks /chat/completions, to OpenAI or any server that does as OpenAI does. The ledger is a file with one
JSON object a line, one line an answer, on the disk before the answer counts. The key is read from OPENAI_API_KEY, and
stands in no file and no message.
"""

import queue
import threading
from dataclasses import replace
from urllib.parse import urlsplit, urlunsplit

import requests

from ..infra.http import BearerAuth, is_invalid_request, read_api_key, retry_delay
from ..infra.io import InputError
from .ledger import Answer, RequestError, guess_tokens

OPENAI = "https://api.openai.com/v1"
ATTEMPTS = 8  # of one request that the network or the server fails
FIRST_ATTEMPTS = 3  # where no server was ever reached
FATAL_CODES = {401, 402, 403, 404, "401", "402", "403", "404", "insufficient_quota", "billing_not_active",
            "invalid_api_key", "model_not_found"}  # status, code or type of an error that every request would meet


class Chat:
    """chat(messages) -> Answer. Safe to call from several threads; `stop` ends all waiting.

    Raises InputError, with the server's own words, where no request can succeed (a wrong key, an unknown model, no
    credit), and RequestError where this one cannot. timeout: seconds that one answer may take.
    """

    def __init__(self, model: str, base_url: str = OPENAI, timeout: float = 600.0):
        self.model, self.timeout, self.stop, self.reached = model, timeout, threading.Event(), False
        self.options = {"temperature": 1.0, "max_tokens": 2048}
        self.key = read_api_key("OPENAI_API_KEY")
        if base_url == OPENAI and not self.key:
            raise InputError("there is no key: set OPENAI_API_KEY, or name a server that needs none with --base-url")
        try:
            address = urlsplit(base_url)
            host = address.hostname or ""
        except ValueError:
            address, host = None, ""
        if not host or address.scheme not in ("http", "https"):
            raise InputError(f"--base-url {base_url} is no address of a server: it begins with http:// or https://")
        path = address.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.url = urlunsplit(address._replace(path=path))  # Azure has ?api-version= behind the path
        self.shown = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{path}"
        secrets = (self.key, address.query, address.username, address.password)
        self.hidden = [text for text in secrets if text and len(text) >= 4]
        self.auth = BearerAuth(self.key, "api-key", "") if host.endswith(".azure.com") else BearerAuth(self.key)

    def __call__(self, messages: list[dict]) -> Answer:
        problem, headers = "", None
        for attempt in range(ATTEMPTS):
            if attempt > 0 and self.stop.wait(retry_delay(attempt, headers)):
                raise RequestError("stopped")
            headers = None
            try:
                reply = self.post({"model": self.model, "messages": messages, **self.options})
                self.reached, headers = True, reply.headers
                if reply.ok and not reply.is_redirect:
                    body = reply.json()
                    if "error" not in body or "choices" in body:
                        answer = read(body, messages)
                        return replace(answer, text=self.hide(answer.text))
                problem = self.judge(reply)
            except requests.RequestException as error:
                problem = self.clean(f"{type(error).__name__}: {error}")
                nobody = "NewConnectionError" in repr(error) or "NameResolutionError" in repr(error)
                if is_invalid_request(error) or (nobody and not self.reached and attempt + 1 >= FIRST_ATTEMPTS):
                    raise InputError(f"cannot reach {self.shown}: {problem}") from None
            except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:  # JSON, but no answer
                problem = self.clean(f"no answer in the reply: {type(error).__name__} {error}")
        raise RequestError(f"{problem} ({ATTEMPTS} attempts)")

    def post(self, body: dict) -> requests.Response:
        """The reply, once it is whole. Raises requests.Timeout after `timeout` seconds in all.

        The time-out of requests begins anew with every byte, so a server that sends one now and then would hold a
        worker for ever: it gets a thread of its own, which nobody waits for.
        """
        outcome = queue.SimpleQueue()

        def work():
            try:
                outcome.put(requests.post(self.url, json=body, auth=self.auth, allow_redirects=False,
                                          timeout=min(self.timeout, 86_400)))
            except Exception as error:
                outcome.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            reply = outcome.get(timeout=min(self.timeout, threading.TIMEOUT_MAX))
        except queue.Empty:
            raise requests.Timeout(f"no whole answer within {self.timeout:g} seconds") from None
        if isinstance(reply, Exception):
            raise reply
        return reply

    def judge(self, reply: requests.Response) -> str:
        """What a server said instead of an answer, if it is worth asking again; raises if it is not."""
        try:
            error = reply.json()["error"]
            error = error if isinstance(error, dict) else {"message": error}
        except (ValueError, KeyError, TypeError, RecursionError):
            error = {"message": self.clean(reply.text)[:200]}
        problem, status = self.clean(f"{reply.status_code} {error.get('message')}"), reply.status_code
        if reply.is_redirect:
            raise InputError(f"{self.shown} sends us to another address; if that is right, name it with --base-url")
        if FATAL_CODES & {status, str(error.get("code")), str(error.get("type"))}:
            raise InputError(f"{self.shown}: {problem}")
        # newer models of OpenAI want another name for the one, and nothing of the other
        if status == 400 and "max_completion_tokens" in problem and "max_tokens" in self.options:
            self.options = {**self.options, "max_completion_tokens": self.options["max_tokens"]}
            del self.options["max_tokens"]
        elif status == 400 and "temperature" in problem and "temperature" in self.options:
            self.options = {key: value for key, value in self.options.items() if key != "temperature"}
        elif status < 500 and status not in (408, 409, 425, 429):
            raise RequestError(problem)
        return problem

    def hide(self, text: str) -> str:
        """A text without the key or what else an address may hide."""
        for hidden in self.hidden:
            text = text.replace(hidden, "[hidden]")
        return text

    def clean(self, text: str) -> str:
        """The same in one line."""
        return " ".join(self.hide(text).split())


def read(body: dict, messages: list[dict]) -> Answer:
    """The answer in a reply; where it does not say how many tokens it took, they are guessed."""
    choice, usage = body["choices"][0], body.get("usage")
    text = choice["message"].get("content") or ""
    text = text.encode("utf-8", "replace").decode()  # half a character is "?"
    took = []
    for key, guess in (("prompt_tokens", sum(guess_tokens(message["content"]) for message in messages)),
                       ("completion_tokens", guess_tokens(text))):
        said = usage.get(key) if isinstance(usage, dict) else None
        took.append(said if type(said) is int and said > 0 else guess)
    return Answer(text, *took, choice.get("finish_reason") not in ("length", "content_filter"))
