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

CHUNK = 2**20  # bytes of a large file that are read at a time
DECODER = json.JSONDecoder()
LIST_START = re.compile(rb"(\xef\xbb\xbf)?\s*\[")  # after UTF-8's byte order mark
SEPARATORS = re.compile(r"[\s,]*")  # between two items
ITEM_END = re.compile(r"[\s,\]]")  # follows a complete item: 12 may be the start of 12.5


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
        temp.touch()
        mode = temp.stat().st_mode
        yield temp
        temp.chmod(mode)  # safetensors creates files that only their owner can read
        with open(temp, "rb") as file:
            os.fsync(file.fileno())  # the content must be on the disk before the name is
        os.replace(temp, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


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


def check_regular_file(path: str | Path) -> None:
    """Raise InputError if `path` is a folder, FIFO, device or socket: reading may never end.

    The reader itself reports a missing file.
    """
    if not os.path.isfile(path) and os.path.exists(path):
        raise InputError(f"{path} is not a file: a folder, FIFO or device is not read")


def path_inside(folder: str | Path, name: str) -> str:
    """The path of a file in a folder, for a name that comes from data.

    Raises InputError if the name is absolute or leads out of the folder by `..`. Only the name is
    checked: the folder and what is in it may be links, to another disk for example.
    """
    normal = os.path.normpath(name)
    if os.path.splitdrive(normal)[0] or f"{normal}{os.sep}".startswith((os.sep, f"..{os.sep}")):
        raise InputError(f"{name!r} is outside of {folder}: name files by their path in it")
    return os.path.join(folder, normal)


@contextlib.contextmanager
def reading(path: str | Path):
    """Turn errors of reading a JSON file into InputError."""
    check_regular_file(path)
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def read_text(path: str | Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises InputError if it cannot be read."""
    with reading(path):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: str | Path):
    """The content of a JSON file. Raises InputError if it cannot be read or is not JSON."""
    with reading(path):
        return json.loads(read_text(path))


def hash_file(digest, path: str | Path):
    """Feed a file to a `hashlib` object chunk by chunk and return it."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest


def read_json_list(path: str | Path):
    """Yield the items of a JSON list one by one. Raises InputError as `scan_json_list` does."""
    return (item for item, _, _ in scan_json_list(path))


def scan_json_list(path: str | Path):
    """Yield (item, start, end) for each item of a JSON list, which lies in bytes start to end.

    Only a chunk of the file and one item are in memory at a time.
    Raises InputError if the file cannot be read or is not a JSON list.
    """
    with reading(path), open(path, "rb") as file:
        opening = LIST_START.match(file.read(CHUNK))
        if not opening:
            raise InputError(f"{path} is not a JSON list")
        # Latin-1 has one character for each byte: text[i] is byte offset + i of the file
        text, start, offset = "", 0, file.seek(opening.end())
        while True:
            start = SEPARATORS.match(text, start).end()
            if text.startswith("]", start):
                return
            try:
                item, end = decode_item(text, start)
            except json.JSONDecodeError as error:  # most likely, the chunk ends inside this item
                more = file.read(max(CHUNK, len(text) - start))
                if not more:
                    raise InputError(f"{path} is not JSON: {error.msg} in the item at byte "
                                     f"{offset + start}") from error
                text, start, offset = text[start:] + more.decode("latin-1"), 0, offset + start
                continue
            yield item, offset + start, offset + end
            start = end


def decode_item(text: str, start: int):
    """An item of a list, and its end in the text, which is the file's bytes as Latin-1."""
    item, end = DECODER.raw_decode(text, start)
    if not ITEM_END.match(text, end):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    if not text[start:end].isascii():  # now as the UTF-8 that it is
        item = json.loads(text[start:end].encode("latin-1"))
    return item, end


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
