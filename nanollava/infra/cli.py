"""Command lines: arguments, examples, and mistakes that end in one line."""

import argparse
import contextlib
import os
import sys
import time

from .io import InputError
from .progress import IS_RANK0, print0


class Parser(argparse.ArgumentParser):
    """The arguments of a command whose docstring says what it does, then gives examples; mistakes take one line."""

    def __init__(self, doc: str, **options):
        summary, _, examples = doc.partition("\n\n")
        super().__init__(description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **options)

    def error(self, message: str):
        print0(f"error: {message} (see {self.prog} --help)")
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
        if not IS_RANK0:  # most mistakes are every process's; torchrun ends the others when the first one has told it
            time.sleep(5)
        # one that comes from a DataLoader's worker has a whole traceback before it
        print(f"error: {str(error).rpartition('InputError: ')[2].strip()}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print0("\nstopped")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a folder that is a file, a full disk, a place that may not be written
        print0(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
        sys.exit(2)
