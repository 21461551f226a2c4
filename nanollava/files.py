"""Files that appear whole or not at all, and mistakes that are told in one line."""

import contextlib
import json
import os
import sys
from pathlib import Path


class InputError(ValueError):
    """Something the user gave is wrong: the message names it and says what to do about it."""


@contextlib.contextmanager
def one_line_errors():
    """Around a command: a user's mistake ends it with one line on standard error and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


@contextlib.contextmanager
def whole_file(path: str | Path):
    """Yield a path beside `path` to write to; it takes the name, in one step, once it is safe on the disk.

    Raises InputError where the place cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | Path, value, indent: int | None = None) -> None:
    with whole_file(path) as beside:
        beside.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path):
    """The content of a JSON file. Raises InputError, naming the file, where there is none or it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path} is not JSON: {error}") from error
