"""Many requests to a language model, one good answer each (the data engine, section 3).

The data engine and both judges of section 5 are jobs. A `Job` says which requests there are and
which replies are good, the ledger keeps the replies, and `chat`, any callable from messages to an
`Answer`, makes them. Rejected replies are retried.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice, takewhile

from ..infra.io import InputError
from ..infra.progress import Progress, print0
from .ledger import Ledger, RequestError, dollars

TRIES = 3  # replies per item; if all of them are rejected, the item is given up
_TAG = r"(?:think|thinking|thought|reasoning)>"
_THOUGHTS = re.compile(rf"\A.*</{_TAG}|<{_TAG}.*", re.IGNORECASE | re.DOTALL)


@dataclass
class Job:
    """Requests of one kind to one model. Results depend on these fields and the ledger alone."""

    kind: str  # the task; part of every key in the ledger
    model: str  # name of the language model
    ledger: Ledger
    items: list  # one request each; their type is up to the three functions below
    unit: str  # what messages to the user call the items: "images"
    item_id: Callable  # (item) -> text that begins the item's key in the ledger
    messages: Callable  # (item) -> the messages of its request, as the chat API takes them
    parse: Callable  # (item, reply) -> its result; ValueError, with the reason, rejects the reply

    def key(self, item) -> str:
        """The item's key in the ledger; another model or other messages make another key."""
        request = json.dumps([self.model, self.messages(item)], ensure_ascii=True)
        digest = hashlib.sha256(request.encode()).hexdigest()[:16]
        return f"{self.item_id(item)}-{self.kind}-{digest}"

    def check(self, item, answer: dict) -> tuple[object, str | None]:
        """(result, None) for a good answer, (None, reason) for one that is rejected."""
        text = remove_thoughts(answer["text"])
        if answer["text"] and not answer["complete"]:
            return None, "the reply was cut off"
        if not text:
            return None, "the reply has no text"
        try:
            return self.parse(item, text), None
        except ValueError as error:
            return None, str(error)

    def replies(self, item) -> tuple[object, list[str]]:
        """From the ledger: the first good result or None, and the reasons of rejected answers."""
        checked = [self.check(item, answer) for answer in self.ledger[self.key(item)]]
        result = next((result for result, reason in checked if reason is None), None)
        return result, [reason for _, reason in checked if reason is not None]

    def pending(self) -> list:
        """The items that have no accepted answer yet and have tries left.

        Raises InputError if the ledger belongs to another job.
        """
        kinds = {(answer.get("kind"), answer.get("model"))
                 for answers in self.ledger.answers.values() for answer in answers}
        kinds.discard((self.kind, self.model))
        if kinds:
            raise InputError(f"{self.ledger.path} holds answers of another kind or model "
                             f"{sorted(map(str, kinds))}: choose another output")
        replies = ((item, *self.replies(item)) for item in self.items)
        return [item for item, result, reasons in replies
                if result is None and len(reasons) < TRIES]

    def result(self) -> tuple[list, Counter, int]:
        """(one result or None per item, rejected replies by reason, items given up)."""
        results, rejected, given_up = [], Counter(), 0
        for result, reasons in map(self.replies, self.items):
            results.append(result)
            rejected.update(reasons)
            given_up += result is None and len(reasons) >= TRIES
        return results, rejected, given_up

    def ask(self, item, chat: Callable, may_request: Callable[[], bool]) -> str | None:
        """Request answers for an item until one is good. Returns None, or why there is none."""
        key, reason = self.key(item), "no tries are left"
        while len(self.ledger[key]) < TRIES:
            if not may_request():
                return "stopped, or the token budget is spent"
            try:
                answer = chat(self.messages(item))
            except RequestError as error:
                return str(error)
            _, reason = self.check(item, asdict(answer))
            self.ledger.add(key, answer, kind=self.kind, model=self.model, rejected=reason)
            if reason is None:
                return None
        return reason

    def run(self, chat: Callable, workers: int = 4, max_tokens: float = float("inf"),
            price: tuple[float, float] = (0.0, 0.0)) -> Counter:
        """Request all pending answers, `workers` at a time. Returns the failed items by reason.

        chat: messages -> Answer; setting its `stop` event ends the run. max_tokens: no request
        starts once the ledger holds this many. price: dollars per million prompt and completion
        tokens, for the progress line. Raises InputError when nothing succeeds any more.
        """
        pending, failed, failed_in_a_row = self.pending(), Counter(), 0

        def may_request() -> bool:
            return self.ledger.total_tokens < max_tokens and not chat.stop.is_set()

        outcomes = in_parallel(lambda item: self.ask(item, chat, may_request),
                               takewhile(lambda _: may_request(), pending), workers, chat.stop)
        label = f"{self.model}: {self.kind}"
        # closing: if this loop raises, requests in flight finish and are kept before run returns
        with Progress(label, len(pending), self.unit) as progress, closing(outcomes):
            for done, reason in enumerate(outcomes, 1):
                failed_in_a_row = failed_in_a_row + 1 if reason else 0
                if reason:
                    if not failed:
                        print0(f"first failure among the {self.unit}: {reason}")
                    failed[reason] += 1
                if failed_in_a_row >= 10 + workers:
                    raise InputError(f"{failed_in_a_row} {self.unit} failed in a row, "
                                     f"the last because: {reason}")
                progress.update(done, self.summary(price, failed.total()))
        return failed

    def summary(self, price: tuple[float, float], failed: int) -> str:
        """Tokens, cost and failures so far, for the progress line."""
        parts = [f"{self.ledger.total_tokens / 1000:.0f}K tokens"]
        if any(price):
            cost = dollars(self.ledger.prompt_tokens, self.ledger.completion_tokens, price)
            parts.append(f"${cost:.2f}")
        if failed:
            parts.append(f"{failed} failed")
        return "  ".join(parts)


def remove_thoughts(reply: str) -> str:
    """A reply without the thoughts that reasoning models write before it.

    The opening tag may be missing, if the prompt ended with it, or the closing tag, if the reply
    was cut off.
    """
    return _THOUGHTS.sub("", reply).strip()


def in_parallel(function: Callable, items: Iterable, workers: int, stop: threading.Event):
    """Yield function(item) as each finishes, `workers` at a time; items are drawn on demand.

    If function raises, or the caller stops reading, no new item starts. Items in flight finish,
    since they may have been paid for.
    """
    items, futures = iter(items), set()
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures |= {pool.submit(function, item) for item in islice(items, workers)}
            while futures:
                done, futures = wait(futures, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
                futures |= {pool.submit(function, item) for item in islice(items, len(done))}
        except BaseException:
            stop.set()  # ends every wait between two attempts
            running = sum(future.running() for future in futures)
            if running:
                print0(f"waiting for {running} requests in flight, which may be paid for")
            raise
