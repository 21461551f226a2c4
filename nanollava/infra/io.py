"""Files: atomic writes, readers of JSON, a lock. And InputError, an error that the user can fix."""

import contextlib
import glob
import json
import math
import os
import platform
import re
import shutil
import time
import types
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: lock_file does nothing there
    fcntl = None

LOCK = ".lock"  # in a folder that a run writes to
HOST = platform.node()[:32]
PART_OWNER = re.compile(r"\.(\d{1,8})(?:@(.*))?\.part$")  # process, machine
CHUNK = 2**20  # bytes of a large file that are read at a time
DECODER = json.JSONDecoder()
LIST_START = re.compile(rb"(\xef\xbb\xbf)?\s*\[")  # after UTF-8's byte order mark
SEPARATORS = re.compile(r"[ \t\r\n,]*")  # between two items
ITEM_END = re.compile(r"[ \t\r\n,\]]")  # follows a complete item: 12 may be the start of 12.5
KINDS = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false",
         type(None): "null", list: "a list", dict: "an object"}


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what it is, what to do."""


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Yield a temporary path in the folder of `path`, to be written; then rename it to `path`.

    A reader sees the old file or the new one, never half of it, even after a crash. A link keeps
    its place: the file that it leads to is written.
    Raises InputError if the file cannot be written, or is none: a folder, a device, a FIFO.
    """
    path = link_target(path)
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
        sync_folder(path.parent)
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
    if os.path.exists(folder):
        raise InputError(f"{folder} exists already; remove it or choose another --out")
    folder = Path(os.path.realpath(folder))
    temp = temporary_path(folder)
    try:
        temp.mkdir(parents=True)
        yield temp
        temp.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def link_target(path: str | Path) -> Path:
    """The file that a path leads to, whether it exists or not.

    Raises InputError if it is no file: a rename would replace a device, /dev/stdout for example.
    """
    path, target = Path(path), os.path.realpath(path)
    if not os.path.isfile(path) and (os.path.exists(path) or os.path.islink(target)):
        raise InputError(f"cannot write {path}: it is not a file")
    return Path(target)


def check_writable(path: str | Path, is_folder: bool = False) -> None:
    """Raise InputError if a file cannot be written to `path`, or a file into a folder `path`.

    Creates the temporary file of `atomic_write`, in the nearest folder that exists, and removes it.
    """
    target = Path(os.path.realpath(path), "config.json") if is_folder else link_target(path)
    try:
        folder = next(folder for folder in target.parents if os.path.lexists(folder))
        temp = temporary_path(folder / target.name)
        temp.touch()
        temp.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """A hidden name in the same folder, so on the same disk, where a rename is one step.

    It names this process and machine. What killed runs left under such names is removed here.
    """
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):  # another user's, or removed by another run
            if is_abandoned(part):
                shutil.rmtree(part) if part.is_dir() else part.unlink()
    return path.with_name(f".{path.name}.{os.getpid()}@{HOST}.part")


def is_abandoned(part: Path) -> bool:
    """Whether the process that wrote a `.NAME.PID@HOST.part` is gone.

    The disk may be shared with machines whose processes cannot be looked up, and older versions
    did not name the machine: such a part is abandoned when it was not written to for a day.
    """
    match = PART_OWNER.search(part.name)
    if not match:
        return False
    pid, host = int(match[1]), match[2]
    if host == HOST and os.name == "posix":  # on Windows, os.kill would end the process
        try:
            os.kill(pid, 0)  # sends no signal, only looks for the process
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's process
            return False
        return pid == os.getpid()  # this process does not write one file twice at the same time
    return time.time() - part.stat().st_mtime > 86_400


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
    """Turn errors of reading a file into InputError."""
    check_regular_file(path)
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def decode_utf8(content: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark. Raises InputError, which begins with `where`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error}") from error


