"""Answers that were paid for, kept for good."""

import json
import os
import re
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from ..infra.io import InputError, lock_file


class RequestError(ValueError):
    """This one request cannot be answered; others may."""


@dataclass
class Answer:
    text: str
    prompt_tokens: int
    completion_tokens: int
    complete: bool  # False: cut off, by a limit or a filter


def guess_tokens(text: str) -> int:
    """About how many tokens a language model makes of a text: one of up to six letters, of each digit, of each sign."""
    return len(re.findall(r"[^\W\d_]{1,6}|\d|[^\w\s]", text))


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
        lock_file(self.file, self.path)
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
        row["complete"] = row.pop("whole") if "whole" in row else row["complete"]
        if not isinstance(row["text"], str) or not isinstance(row["complete"], bool):
            raise TypeError
        self.prompt_tokens += row["prompt_tokens"]
        self.completion_tokens += row["completion_tokens"]
        self.lines.setdefault(row["key"], []).append(row)

    def __getitem__(self, key: str) -> list[dict]:
        """All answers to a key, oldest first; none: []."""
        return self.lines.get(key, [])


def dollars(read: int, written: int, price: tuple[float, float]) -> float:
    """What tokens cost, at prices for a million read and a million written."""
    return (read * price[0] + written * price[1]) / 1e6
