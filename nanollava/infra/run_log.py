"""A training run: its log.jsonl, progress line and checkpoints, and how a signal stops it."""

import contextlib
import json
import math
import os
import signal
import time
from pathlib import Path

from . import distributed
from .io import atomic_write
from .json_io import read_jsonl
from .progress import Progress, print0
from .start import on_stop_signals

SAVE_SECONDS = 1800  # from one checkpoint to the next: a 7B's takes a minute or two to write


class Run:
    """Everything that a training loop does besides training.

        with Run("stage 1", num_steps, checkpoints, folder / "log.jsonl", save_every=250) as run:
            for step, batch in run.enumerate(batches):
                ...
                run.log(step, loss, lr, grad_norm, num_tokens)
                run.save(step, *run.requests(step))

    `checkpoints` is a `resume.Checkpoints`. The run starts after the newest one, at `run.start`.
    Without checkpoints nothing is saved, and signals end the program as usual.
    save_every: steps from one checkpoint to the next; None means every SAVE_SECONDS.
    validate_every: steps from one validation to the next.
    """

    def __init__(self, label: str, num_steps: int, checkpoints=None, log_path: Path | None = None,
                 save_every: int | None = None, validate_every: int = 500):
        self.label, self.num_steps = label, num_steps
        self.save_every, self.validate_every = save_every, validate_every
        self.checkpoints, self.log_path = checkpoints, log_path
        self.start = checkpoints.load() if checkpoints else 0
        self.rows = read_log(log_path, self.start) if log_path else []  # logged before this start
        self.best_val_loss = min((row["val_loss"] for row in self.rows if "val_loss" in row),
                                 default=math.inf)
        self.elapsed_before = max((row.get("elapsed", 0.0) for row in self.rows), default=0.0)
        self.log_file, self.mean_loss, self.signals = None, None, []
        self.handlers = contextlib.ExitStack()

    def __enter__(self):
        if self.log_path:
            distributed.on_rank0(self.open_log)
        if self.checkpoints:
            self.handlers.enter_context(on_stop_signals(self.on_signal))
        self.progress = Progress(self.label, self.num_steps, "steps", self.start)
        self.start_time = self.step_end = self.last_save = time.monotonic()
        return self

    def __exit__(self, error_type, *_) -> None:
        self.progress.__exit__()
        if self.log_file:
            self.log_file.close()
        self.handlers.close()
        if self.signals and error_type is None:  # a signal that came after the last step
            signal.raise_signal(self.signals[0])

    def open_log(self) -> None:
        """Drop the rows of steps that no checkpoint holds, and open the log to append to it."""
        with atomic_write(self.log_path) as temp:
            temp.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.log_file = open(self.log_path, "a", buffering=1)  # flush every line

    def on_signal(self, signum, frame) -> None:
        """The first signal stops the run after its step, the second one interrupts the program."""
        if self.signals:
            raise KeyboardInterrupt(signum)
        self.signals.append(signum)

    def requests(self, step: int) -> tuple[bool, bool]:
        """Whether this rank wants all ranks to save a checkpoint after this step, and to stop.

        Clocks differ from rank to rank, so by time rank 0 alone decides. A checkpoint also follows
        the last step.
        """
        if self.save_every:
            save = (step + 1) % self.save_every == 0
        else:
            save = distributed.rank() == 0 and time.monotonic() - self.last_save >= SAVE_SECONDS
        return save or step + 1 == self.num_steps, bool(self.signals)

    def enumerate(self, batches):
        """Yield (step, batch) for the steps that are left, and time the wait for each batch."""
        for step, batch in zip(range(self.start, self.num_steps), batches):
            self.data_time = time.monotonic() - self.step_end
            yield step, batch

    def validation_is_due(self, step: int) -> bool:
        """After every `validate_every` steps and the last: time must not change which is best."""
        return (step + 1) % self.validate_every == 0 or step + 1 == self.num_steps

    def log(self, step: int, loss: float, lr: float, grad_norm: float, num_tokens: int,
            val_loss: float | None = None) -> None:
        """Append a row to the log and update the progress line. num_tokens: of all ranks."""
        now = time.monotonic()
        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm,
               "tokens_per_second": round(num_tokens / (now - self.step_end)),
               "elapsed": round(self.elapsed_before + now - self.start_time, 3),
               "data_time": round(self.data_time, 4)}
        if val_loss is not None:
            row["val_loss"] = val_loss
            self.best_val_loss = min(self.best_val_loss, val_loss)
        if self.log_file:
            self.log_file.write(json.dumps(row) + "\n")
        self.mean_loss = loss if self.mean_loss is None else 0.95 * self.mean_loss + 0.05 * loss
        self.progress.update(step + 1, f"loss {self.mean_loss:.3f}")
        self.step_end = now

    def save(self, step: int, save: bool, stop: bool) -> None:
        """What the ranks requested: save a checkpoint; or save one and end the program."""
        if self.checkpoints and (save or stop):
            if self.log_file:
                os.fsync(self.log_file.fileno())  # a crash must not lose rows that are resumed from
            self.checkpoints.save(step + 1)
            # saving is not part of the next step
            self.step_end = self.last_save = time.monotonic()
        if stop:
            print0(f"stopped after {step + 1} of {self.num_steps} steps; --resume continues there")
            signum = self.signals[0] if self.signals else signal.SIGTERM  # sent to another rank
            raise SystemExit(128 + signum)


LOSS = (0.0, 1e300)  # finite, and so is what report.html computes from it
ROW = {"step": range(10**12), "loss": LOSS, "elapsed?": float, "val_loss?": LOSS}


def read_log(path: Path, end: float = math.inf) -> list[dict]:
    """The rows of a log.jsonl with a step below `end`; none if there is no file.

    A last line that a crash left unfinished is skipped. Raises InputError, with the line number,
    for any other line that is not a row.
    """
    rows = read_jsonl(path, ROW, growing=True) if path.exists() else []
    rows = ({key: value for key, value in row.items() if value is not None} for row in rows)
    return [row for row in rows if row["step"] < end]
