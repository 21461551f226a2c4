"""Files: atomic writes, readers of JSON, a lock. And InputError, an error that the user can fix."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: lock_file does nothing there
    fcntl = None


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what it is, what to do."""


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Yield a temporary path in the folder of `path`, to be written; then rename it to `path`.

    A reader sees the old file or the new one, never half of it, even after a crash.
    Raises InputError if the file cannot be written.
    """
    path = Path(path)
    temp = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temp.touch()
            mode = temp.stat().st_mode
            yield temp
            temp.chmod(mode)  # safetensors creates files that only their owner can read
            with open(temp, "rb") as file:
                os.fsync(file.fileno())  # the content must be on the disk before the name is
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_folder(folder: str | Path):
    """Yield a temporary folder next to `folder`, to be filled; then rename it to `folder`.

    Raises InputError if the folder exists already or cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already; remove it or choose another --out")
    temp = temporary_path(folder)
    try:
        temp.mkdir(parents=True)
        yield temp
        temp.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def temporary_path(path: Path) -> Path:
    """A hidden name in the same folder, so on the same disk, where a rename is one step."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def write_json(path: str | Path, value, indent: int | None = None) -> None:
    """Raises InputError if the file cannot be written."""
    with atomic_write(path) as temp:
        text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
        temp.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate becomes "?"


def read_text(path: str | Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises InputError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def read_json(path: str | Path):
    """The content of a JSON file. Raises InputError if it cannot be read or is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


SEPARATORS = re.compile(r"[\s,]*")  # between two items of a JSON list
BYTE_ORDER_MARK = "\xef\xbb\xbf"  # of UTF-8, as Latin-1


def read_json_list(path: str | Path):
    """Yield the items of a JSON list one by one. Raises InputError as `scan_json_list` does."""
    return (item for item, _, _ in scan_json_list(path))


def scan_json_list(path: str | Path):
    """Yield (item, start, end) for each item of a JSON list, which lies in bytes start to end.

    The text of a large file fits in memory; all its items as Python objects may not.
    Raises InputError if the file cannot be read or is not a JSON list.
    """
    try:
        # Latin-1 has one character for each byte, so a position in the text is one in the file
        text = Path(path).read_bytes().decode("latin-1")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    decoder = json.JSONDecoder()
    start = len(BYTE_ORDER_MARK) if text.startswith(BYTE_ORDER_MARK) else 0
    start = SEPARATORS.match(text, start).end()
    if text[start : start + 1] != "[":
        raise InputError(f"{path} is not a JSON list")
    start = SEPARATORS.match(text, start + 1).end()
    while text[start : start + 1] != "]":
        try:
            item, end = decoder.raw_decode(text, start)
            if not text[start:end].isascii():  # now as the UTF-8 that it is
                item = json.loads(text[start:end].encode("latin-1"))
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        yield item, start, end
        start = SEPARATORS.match(text, end).end()


def read_json_item(path: str | Path, start: int, end: int):
    """An item that `scan_json_list` found. Raises InputError if the file has changed since then."""
    with open(path, "rb") as file:
        file.seek(start)
        content = file.read(end - start)
    try:
        return json.loads(content)
    except ValueError as error:
        raise InputError(f"{path} has changed since it was opened: start again") from error


def read_jsonl(path: str | Path, keys: tuple[str, ...] = ()) -> list[dict]:
    """The objects of a JSONL file, each of which has `keys`.

    Raises InputError, with the line number, if a line is not JSON or lacks a key.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise InputError(f"{path}, line {number} lacks {', '.join(missing)}")
        rows.append(row)
    return rows


def lock_file(file, name: str | Path) -> None:
    """Lock an open file until it is closed. Raises InputError if another run holds the lock."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"{name} is in use by another run: wait for that run, or choose another --out"
        raise InputError(message) from error
