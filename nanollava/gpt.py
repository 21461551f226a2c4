"""A language model over REST: messages in, text out, and no answer that was paid for is ever lost or bought twice.

The client speaks /chat/completions, to OpenAI or any server that does as OpenAI does. The ledger is a file with one
JSON object a line, one line an answer, on the disk before the answer counts. The key is read from OPENAI_API_KEY, and
stands in no file and no message.
"""

import hashlib
import json
import os
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import requests

from .files import InputError, say
from .progress import Progress
from .web import Bearer, is_no_address, lock, pause, secret

OPENAI = "https://api.openai.com/v1"
ATTEMPTS = 8  # of one request that the network or the server fails
FIRST_ATTEMPTS = 3  # where no server was ever reached
HOPELESS = {401, 402, 403, 404, "401", "402", "403", "404", "insufficient_quota", "billing_not_active",
            "invalid_api_key", "model_not_found"}  # status, code or type of an error that every request would meet


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
    credit), and RequestError where this one cannot. timeout: seconds that one answer may take.
    """

    def __init__(self, model: str, base_url: str = OPENAI, timeout: float = 600.0):
        self.model, self.timeout, self.stop, self.reached = model, timeout, threading.Event(), False
        self.options = {"temperature": 1.0, "max_tokens": 2048}
        self.key = secret("OPENAI_API_KEY")
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
        self.auth = Bearer(self.key, "api-key", "") if host.endswith(".azure.com") else Bearer(self.key)

    def __call__(self, messages: list[dict]) -> Answer:
        problem, headers = "", None
        for attempt in range(ATTEMPTS):
            if attempt > 0 and self.stop.wait(pause(attempt, headers)):
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
                if is_no_address(error) or (nobody and not self.reached and attempt + 1 >= FIRST_ATTEMPTS):
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
        if HOPELESS & {status, str(error.get("code")), str(error.get("type"))}:
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


def guess_tokens(text: str) -> int:
    """About how many tokens a language model makes of a text: one of up to six letters, of each digit, of each sign."""
    return len(re.findall(r"[^\W\d_]{1,6}|\d|[^\w\s]", text))


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


ROOM = 1 << 18  # bytes that must be left on the disk: more than all answers under way


class Ledger:
    """Answers by key, in a file that only grows. `with Ledger(path) as ledger`: one process at a time may write.

    A line that a killed process left half written is cut off; all others were promised and stay. Who only wants to
    know what is there calls `load`, which changes nothing on the disk.
    """

    def __init__(self, path: str | Path):
        self.path, self.lines, self.lock = Path(path), {}, threading.Lock()
        self.prompt_tokens = self.completion_tokens = 0  # that all answers took

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b")
        lock(self.file, self.path)
        whole = self.load()
        try:
            self.file.write(b" " * ROOM)  # before anything is bought: is there room to keep it?
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
        finally:
            self.file.truncate(whole)
        return self

    def load(self) -> int:
        """Read what is on the disk; how many bytes of it are whole lines."""
        whole = 0
        if not self.path.exists():
            return whole
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self.remember(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{self.path}, line {number} is not an answer: mend or remove that line") from error
                whole += len(line)
        return whole

    def __exit__(self, kind, *error) -> None:
        if not self.lines:
            self.path.unlink(missing_ok=True)
        if kind is not KeyboardInterrupt:  # then answers may still be under way: it stays ours until this process ends
            self.file.close()

    def add(self, key: str, answer: Answer, **more) -> None:
        """Returns when the answer is safe on the disk; also after the ledger was closed, for one that was under way."""
        row = {"key": key, **asdict(answer), **more}
        with self.lock:
            with open(self.path, "ab") as file:
                whole = file.tell()
                try:
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                except OSError as error:
                    os.truncate(self.path, whole)  # no half line for the next one to be added to
                    raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
            self.remember(row)

    def remember(self, row: dict) -> None:
        text, whole = row["text"], row["whole"]
        if not isinstance(text, str) or not isinstance(whole, bool):
            raise TypeError
        self.prompt_tokens += row["prompt_tokens"]
        self.completion_tokens += row["completion_tokens"]
        self.lines.setdefault(row["key"], []).append(row)

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
            under_way = sum(future.running() for future in pending)
            if under_way:
                say(f"\nwaiting for {under_way} answers that are under way, for they may be paid for")
            raise


TRIES = 3  # of one request, as long as the replies must be rejected


class Job:
    """Many requests of one kind to one model, one good answer each, from a ledger and a `chat` that fills it.

    Of each item, `messages` makes what is asked, and `read`, with a reply, what is wanted; it raises ValueError,
    saying why, for a reply that must be asked for again. `name` begins the item's key in the ledger; `unit` is what
    the user calls the items. What comes out depends on the ledger and on these alone.
    """

    def __init__(self, kind: str, model: str, ledger: Ledger, items: list, unit: str, name: Callable,
                 messages: Callable, read: Callable):
        self.kind, self.model, self.ledger, self.items, self.unit = kind, model, ledger, items, unit
        self.name, self.messages, self.read = name, messages, read

    def key(self, item) -> str:
        """Names a request in the ledger: other words, or another model, are another request."""
        asked = json.dumps([self.model, self.messages(item)], ensure_ascii=True)
        return f"{self.name(item)}-{self.kind}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"

    def judge(self, item, answer: dict) -> tuple[object, str | None]:
        """What is wanted and None, or None and why the answer must be asked for again."""
        try:
            found = self.read(item, answer["text"])
        except ValueError as error:
            return None, str(error)
        return (found, None) if answer["whole"] else (None, "it was cut off")

    def replies(self, item) -> tuple[object, list[str]]:
        """What the ledger has for an item: what is wanted, from the first good answer, and why others were rejected."""
        judged = [self.judge(item, answer) for answer in self.ledger[self.key(item)]]
        return next((found for found, problem in judged if not problem), None), [why for _, why in judged if why]

    def open(self) -> list:
        """The items that still need an answer, and have not had all their tries.

        Raises InputError where the ledger is another job's.
        """
        others = {(answer.get("kind"), answer.get("model")) for answers in self.ledger.lines.values()
                  for answer in answers} - {(self.kind, self.model)}
        if others:
            raise InputError(f"{self.ledger.path} holds answers of another kind or model "
                             f"{sorted(map(str, others))}: write elsewhere")
        replies = ((item, *self.replies(item)) for item in self.items)
        return [item for item, found, rejected in replies if found is None and len(rejected) < TRIES]

    def result(self) -> tuple[list, Counter, int]:
        """What is wanted of each item, in their order, None where there is nothing yet; how many replies were
        rejected, by reason; how many items were given up, after all their tries."""
        results, reasons, given_up = [], Counter(), 0
        for found, rejected in map(self.replies, self.items):
            results.append(found)
            reasons.update(rejected)
            given_up += found is None and len(rejected) >= TRIES
        return results, reasons, given_up

    def ask(self, item, chat: Chat, may_buy: Callable[[], bool]) -> str | None:
        """Buy answers for an item until one is good; None, or why there is none."""
        key, problem = self.key(item), "no try is left"
        while len(self.ledger[key]) < TRIES:
            if not may_buy():
                return "stopped, or the budget is spent"
            try:
                answer = chat(self.messages(item))
            except RequestError as error:
                return str(error)
            _, problem = self.judge(item, asdict(answer))
            self.ledger.add(key, answer, kind=self.kind, model=self.model, rejected=problem)
            if problem is None:
                return None
        return problem

    def run(self, chat: Chat, workers: int = 4, max_tokens: float = float("inf"), price=(0.0, 0.0)) -> Counter:
        """Ask for what is missing, until the ledger holds `max_tokens` (the answers then under way still come); how
        many items failed, by reason.

        price: dollars for a million tokens read and written, for the progress line alone. Raises InputError where
        nothing succeeds any more.
        """
        missing, failed, in_a_row = self.open(), Counter(), 0

        def may_buy() -> bool:
            spent = self.ledger.prompt_tokens + self.ledger.completion_tokens
            return spent < max_tokens and not chat.stop.is_set()

        answers = in_parallel(lambda item: self.ask(item, chat, may_buy), takewhile(lambda _: may_buy(), missing),
                              workers, chat.stop)
        with Progress(f"{self.model}: {self.kind}", len(missing), self.unit) as progress, closing(answers):
            for done, problem in enumerate(answers, 1):
                in_a_row = in_a_row + 1 if problem else 0
                if problem:
                    if not failed:
                        progress.tell(f"one of the {self.unit} failed: {problem}")
                    failed[problem] += 1
                if in_a_row >= 10 + workers:
                    raise InputError(f"{in_a_row} {self.unit} in a row failed, the last for this: {problem}")
                read, written = self.ledger.prompt_tokens, self.ledger.completion_tokens
                cost = dollars(read, written, price)
                progress.update(done, f"{(read + written) / 1000:.0f}K tokens" + (f"  ${cost:.2f}" if cost else "")
                                + (f"  {sum(failed.values())} failed" if failed else ""))
        return failed


def dollars(read: int, written: int, price: tuple[float, float]) -> float:
    """What tokens cost, at prices for a million read and a million written."""
    return (read * price[0] + written * price[1]) / 1e6
