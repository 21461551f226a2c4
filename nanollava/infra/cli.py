"""Command lines: arguments with ranges, flags that must have an effect, one-line errors."""

import argparse
import contextlib
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

from .io import InputError, check_writable
from .progress import IS_RANK0, print0, print_line
from .start import interrupt, on_stop_signals

# what to do when memory is full, for commands that generate
LESS_MEMORY = ("use --quantize int8, a --dtype of 16 bits, a smaller model, smaller batches or "
               "another --device")


class Parser(argparse.ArgumentParser):
    """An argument parser whose help is a docstring: a summary, a blank line, examples.

    After parsing, `arguments.typed` holds the flags that the user typed ("--data"), and
    `arguments.settings` every option with its value, typed or default ("--temperature 0.0").
    `check_flags` reads both.
    """

    def __init__(self, doc: str | None, **options):
        summary, _, examples = (doc or "").partition("\n\n")  # `python -OO` has no docstrings
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


def add_command(commands, name: str, doc: str | None) -> Parser:
    """A command of a parser's `add_subparsers(parser_class=Parser)` with a one-line description."""
    return commands.add_parser(name, doc=doc, help=(doc or "").rstrip("."))


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


def in_range(low: int | float, high: int | float, *others):
    """The type of an argument: a number from `low` to `high`, or one of the others.

    The type of `low` is the type of the number.
    """
    kind = type(low)
    limits = f"{low:,} to {high:,}" if kind is int else f"{low:g} to {high:g}"
    name = "a whole number" if kind is int else "a number"
    words = "".join(f"{other:g} or " for other in others) + f"{name} from {limits}"

    def convert(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high or value in others:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return convert


def add_dtype(add) -> None:
    """The dtype of a model that generates, see `device.best_dtype`."""
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the weights and the computation (default: bfloat16 on GPUs since the A100 and RTX "
        "30, CPUs with AMX and AMD's since Zen 4; float16 on the V100 and T4; else float32)")


def add_device(add) -> None:
    add("--device", help="cuda, mps or cpu (default: the first that exists)")


positive = in_range(1, 10**9)  # the type of an argument that nothing else limits
seed = in_range(0, 2**63 - 1)


def out_path(is_folder: bool):
    """The type of an argument that names an output: it must be writable, before the work starts."""

    def convert(text: str) -> Path:
        if not text:
            raise argparse.ArgumentTypeError("the name is empty")
        try:
            check_writable(text, is_folder)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return Path(text)

    return convert


out_file, out_folder = out_path(is_folder=False), out_path(is_folder=True)


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
def one_line_errors(memory_advice: str = "use a machine with more"):
    """Around a command: a user's error ends it with one line on standard error and exit code 2.

    memory_advice: what the line says when memory is full.
    SIGTERM and SIGHUP end it as Ctrl-C does, so that it keeps what it has.
    """
    try:
        with on_stop_signals(interrupt):
            try:
                yield
            finally:
                flush_output()
    except KeyboardInterrupt as error:
        print0("stopped")
        sys.exit(128 + next(iter(error.args), signal.SIGINT))
    except BrokenPipeError:  # the reader of our output is gone (`| head`)
        sys.exit(141)
    except Exception as error:
        message = user_error(error)
        if full := memory_error(error):
            message = f"{full}: {memory_advice}"
        if "WORLD_SIZE" in os.environ:
            end_rank(message)
        if message is None:
            raise
        print_line(f"error: {message}")
        sys.exit(2)


def end_rank(message: str | None) -> None:
    """End one of several processes after an error, whose message it is, if it is not a bug."""
    if not IS_RANK0 or message is None:
        # Most likely another rank caused this error or has it too, and reports it. torchrun then
        # ends this rank, within a second.
        time.sleep(5)
    if message is None:
        traceback.print_exc()
    else:
        print_line(f"error: {message}")
    os._exit(2)  # a normal exit waits for the other ranks, and they wait for this one


def flush_output() -> None:
    """Write what `print` has buffered. Python would do so at exit, with a traceback if it fails."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def user_error(error: Exception) -> str | None:
    """The message for an error that is not a bug of ours, else None.

    An error in a DataLoader worker arrives with the worker's traceback before its message.
    """
    if isinstance(error, InputError):
        return str(error).rpartition("InputError: ")[2].strip()
    if isinstance(error, OSError):  # a full disk, a file where a folder should be, missing rights
        reason = error.strerror or str(error).strip().rpartition("\n")[2]
        return f"{error.filename or 'input or output'}: {reason}"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):  # killed
        return f"{str(error).strip(' .')}: if memory is short, lower --workers"
    return None


def memory_error(error: Exception) -> str | None:
    """Whose memory is full, the GPU's or the machine's, if that is what an error says.

    torch raises a RuntimeError with a page of advice; NumPy and Python raise MemoryError.
    """
    text = str(error)
    full = re.search("out of memory|can't allocate memory|_ALLOC_FAILED", text)
    if not (isinstance(error, MemoryError) or isinstance(error, RuntimeError) and full):
        return None
    size = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    place = "the GPU's memory" if re.search(r"\b(CUDA|HIP|MPS)\b", text) else "the memory"
    return f"{place} is full" + (f", {size[1]} more did not fit" if size else "")
