"""Many requests, one good answer each."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict
from itertools import takewhile

from ..infra.io import InputError
from ..infra.progress import Progress, print0
from .ledger import Ledger, RequestError, dollars


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
                print0(f"\nwaiting for {under_way} answers that are under way, for they may be paid for")
            raise


TRIES = 3  # of one request, as long as the replies must be rejected


class Job:
    """Many requests of one kind to one model, one good answer each, from a ledger and a `chat` that fills it.

    Of each item, `messages` makes what is asked, and `read`, with a reply, what is wanted; it raises ValueError,
    saying why, for a reply that must be asked for again. `name` begins the item's key in the ledger; `unit` is what
    the user calls the items. What comes out depends on the ledger and on these alone.
    """

    def __init__(self, kind: str, model: str, ledger: Ledger, items: list, unit: str, item_id: Callable,
                 messages: Callable, parse: Callable):
        self.kind, self.model, self.ledger, self.items, self.unit = kind, model, ledger, items, unit
        self.item_id, self.messages, self.parse = item_id, messages, parse

    def key(self, item) -> str:
        """Names a request in the ledger: other words, or another model, are another request."""
        asked = json.dumps([self.model, self.messages(item)], ensure_ascii=True)
        return f"{self.item_id(item)}-{self.kind}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"

    def judge(self, item, answer: dict) -> tuple[object, str | None]:
        """What is wanted and None, or None and why the answer must be asked for again."""
        try:
            found = self.parse(item, answer["text"])
        except ValueError as error:
            return None, str(error)
        return (found, None) if answer["complete"] else (None, "it was cut off")

    def replies(self, item) -> tuple[object, list[str]]:
        """What the ledger has for an item: what is wanted, from the first good answer, and why others were rejected."""
        judged = [self.judge(item, answer) for answer in self.ledger[self.key(item)]]
        return next((found for found, problem in judged if not problem), None), [why for _, why in judged if why]

    def pending(self) -> list:
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

    def ask(self, item, chat: Callable, may_buy: Callable[[], bool]) -> str | None:
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

    def run(self, chat: Callable, workers: int = 4, max_tokens: float = float("inf"), price=(0.0, 0.0)) -> Counter:
        """Ask for what is missing, until the ledger holds `max_tokens` (the answers then under way still come); how
        many items failed, by reason.

        price: dollars for a million tokens read and written, for the progress line alone. Raises InputError where
        nothing succeeds any more.
        """
        missing, failed, in_a_row = self.pending(), Counter(), 0

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
                        progress.write(f"one of the {self.unit} failed: {problem}")
                    failed[problem] += 1
                if in_a_row >= 10 + workers:
                    raise InputError(f"{in_a_row} {self.unit} in a row failed, the last for this: {problem}")
                read, written = self.ledger.prompt_tokens, self.ledger.completion_tokens
                cost = dollars(read, written, price)
                progress.update(done, f"{(read + written) / 1000:.0f}K tokens" + (f"  ${cost:.2f}" if cost else "")
                                + (f"  {sum(failed.values())} failed" if failed else ""))
        return failed
