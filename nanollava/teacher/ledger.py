"""The ledger keeps every paid answer of a language model (the data engine, section 3 of the paper).

It is a file with one JSON object per line and one line per answer. The file only grows, and an
answer counts only after its line is on disk. A killed run therefore loses at most the answers that
were in flight, and no request is paid for twice.
"""

import json
import os
import re
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from ..infra.io import InputError, lock_file

RESERVED_BYTES = 1 << 18  # must be free on the disk: more than all answers in flight take


class RequestError(ValueError):
    """One request cannot be answered; other requests may succeed."""


@dataclass
class Answer:
    text: str
    prompt_tokens: int
    completion_tokens: int
    complete: bool  # False: cut off by a length limit or a content filter


def guess_tokens(text: str) -> int:
    """Estimate the number of tokens: one per six letters of a word, per digit and per symbol."""
    return len(re.findall(r"[^\W\d_]{1,6}|\d|[^\w\s]", text))


def dollars(prompt_tokens: int, completion_tokens: int, price: tuple[float, float]) -> float:
    """The cost of tokens; price: dollars per million prompt and per million completion tokens."""
    return (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6


class Ledger:
    """Answers by key. `with Ledger(path) as ledger` opens it for writing, one process at a time.

    Opening cuts off a last line that a killed process left unfinished; every other line stays.
    To read a ledger without changing the disk, call `load` instead.
    """

    def __init__(self, path: str | Path):
        self.path, self.lock = Path(path), threading.Lock()
        self.answers = {}  # key -> the lines with this key, oldest first
        self.prompt_tokens = self.completion_tokens = 0  # sums over all answers

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b")
        lock_file(self.file, self.path)
        end = self.load()
        try:
            # pay for nothing that a full disk could not keep
            self.file.write(b" " * RESERVED_BYTES)
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
        finally:
            self.file.truncate(end)  # removes the reserve and an unfinished last line
        return self

    def load(self) -> int:
        """Read the file, if it exists. Returns the number of bytes in finished lines.

        Raises InputError, naming the line, for a finished line that is not an answer.
        """
        end = 0
        if not self.path.exists():
            return end
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._index(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise InputError(f"{self.path}, line {number} is not an answer: "
                                     "correct or delete that line") from error
                end += len(line)
        return end

    def __exit__(self, error_type, *error) -> None:
        if not self.answers:
            self.path.unlink(missing_ok=True)
        # after Ctrl-C answers may still be in flight: keep the lock until this process ends
        if error_type is not KeyboardInterrupt:
            self.file.close()

    def add(self, key: str, answer: Answer, **more) -> None:
        """Append an answer, with `more` fields; returns once it is safe on disk.

        Works after the ledger was closed, too, for an answer that was in flight at that time.
        Raises InputError if the disk is full.
        """
        row = {"key": key, **asdict(answer), **more}
        with self.lock, open(self.path, "ab") as file:
            end = file.tell()
            try:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                os.truncate(self.path, end)  # the next line must not follow half a line
                raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
            self._index(row)

    def _index(self, row: dict) -> None:
        row.setdefault("complete", row.pop("whole", None))  # older ledgers say "whole"
        if not isinstance(row["text"], str) or not isinstance(row["complete"], bool):
            raise TypeError
        self.prompt_tokens += row["prompt_tokens"]
        self.completion_tokens += row["completion_tokens"]
        self.answers.setdefault(row["key"], []).append(row)

    def __getitem__(self, key: str) -> list[dict]:
        """All answers with this key, oldest first; an empty list if there are none."""
        return self.answers.get(key, [])