def parse_json(content: bytes, where: str, shape=object):
    """The value of a JSON text in UTF-8. Raises InputError, which begins with `where`, if it is not
    JSON or has another shape, see `shape_error`."""
    text = decode_utf8(content, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: nested too deeply
        raise InputError(f"{where} is not JSON: {error if text else 'it is empty'}") from error
    check_shape(value, shape, where)
    return value


def read_json(path: str | Path, shape=object):
    """The content of a JSON file. Raises InputError as `parse_json` does."""
    with reading(path):
        content = Path(path).read_bytes()
    return parse_json(content, str(path), shape)


# ---------------------------------------------------------------------------------------------
# Shapes: what the reader of a file expects of it


def check_shape(value, shape, where: str) -> None:
    """Raises InputError, which begins with `where`, unless a value has a shape."""
    if error := shape_error(value, shape):
        raise InputError(f"{where}: {error}")


def shape_error(value, shape) -> str | None:
    """What is wrong with a JSON value, or None if it has a shape, which is one of:

        str, int, float, int | None   a type or several; integers are floats, but no other mix
        range(1, 10), (0.0, 1.0)      an integer of the range; a number from the first to the second
        [shape], [shape, shape]       a list of any length; a list of this length
        {"id": int, "image?": str}    an object; image may be absent or null, other fields may exist
        {str: shape}                  an object with any fields
        a function                    raises ValueError with what is wrong: "is not ..."

        >>> shape_error({"rows": [{"id": 1}, {"id": None}]}, {"rows": [{"id": int | str}]})
        'rows[1].id must be an integer or a string, not null'
    """
    if fault := find_fault(value, shape):
        place, reason = fault
        return f"{place.removeprefix('.') or 'it'} {reason}"


def find_fault(value, shape) -> tuple[str, str] | None:
    """(place, reason) of the first part of a value that does not have its shape."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in (dict.fromkeys(value, shape[str]) if str in shape else shape).items():
            name = key if str in shape else key.removesuffix("?")
            if name != key and value.get(name) is None:
                continue
            if name not in value:
                return "", f"has no {name!r}"
            if fault := find_fault(value[name], inner):
                return f".{name if name.isidentifier() else quote(name)}{fault[0]}", fault[1]
    elif isinstance(shape, list) and isinstance(value, list) and len(shape) in (1, len(value)):
        for number, item in enumerate(value):
            if fault := find_fault(item, shape[number % len(shape)]):
                return f"[{number}]{fault[0]}", fault[1]
    elif isinstance(shape, types.FunctionType):
        try:
            shape(value)
        except ValueError as error:
            return "", str(error)
    elif not has_kind(value, shape):
        return "", f"must be {describe(shape)}, not {quote(value)}"


def has_kind(value, shape) -> bool:
    """Whether a value without parts has a shape without parts."""
    number = type(value) is int or (type(value) is float and math.isfinite(value))
    if isinstance(shape, tuple):
        return number and shape[0] <= value <= shape[1]
    if isinstance(shape, range):
        return type(value) is int and value in shape
    kinds = getattr(shape, "__args__", (shape,))  # of a union
    return (type(value) in kinds and (number or type(value) is not float)
            or object in kinds or (float in kinds and number and abs(value) < 1e308))


def describe(shape) -> str:
    """A shape in words: "an integer or a string"."""
    if isinstance(shape, tuple):
        return f"a number from {shape[0]:g} to {shape[1]:g}"
    if isinstance(shape, range):
        return f"an integer from {shape.start} to {shape.stop - 1}"
    if isinstance(shape, (list, dict)):
        length = f" of {len(shape)}" if len(shape) > 1 and isinstance(shape, list) else ""
        return KINDS[type(shape)] + length
    return " or ".join(KINDS[kind] for kind in getattr(shape, "__args__", (shape,)))


def quote(value) -> str:
    """A JSON value in a message: in one line, and short."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, dict):
        return KINDS[type(value)]
    text = repr(value) if isinstance(value, (str, float)) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# ---------------------------------------------------------------------------------------------
# Large files: a list item by item, or lines


def hash_file(digest, path: str | Path):
    """Feed a file to a `hashlib` object chunk by chunk and return it."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest


def read_json_list(path: str | Path) -> Iterator:
    """Yield the items of a JSON list one by one. Raises InputError as `scan_json_list` does."""
    return (item for item, _, _ in scan_json_list(path))


def scan_json_list(path: str | Path) -> Iterator[tuple]:
    """Yield (item, start, end) for each item of a JSON list, which lies in bytes start to end.

    Only a chunk of the file and one item are in memory at a time.
    Raises InputError if the file cannot be read or holds anything but one JSON list.
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
                break
            try:
                item, end = decode_item(text, start)
            except (ValueError, RecursionError) as error:
                more = b"" if is_final(error, text) else file.read(max(CHUNK, len(text) - start))
                if not more:
                    raise InputError(f"{path} is not JSON: {getattr(error, 'msg', error)} in the "
                                     f"item at byte {offset + start}") from error
                text, start, offset = text[start:] + more.decode("latin-1"), 0, offset + start
                continue
            yield item, offset + start, offset + end
            start = end
        if (text[start + 1 :].encode("latin-1") + file.read(CHUNK)).strip():
            raise InputError(f"{path} has text after its list, which ends at byte "
                             f"{offset + start}: join several lists into one")


def decode_item(text: str, start: int):
    """An item of a list, and its end in the text, which is the file's bytes as Latin-1."""
    item, end = DECODER.raw_decode(text, start)
    if not ITEM_END.match(text, end):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    if not text[start:end].isascii():  # now as the UTF-8 that it is
        item = json.loads(text[start:end].encode("latin-1"))
    return item, end


def is_final(error: Exception, text: str) -> bool:
    """Whether an item is wrong however it continues; else a chunk may end inside it."""
    if not isinstance(error, json.JSONDecodeError):  # too deep, too many digits, not UTF-8
        return True
    return error.pos < len(text) - 20 and not error.msg.startswith("Unterminated string")


def read_json_item(path: str | Path, start: int, end: int):
    """An item that `scan_json_list` found. Raises InputError if the file has changed since then."""
    with reading(path), open(path, "rb") as file:
        file.seek(start)
        content = file.read(end - start)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has changed since it was opened: start again") from error


def read_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name for messages, bytes) of each line of a file that is not blank.

    Only \\n ends a line: JSON strings may contain U+2028, which `str.splitlines` splits at.
    Raises InputError if the file cannot be read.
    """
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", line


def read_jsonl(path: str | Path, shape=object, growing: bool = False) -> Iterator:
    """Yield the value of each line of a JSONL file.

    growing: runs append to the file, and a last line that one left unfinished is skipped.
    Raises InputError, with the line number, if a line is not JSON or has another shape.
    """
    for where, line in read_lines(path):
        try:
            row = parse_json(line, where, shape)
        except InputError:
            if growing and not line.endswith(b"\n"):
                return
            raise
        yield row


def lock_file(file, name: str | Path) -> None:
    """Lock an open file until it is closed. Raises InputError if another run holds the lock."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"{name} is in use by another run: wait for that run, or choose another --out"
        raise InputError(message) from error


@contextlib.contextmanager
def locked_folder(folder: Path):
    """Make a folder, and keep other runs out of it until the end, however this process ends.

    Raises InputError if another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        lock_file(file, folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
                folder.rmdir()  # only if nothing was written to it
