"""A language model over REST: messages in, text out, and no answer that was paid for is ever lost or bought twice.

The client speaks /chat/completions, to OpenAI or any server that does as OpenAI does. The ledger is a file with one
JSON object a line, one line an answer, on the disk before the answer counts. The key is read from OPENAI_API_KEY, and
stands in no file and no message.
"""

import json
import os
import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time
from urllib.parse import urlsplit, urlunsplit

import requests

from .files import InputError

try:
    import fcntl
except ImportError:  # Windows: two runs on one ledger are not kept apart
    fcntl = None

OPENAI = "https://api.openai.com/v1"
ATTEMPTS = 8  # of one request that the network or the server fails
LONGEST_WAIT = 120.0  # seconds between two of them


class RequestError(ValueError):
    """This one request cannot be answered; others may."""


@dataclass
class Answer:
    text: str
    prompt_tokens: int
    completion_tokens: int
    whole: bool  # False: cut off, by a limit or a filter


class Chat:
    """chat(messages) -> Answer. Safe to call from several threads; `stop` ends all waiting.

    Raises InputError, with the server's own words, where no request can succeed (a wrong key, an unknown model, no
    credit), and RequestError where this one cannot.
    """

    def __init__(self, model: str, base_url: str = OPENAI, temperature: float = 1.0, longest: int = 2048,
                 timeout: float = 120.0):
        self.model, self.temperature, self.longest, self.timeout = model, temperature, longest, timeout
        self.key, self.stop = os.environ.get("OPENAI_API_KEY", ""), threading.Event()
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.netloc:
            raise InputError(f"--base-url {base_url} is no address of a server: it begins with http:// or https://")
        if base_url == OPENAI and not self.key:
            raise InputError("there is no key: set OPENAI_API_KEY, or name a server that needs none with --base-url")
        path = address.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.url = urlunsplit(address._replace(path=path))  # Azure has ?api-version= behind the path
        self.headers = {"Authorization": f"Bearer {self.key}", "api-key": self.key} if self.key else {}

    def __call__(self, messages: list[dict]) -> Answer:
        body = {"model": self.model, "messages": messages, "temperature": self.temperature, "max_tokens": self.longest}
        problem, asked = "", None
        for attempt in range(ATTEMPTS):
            if attempt > 0 and self.stop.wait(pause(attempt, asked)):
                raise RequestError("stopped")
            asked = None
            try:
                reply = requests.post(self.url, json=body, headers=self.headers, timeout=self.timeout)
                asked = reply.headers
                if reply.ok:
                    return read(reply.json())
                problem = self.judge(reply)
            except (requests.RequestException, KeyError, IndexError, TypeError) as error:  # also: not JSON, cut off
                problem = self.clean(f"{type(error).__name__}: {error}")
        raise RequestError(f"{problem} ({ATTEMPTS} attempts)")

    def judge(self, reply: requests.Response) -> str:
        """What a server said instead of an answer, if it is worth asking again; raises if it is not."""
        try:
            error = reply.json()["error"]
            code, text = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
        except (ValueError, KeyError, TypeError):
            code, text = None, reply.text[:200]
        problem = self.clean(f"{reply.status_code} {text}")
        if code == "insufficient_quota" or reply.status_code in (401, 402, 403, 404):
            raise InputError(f"{self.url}: {problem}")
        if code in ("context_length_exceeded", "content_filter", "content_policy_violation"):
            raise RequestError(problem)
        if reply.status_code < 500 and reply.status_code not in (408, 409, 425, 429):
            raise InputError(f"{self.url}: {problem}")
        return problem

    def clean(self, text: str) -> str:
        """One line, without the key."""
        text = " ".join(text.split())
        return text.replace(self.key, "[key]") if self.key else text


def read(body: dict) -> Answer:
    choice, usage = body["choices"][0], body.get("usage") or {}
    return Answer(choice["message"]["content"] or "", usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0),
                  choice.get("finish_reason") in ("stop", None))


def pause(attempt: int, asked) -> float:
    """Seconds to wait: what the server asks for, or twice as long each time; a random share more, lest all workers come
    back at once."""
    seconds = min(2.0 ** (attempt - 1), LONGEST_WAIT)
    wanted = (asked or {}).get("Retry-After", "")
    try:
        seconds = float(wanted)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(wanted).timestamp() - time()
        except (ValueError, TypeError):
            pass
    return min(max(seconds, 0.0), LONGEST_WAIT) * random.uniform(1.0, 1.5)


class Ledger:
    """Answers by key, in a file that only grows. `with Ledger(path) as ledger`: one process at a time may write.

    A line that a killed process left half written is cut off; all others were promised and stay.
    """

    def __init__(self, path: str | Path):
        self.path, self.lines, self.lock = Path(path), {}, threading.Lock()
        self.prompt_tokens = self.completion_tokens = 0  # that all answers took

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b")
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{self.path} is in use by another run: wait for it, or choose another --out") from error
        self.file.seek(0)
        whole = 0
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self.remember(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.path}, line {number} is not an answer: mend or remove that line") from error
            whole += len(line)
        self.file.truncate(whole)
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def add(self, key: str, answer: Answer, **more) -> None:
        """Returns when the answer is safe on the disk."""
        row = {"key": key, **asdict(answer), **more}
        with self.lock:
            self.file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
            self.remember(row)

    def remember(self, row: dict) -> None:
        self.lines.setdefault(row["key"], []).append(row)
        self.prompt_tokens += row["prompt_tokens"]
        self.completion_tokens += row["completion_tokens"]

    def __getitem__(self, key: str) -> list[dict]:
        """All answers to a key, oldest first; none: []."""
        return self.lines.get(key, [])


def in_parallel(work: Callable, items: Iterable, workers: int, stop: threading.Event):
    """Yield work(item) as each is done, `workers` at a time; items are drawn only when a worker is free.

    Where work raises, or the caller stops reading, no new item is begun; those under way come to their end, for they
    may have been paid for.
    """
    with ThreadPoolExecutor(workers) as pool:
        pending = set()
        try:
            for item in items:
                pending.add(pool.submit(work, item))
                while len(pending) >= workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BaseException:
            stop.set()  # nobody waits any longer to ask again
            raise
