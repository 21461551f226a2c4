"""Command lines: arguments with examples, flags that must have an effect, one-line errors."""

import argparse
import contextlib
import os
import signal
import sys
import time

from .io import InputError
from .progress import IS_RANK0, print0


class Parser(argparse.ArgumentParser):
    """An argument parser whose help is a docstring: a summary, a blank line, examples.

    After parsing, `arguments.typed` holds the flags that the user typed ("--data"), and
    `arguments.settings` every option with its value, typed or default ("--temperature 0.0").
    `check_flags` reads both.
    """

    def __init__(self, doc: str, **options):
        summary, _, examples = doc.partition("\n\n")
        super().__init__(
            description=summary, epilog=examples, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        arguments, rest = super().parse_known_args(words, namespace)
        words = {word.partition("=")[0] for word in words}
        typed, settings = set(), set()
        for action in self._actions:
            for flag in action.option_strings:
                typed |= {flag} & words
                settings.add(f"{flag} {getattr(arguments, action.dest, None)}")
        # a subcommand's parser has filled these in before its parent does
        arguments.typed = getattr(arguments, "typed", set()) | typed
        arguments.settings = getattr(arguments, "settings", set()) | settings
        return arguments, rest

    def error(self, message: str):
        print0(f"error: {message} (see {self.prog} --help)")
        sys.exit(2)


def add_command(commands, name: str, doc: str) -> Parser:
    """A command of a parser's `add_subparsers(parser_class=Parser)` with a one-line description."""
    return commands.add_parser(name, doc=doc, help=doc.rstrip("."))


def check_flags(arguments, needs: dict, conflicts: dict) -> None:
    """Refuse every typed flag that would have no effect.

    needs: {flag: (other, ...)}: the flag acts only together with one of the others.
    conflicts: {(flag, other): reason}: the flag has no effect beside the other.
    Another flag is "--model" (typed) or "--stage 0" (its value, typed or default); "--stage None"
    is --stage without a value.
    Raises InputError that names both flags.
    """
    present = arguments.typed | arguments.settings
    for flag, others in needs.items():
        if flag in arguments.typed and not present.intersection(others):
            raise InputError(f"{flag} has no effect without {' or '.join(others)}")
    for (flag, other), reason in conflicts.items():
        if flag in arguments.typed and other in present:
            name, _, value = other.partition(" ")
            beside = f"without {name}" if value == "None" else f"with {other}"
            raise InputError(f"{flag} has no effect {beside}: {reason}")


def positive(number: type):
    """The type of an argument that must be finite and above zero: int or float."""

    def convert(text: str):
        value = number(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    convert.__name__ = f"positive {number.__name__}"  # argparse: "invalid positive int value: '0'"
    return convert


def seed(text: str) -> int:
    """The type of a --seed argument."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError
    return value


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A table as text: the first column aligned left, the others right, three spaces between them.

    A row that is shorter than the header ends with empty cells.
    """
    lines = [header, *(row + [""] * (len(header) - len(row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        texts.append("   ".join(cells).rstrip())
    return "\n".join(texts)


def percent_table(columns: dict[str, dict[str, float]]) -> str:
    """Percentages, {column: {row: percent}}, as text. The first column names the rows.

    A cell is empty where its column lacks the row.
    """
    rows = []
    for name in next(iter(columns.values())):
        cells = (f"{column[name]:.1f}%" if name in column else "" for column in columns.values())
        rows.append([name, *cells])
    return format_table(["", *columns], rows)


@contextlib.contextmanager
def on_stop_signals(handler):
    """Inside, Ctrl-C, `kill` and a terminal that closes call handler(signum, frame).

    A signal that is ignored, as SIGHUP under nohup, stays ignored.
    """
    signals = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}
    old_handlers = {signum: signal.signal(signum, handler) for signum in signals
                    if signal.getsignal(signum) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for signum, old_handler in old_handlers.items():
            signal.signal(signum, old_handler)


def interrupt(signum, frame) -> None:
    raise KeyboardInterrupt(signum)


@contextlib.contextmanager
def one_line_errors():
    """Around a command: a user's error ends it with one line on standard error and exit code 2.

    SIGTERM and SIGHUP end it as Ctrl-C does, so that it keeps what it has.
    """
    try:
        with on_stop_signals(interrupt):
            yield
    except InputError as error:
        if not IS_RANK0:  # all ranks have the same error; torchrun ends them once rank 0 reports it
            time.sleep(5)
        # an error from a DataLoader worker arrives behind the worker's traceback
        message = str(error).rpartition("InputError: ")[2].strip()
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print0("\nstopped")
        sys.exit(128 + next(iter(error.args), signal.SIGINT))
    except BrokenPipeError:  # the reader of our output is gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a file where a folder should be, missing permissions
        print0(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
        sys.exit(2)
