"""A JSONL file that only grows, as the ledger of paid answers does. A killed run loses no line."""

import contextlib
import json
import os
import threading
from pathlib import Path

from .io import InputError, lock_file, sync_folder
from .json_io import parse_json, read_jsonl

RESERVED_BYTES = 1 << 18  # must be free on the disk: more than all answers in flight take


class JsonlFile:
    """Rows that are appended to a file. `with` opens it for writing, one process at a time.

    A row counts only after its line is on the disk. Opening cuts off a last line that a killed
    process left half written; a complete one gets the newline that it lacks.
    To read the file without changing the disk, call `load` instead.
    A subclass defines `index` and the `shape` of a row (shapes.py), its first field first.
    """

    shape: dict

    def __init__(self, path: str | Path):
        self.path, self.lock = Path(path), threading.Lock()

    def index(self, row: dict) -> None:
        """Called with each row, oldest first: on reading, and after it is appended."""
        raise NotImplementedError

    def load(self) -> None:
        """Read the file, if it exists. Raises InputError for a row of another shape."""
        if self.path.exists():
            for row in read_jsonl(self.path, self.shape, growing=True):
                self.index(row)

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b")
        lock_file(self.file, self.path)
        self.load()
        self.end_last_line()
        self.append_bytes(b" " * RESERVED_BYTES)  # buy nothing that a full disk could not keep
        os.truncate(self.path, self.path.stat().st_size - RESERVED_BYTES)
        sync_folder(self.path.parent)  # the file itself may be new
        return self

    def end_last_line(self) -> None:
        line = b""
        self.file.seek(0)
        for line in self.file:
            pass
        if self.is_half_row(line):
            self.file.truncate(self.file.tell() - len(line))
        elif not line.endswith(b"\n"):
            parse_json(line, f"{self.path}, last line", self.shape)
            self.append_bytes(b"\n")

    def is_half_row(self, line: bytes) -> bool:
        """Whether a killed run left this last line. Nothing else is ever cut off."""
        start = f'{{"{next(iter(self.shape))}"'.encode()
        if not line.strip(b" \0"):  # reserved space; zeros after a power failure
            return True
        try:
            parse_json(line, "")
        except InputError:
            return start.startswith(line[: len(start)]) and not line.endswith(b"\n")
        return False

    def __exit__(self, error_type, *error) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not self.path.stat().st_size:
                self.path.unlink()
        # after Ctrl-C answers may still be in flight: keep the lock until this process ends
        if error_type is not KeyboardInterrupt:
            self.file.close()

    def append(self, *rows: dict) -> None:
        """Append rows; returns once they are safe on the disk.

        Works after the file was closed, too, for an answer that was in flight at that time.
        Raises InputError if the disk is full; the file is then as before.
        """
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        # a lone surrogate has no UTF-8: it becomes \ud83d, which JSON reads as the surrogate
        content = "".join(lines).encode(errors="backslashreplace")
        with self.lock:
            self.append_bytes(content)
            for row in rows:
                self.index(row)

    def append_bytes(self, content: bytes) -> None:
        with open(self.path, "ab") as file:
            end = file.tell()
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                os.truncate(self.path, end)  # the next line must not follow half a line
                raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
