"""One line of progress on standard error: how far, how fast, how long still."""

import os
import sys
import time

# torchrun numbers its processes; one of them talks
IS_RANK0 = "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def print0(text: str) -> None:
    """Tell the user something; standard output is for results only."""
    if IS_RANK0:
        print(text, file=sys.stderr, flush=True)


CLEAR = "\r\033[K"  # back to the beginning of the line, and wipe it


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class Progress:
    """`with Progress("stage 1", 200, "steps") as progress: progress.update(done, "loss 1.23")`.

    `initial`: how much was done before, by a run that was stopped. On a terminal the line rewrites itself ten times a
    second; elsewhere a line comes every ten seconds.
    """

    def __init__(self, label: str, total: int, unit: str, initial: int = 0):
        self.label, self.total, self.unit, self.initial = label, total, unit, initial
        self.start = self.shown = time.monotonic()
        self.last = None  # (done, note), until it has a line of its own

    def __enter__(self):
        return self

    def update(self, done: int, note: str = "") -> None:
        """Say how far it is; cheap enough to be called for every single thing."""
        self.last, now = (done, note), time.monotonic()
        if IS_RANK0 and now - self.shown >= (0.1 if sys.stderr.isatty() else 10):
            self.shown = now
            self.show(end="" if sys.stderr.isatty() else "\n")

    def show(self, end: str) -> None:
        (done, note), elapsed = self.last, max(time.monotonic() - self.start, 1e-9)
        rate = (done - self.initial) / elapsed
        left = clock((self.total - done) / rate) if rate > 0 else "?"
        print(f"{CLEAR if sys.stderr.isatty() else ''}{self.label}  {done}/{self.total} {self.unit}  "
              f"{note + '  ' if note else ''}{rate:.1f} {self.unit}/s  {clock(elapsed)} gone, {left} left",
              end=end, file=sys.stderr, flush=True)
        if end:
            self.last = None

    def write(self, text: str) -> None:
        """Something to be read at once, on a line above."""
        print(f"{CLEAR if sys.stderr.isatty() else ''}{text}", file=sys.stderr, flush=True)

    def __exit__(self, *error) -> None:
        if self.last and IS_RANK0:
            self.show(end="\n")


def progress(items, label: str, unit: str, total: int | None = None):
    """The items of a sequence, one by one, with their progress shown; `total` where it does not know its length."""
    with Progress(label, len(items) if total is None else total, unit) as line:
        for done, item in enumerate(items, 1):
            yield item
            line.update(done)
