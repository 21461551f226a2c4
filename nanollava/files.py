"""What the commands share: files that appear whole or not at all, mistakes that are told in one line."""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path


class InputError(ValueError):
    """Something the user gave is wrong: the message names it and says what to do about it."""


# torchrun numbers its processes; one of them talks
FIRST = "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Tell the user something; standard output is for results only."""
    if FIRST:
        print(text, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """The arguments of a command whose docstring says what it does, then gives examples; mistakes take one line."""

    def __init__(self, doc: str, **options):
        summary, _, examples = doc.partition("\n\n")
        super().__init__(description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **options)

    def error(self, message: str):
        say(f"error: {message} (see {self.prog} --help)")
        sys.exit(2)


def add_command(commands, name: str, doc: str) -> Parser:
    """A command of a parser's `add_subparsers(parser_class=Parser)`, with what it does in one line."""
    return commands.add_parser(name, doc=doc, help=doc.rstrip("."))


def positive(number: type):
    """The type of an argument that must be above zero: int or float."""

    def convert(text: str):
        value = number(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    convert.__name__ = f"positive {number.__name__}"  # argparse: "invalid positive int value: '0'"
    return convert


def seed(text: str) -> int:
    """The type of an argument that random numbers begin with."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError
    return value


@contextlib.contextmanager
def one_line_errors():
    """Around a command: a user's mistake ends it with one line on standard error and exit code 2."""
    try:
        yield
    except InputError as error:
        if not FIRST:  # most mistakes are every process's; torchrun ends the others when the first one has told it
            time.sleep(5)
        # one that comes from a DataLoader's worker has a whole traceback before it
        print(f"error: {str(error).rpartition('InputError: ')[2].strip()}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say("\nstopped")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a folder that is a file, a full disk, a place that may not be written
        say(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
        sys.exit(2)


@contextlib.contextmanager
def whole_file(path: str | Path):
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
def new_folder(folder: str | Path):
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
    with whole_file(path) as beside:
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


def read_lines(path: str | Path, needs: tuple[str, ...] = ()) -> list[dict]:
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
