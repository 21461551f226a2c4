"""What the commands share: files that appear whole or not at all, mistakes that are told in one line."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two runs on one file are not kept apart
    fcntl = None


class InputError(ValueError):
    """Something the user gave is wrong: the message names it and says what to do about it."""


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Yield a path beside `path` to write to; it takes the name, in one step, once it is safe on the disk.

    Raises InputError where the place cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.touch()
            mode = beside.stat().st_mode
            yield beside
            beside.chmod(mode)  # safetensors makes its files for one user alone
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_folder(folder: str | Path):
    """Yield an empty folder beside `folder` to fill; it takes the name, in one step, once it is full.

    Raises InputError where the folder is there already, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} is there already; remove it or choose another --out")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path: str | Path, value, indent: int | None = None) -> None:
    with atomic_write(path) as beside:
        text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
        beside.write_text(text, encoding="utf-8", errors="replace")  # half a character is "?"


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def read_json(path: str | Path):
    """The content of a JSON file. Raises InputError, naming the file, where there is none or it is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


BETWEEN = re.compile(r"[\s,]*")  # what stands between the items of a JSON list


def read_json_list(path: str | Path):
    """The items of a JSON list, one by one, so that never all of a big one are in memory as Python's objects.

    Raises InputError, naming the file, where there is none or it is not such a list.
    """
    text, decoder = read_text(path), json.JSONDecoder()
    position = BETWEEN.match(text).end()
    if text[position : position + 1] != "[":
        raise InputError(f"{path} is not a JSON list")
    position = BETWEEN.match(text, position + 1).end()
    while text[position : position + 1] != "]":
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        yield item
        position = BETWEEN.match(text, position).end()


def read_jsonl(path: str | Path, needs: tuple[str, ...] = ()) -> list[dict]:
    """The objects of a JSONL file. Raises InputError, naming the line, where one is none or lacks a key."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        missing = [key for key in needs if not isinstance(row, dict) or key not in row]
        if missing:
            raise InputError(f"{path}, line {number} lacks {', '.join(missing)}")
        found.append(row)
    return found


def lock_file(file, name) -> None:
    """Keep an open file for this run until it is closed. Raises InputError, saying that `name` is in use, if it is."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{name} is in use by another run: wait for it, or choose another --out") from error
