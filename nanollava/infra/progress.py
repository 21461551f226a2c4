"""Messages and a progress line on standard error; standard output is for results only."""

import contextlib
import os
import sys
import time

# torchrun sets RANK and WORLD_SIZE; only rank 0 prints
IS_RANK0 = "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"
CLEAR_LINE = "\r\033[K"  # terminal codes: carriage return, erase to the end of the line
START, END = 700, 300  # characters that are kept of a longer message


def printable(text: str) -> str:
    """A text as one short line that is safe on a terminal. Names and ids in it come from data.

    Line breaks and control characters are escaped; the middle of a long text is left out.
    """
    if not text.isprintable():
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode()
                       for char in text)
    return text if len(text) <= START + END else f"{text[:START]} [...] {text[-END:]}"


def print_line(text: str, end: str = "\n") -> None:
    """Print to standard error. On a terminal, the line replaces a progress line."""
    clear = CLEAR_LINE if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):  # the reader is gone: that must not end the run
        print(clear + printable(text), end=end, file=sys.stderr, flush=True)


def print0(text: str, end: str = "\n") -> None:
    """`print_line` on rank 0 only."""
    if IS_RANK0:
        print_line(text, end)


def format_time(seconds: float) -> str:
    """75 -> "1:15", 7325 -> "2:02:05"."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """A line that shows what is done, the rate, and the time left.

        with Progress("stage 1", 200, "steps") as progress:
            progress.update(done, "loss 1.23")

    `initial` is what a resumed run had done before; it does not count for the rate. A terminal
    rewrites the line ten times a second; a log file gets one every ten seconds.
    """

    def __init__(self, label: str, total: int, unit: str, initial: int = 0):
        self.label, self.total, self.unit, self.initial = label, total, unit, initial
        self.start = self.last_shown = time.monotonic()
        self.pending = None  # (done, note), not yet on a line that stays

    def __enter__(self):
        return self

    def update(self, done: int, note: str = "") -> None:
        """Cheap enough to call for every item."""
        self.pending, now = (done, note), time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self.last_shown >= (0.1 if terminal else 10):
            self.last_shown = now
            self.show(end="" if terminal else "\n")

    def show(self, end: str) -> None:
        (done, note), elapsed = self.pending, max(time.monotonic() - self.start, 1e-9)
        rate = (done - self.initial) / elapsed
        left = format_time((self.total - done) / rate) if rate > 0 else "?"
        parts = [self.label, f"{done}/{self.total} {self.unit}", *([note] if note else []),
                 f"{rate:.1f} {self.unit}/s", f"{format_time(elapsed)} elapsed, {left} left"]
        print0("  ".join(parts), end)
        if end:
            self.pending = None

    def __exit__(self, *error) -> None:
        if self.pending:
            self.show(end="\n")


def progress(items, label: str, unit: str, total: int | None = None):
    """Yield the items and show their progress; `total` is needed where `items` has no length."""
    with Progress(label, len(items) if total is None else total, unit) as line:
        for done, item in enumerate(items, 1):
            yield item
            line.update(done)
