"""What a run tells about itself: log.jsonl, the progress line, and how it is stopped."""

import contextlib
import json
import math
import os
import signal
import time
from pathlib import Path

from . import distributed
from .io import atomic_write
from .progress import Progress


class Log:
    """What is told of a run: log.jsonl, one object a step, and the progress line. The first process tells."""

    def __init__(self, label: str, path: Path | None, start: int, steps: int):
        rows = read_log(path, start) if path and start else []
        self.best = min((row["held_out_loss"] for row in rows if "held_out_loss" in row), default=math.inf)
        self.before = rows[-1]["seconds"] if rows else 0.0  # what the run took before it was stopped
        self.average = self.lines = None
        if path:
            distributed.on_rank0(lambda: self.rewrite(path, rows))
        if path and distributed.rank() == 0:
            self.lines = open(path, "a", buffering=1)
        self.progress = Progress(label, steps, "steps", start)
        self.begin = self.last = time.monotonic()
        self.waited = 0.0

    def rewrite(self, path: Path, rows: list[dict]) -> None:
        """Without what a stopped run did after its last checkpoint."""
        with atomic_write(path) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.progress.__exit__(*error)
        if self.lines:
            self.lines.close()

    def got_batch(self) -> None:
        """From the end of the last step until now it was waited for pictures and tokens."""
        self.waited = time.monotonic() - self.last

    def tell(self, step: int, loss: float, lr: float, tokens: int, held_out: float | None) -> None:
        now = time.monotonic()
        row = {"step": step, "loss": loss, "lr": lr, "tokens_per_second": round(tokens / (now - self.last)),
               "seconds": round(self.before + now - self.begin, 3), "waited": round(self.waited, 4)}
        if held_out is not None:
            row["held_out_loss"], self.best = held_out, min(self.best, held_out)
        if self.lines:
            self.lines.write(json.dumps(row) + "\n")
        self.last, self.average = now, loss if self.average is None else 0.95 * self.average + 0.05 * loss
        self.progress.update(step + 1, f"loss {self.average:.3f}")

    def sync(self) -> None:
        """What was told is on the disk before the checkpoint that follows it."""
        if self.lines:
            os.fsync(self.lines.fileno())


def read_log(path: Path, start: float = math.inf) -> list[dict]:
    """The rows of the steps before `start`, none where there is no file; a line that a power cut left unreadable is
    passed over."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] < start]


@contextlib.contextmanager
def asked_to_stop():
    """Yield a list that is empty until Ctrl-C or SIGTERM comes; a second one ends the program at once."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:  # it came after the last step had looked
        signal.raise_signal(asked[0])
