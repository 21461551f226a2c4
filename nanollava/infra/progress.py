"""Messages and a progress line on standard error; standard output is for results only."""

import os
import sys
import time

# torchrun sets RANK and WORLD_SIZE; only rank 0 prints
IS_RANK0 = "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"
CLEAR_LINE = "\r\033[K"  # terminal codes: carriage return, erase to the end of the line


def print0(text: str) -> None:
    """Print to standard error, on rank 0 only."""
    if IS_RANK0:
        print(text, file=sys.stderr, flush=True)


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
        if IS_RANK0 and now - self.last_shown >= (0.1 if terminal else 10):
            self.last_shown = now
            self.show(end="" if terminal else "\n")

    def show(self, end: str) -> None:
        (done, note), elapsed = self.pending, max(time.monotonic() - self.start, 1e-9)
        rate = (done - self.initial) / elapsed
        left = format_time((self.total - done) / rate) if rate > 0 else "?"
        parts = [self.label, f"{done}/{self.total} {self.unit}", *([note] if note else []),
                 f"{rate:.1f} {self.unit}/s", f"{format_time(elapsed)} elapsed, {left} left"]
        print(self.clear() + "  ".join(parts), end=end, file=sys.stderr, flush=True)
        if end:
            self.pending = None

    def write(self, text: str) -> None:
        """Print a line above the progress line."""
        print(self.clear() + text, file=sys.stderr, flush=True)

    def clear(self) -> str:
        return CLEAR_LINE if sys.stderr.isatty() else ""

    def __exit__(self, *error) -> None:
        if self.pending and IS_RANK0:
            self.show(end="\n")


def progress(items, label: str, unit: str, total: int | None = None):
    """Yield the items and show their progress; `total` is needed where `items` has no length."""
    with Progress(label, len(items) if total is None else total, unit) as line:
        for done, item in enumerate(items, 1):
            yield item
            line.update(done)
