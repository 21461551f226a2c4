"""JSON files: small ones read whole, large lists item by item, JSONL line by line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from .io import CHUNK, InputError, atomic_write, file_version, reading
from .shapes import check_shape

DECODER = json.JSONDecoder()
LIST_START = re.compile(rb"(\xef\xbb\xbf)?\s*\[")  # after UTF-8's byte order mark
SPACE = re.compile(r"[ \t\r\n]*")
ITEM_END = re.compile(r"[ \t\r\n,\]]")  # follows a complete item: 12 may be the start of 12.5


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


def write_json(path: str | Path, value, indent: int | None = None) -> None:
    """Raises InputError if the file cannot be written."""
    with atomic_write(path) as temp:
        text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
        temp.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate becomes "?"


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
        text, start, offset, is_first = "", 0, file.seek(opening.end()), True
        while True:
            start = SPACE.match(text, start).end()
            if text.startswith("]", start):
                break
            try:
                item_start = start if is_first else skip_comma(text, start)
                item, end = decode_item(text, item_start)
            except (ValueError, RecursionError) as error:
                more = b"" if is_final(error, text) else file.read(max(CHUNK, len(text) - start))
                if not more:
                    raise InputError(f"{path} is not JSON: {getattr(error, 'msg', error)} in the "
                                     f"item at byte {offset + start}") from error
                text, start, offset = text[start:] + more.decode("latin-1"), 0, offset + start
                continue
            yield item, offset + item_start, offset + end
            start, is_first = end, False
        if (text[start + 1 :].encode("latin-1") + file.read(CHUNK)).strip():
            raise InputError(f"{path} has text after its list, which ends at byte "
                             f"{offset + start}: join several lists into one")


def skip_comma(text: str, start: int) -> int:
    """The start of the item that follows a comma."""
    if not text.startswith(",", start):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, start)
    return SPACE.match(text, start + 1).end()


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


def read_json_item(path: str | Path, start: int, end: int, version: tuple | None = None):
    """An item that `scan_json_list` found. Raises InputError if the file has changed since then.

    version: the `file_version` of that time; without it, a change is noticed only if the bytes are
    no JSON any more.
    """
    changed = InputError(f"{path} has changed since it was opened: start again")
    if version not in (None, file_version(path)):
        raise changed
    with reading(path), open(path, "rb") as file:
        file.seek(start)
        content = file.read(end - start)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise changed from error


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
