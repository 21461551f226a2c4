"""The ledger keeps every paid answer of a language model (the data engine, section 3 of the paper).

It is a file with one JSON object per line and one line per answer. The file only grows, and an
answer counts only after its line is on disk, so no answer on disk is paid for twice. A killed run
loses only the answers that were in flight; they are requested again, and may be billed again.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ..infra.io import InputError
from ..infra.jsonl import JsonlFile


class RequestError(ValueError):
    """One request cannot be answered; other requests may succeed."""


@dataclass
class Answer:
    text: str
    prompt_tokens: int
    completion_tokens: int
    complete: bool  # False: cut off by a length limit or a content filter
    raw: str = ""  # the server's reply as it came, where no text was found in it


def guess_tokens(text: str) -> int:
    """Estimate the number of tokens: one per six letters of a word, per digit and per symbol."""
    return len(re.findall(r"[^\W\d_]{1,6}|\d|[^\w\s]", text))


def dollars(prompt_tokens: int, completion_tokens: int, price: tuple[float, float]) -> float:
    """The cost of tokens; price: dollars per million prompt and per million completion tokens."""
    return (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6


class Ledger(JsonlFile):
    """Answers by key. `with Ledger(path) as ledger` opens it for writing, one process at a time.

    To read a ledger without changing the disk, call `load` instead.
    """

    # older ledgers say "whole" instead of "complete"
    shape = {"key": str, "text": str, "prompt_tokens": float, "completion_tokens": float,
             "complete?": bool, "whole?": bool, "kind?": str, "model?": str}

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.answers = {}  # key -> the lines with this key, oldest first
        self.prompt_tokens = self.completion_tokens = 0  # sums over all answers

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def add(self, key: str, answer: Answer, **more) -> None:
        """Append an answer, with `more` fields; returns once it is safe on the disk."""
        row = {"key": key, **asdict(answer), **more}
        self.append(row if answer.raw else {name: row[name] for name in row if name != "raw"})

    def index(self, row: dict) -> None:
        row.setdefault("complete", row.pop("whole", None))
        if row["complete"] is None:
            raise InputError(f"{self.path}: the answer {row['key']} does not say whether it is "
                             "complete: correct or delete its line")
        self.prompt_tokens += row["prompt_tokens"]
        self.completion_tokens += row["completion_tokens"]
        self.answers.setdefault(row["key"], []).append(row)

    def __getitem__(self, key: str) -> list[dict]:
        """All answers with this key, oldest first; an empty list if there are none."""
        return self.answers.get(key, [])
