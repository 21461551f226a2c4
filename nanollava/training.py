"""The training loop that all stages share: schedule, clipping, precision, log (section 4.2 and appendix C).

AdamW without weight decay, 3 % linear warm-up and a cosine to zero are the paper's; that the gradient's norm is clipped
to 1 is a default of the trainer that its code uses.
"""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import parallel
from .conversation import IGNORE
from .files import InputError, say, whole_file
from .lora import add_lora
from .progress import Progress
from .resume import Checkpoints


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 0..steps-1: a line up to `peak` over 3 % of them, then a cosine towards 0."""
    rising = max(1, round(0.03 * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def adamw(module: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """The paper's optimizer."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [torch.optim.AdamW(learning, lr, weight_decay=0.0, fused=True)]


def freeze(model: torch.nn.Module, stage: int, lora_rank: int | None = None) -> None:
    """Section 4.2: stage 1 trains the projector alone, stage 2 the language model too, or thin matrices beside it."""
    model.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    if stage == 2 and lora_rank:
        add_lora(model.language_model, lora_rank)
    elif stage == 2:
        model.language_model.requires_grad_(True)


def count_learned(labels: torch.Tensor) -> int:
    """How many tokens are predicted: labels (B, T) but for the first, which nothing comes before."""
    return int((labels[:, 1:] != IGNORE).sum())


def losses(model: torch.nn.Module, batch):
    """Yield for each micro-batch its mean loss, and how many tokens are learned in it."""
    for tokens, labels, images in batch:
        yield model(tokens, images, labels), count_learned(labels)


def learner(model: torch.nn.Module, device: str) -> Callable:
    """What `fit` calls for a batch of LLaVA's: gradients of the mean loss over every token that is learned in it.

    A batch is a list of micro-batches here, and more of them in other processes; each of those tokens weighs the
    same, wherever it is.
    """

    def learn(batch) -> torch.Tensor:
        counts = sum(count_learned(labels) for _, labels, _ in batch)
        count = parallel.total(torch.full((), float(counts), device=device))  # filled there: a copy would be waited for
        total = torch.zeros((), device=device)
        for loss, learned in losses(model, batch):
            loss = loss * (learned / count)
            (loss * parallel.world()).backward()  # for fully_shard takes the mean over processes, and this is a sum
            total += loss.detach()
        return parallel.total(total)

    return learn


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches, device: str) -> float:
    """The mean loss over every token of the batches that would be learned."""
    total = torch.zeros(2, device=device)  # loss, tokens
    for batch in batches:
        for loss, learned in losses(model, batch):
            total += torch.stack([loss * learned, torch.full_like(loss, learned)])
    loss, count = parallel.total(total).tolist()
    return loss / count


class Log:
    """What is told of a run: log.jsonl, one object a step, and the progress line. The first process tells."""

    def __init__(self, label: str, path: Path | None, start: int, steps: int):
        rows = read_log(path, start) if path and start else []
        self.best = min((row["held_out_loss"] for row in rows if "held_out_loss" in row), default=math.inf)
        self.before = rows[-1]["seconds"] if rows else 0.0  # what the run took before it was stopped
        self.average = self.lines = None
        if path:
            parallel.first(lambda: self.rewrite(path, rows))
        if path and parallel.rank() == 0:
            self.lines = open(path, "a", buffering=1)
        self.progress = Progress(label, steps, "steps", start)
        self.begin = self.last = time.monotonic()
        self.waited = 0.0

    def rewrite(self, path: Path, rows: list[dict]) -> None:
        """Without what a stopped run did after its last checkpoint."""
        with whole_file(path) as beside:
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


def fit(
    label: str, learn: Callable, batches: Iterable, steps: int, optimizers: list[torch.optim.Optimizer],
    log: Path | None = None, tokens_of: Callable = lambda batch: 0, checkpoints: Checkpoints | None = None,
    start: int = 0, every: int = 0, validate: Callable | None = None, rows_of: Callable = lambda step: "",
) -> None:
    """Take an optimizer step for each of the batches, from step `start` on.

    learn(batch) puts the gradients into the parameters and returns the loss. `log` gets one JSON object a step:
    step, loss, lr, tokens per second, seconds since the first step, and those of this step that went by waiting for
    its batch. After `every` steps, if not 0, and after the last, the `checkpoints` are saved, and validate(lowest
    held-out loss so far) returns a loss to be logged. With checkpoints, Ctrl-C and SIGTERM save and end the program.
    Raises InputError, with rows_of(step), if loss or gradient is not a number any more; that step is not taken.
    """
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    with Log(label, log, start, steps) as told, asked_to_stop() if checkpoints else contextlib.nullcontext() as asked:
        for step, batch in zip(range(start, steps), batches):
            told.got_batch()
            for optimizer, peak in zip(optimizers, peaks):
                optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
            loss = learn(batch)
            norm = parallel.whole(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            stop = parallel.total(torch.full((), float(bool(asked)), device=loss.device))  # whichever process was asked
            # the one place where a GPU is waited for; while it takes the optimizer's step, the next batch comes
            loss, norm, stop = torch.stack([loss, norm, stop]).tolist()
            if not math.isfinite(loss + norm):
                raise InputError(f"{label}: at step {step} the loss is {loss}, the length of the gradient {norm}; "
                                 f"begin anew in another --out, with a lower --lr{rows_of(step)}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            due = step + 1 == steps or every and (step + 1) % every == 0
            held_out = validate(told.best) if validate and due else None
            told.tell(step, loss, learning_rate(step, steps, peaks[-1]), tokens_of(batch), held_out)
            if checkpoints and (due or stop):
                told.sync()
                checkpoints.save(step + 1)
                told.last = time.monotonic()  # not a part of the next step
            if stop:
                asked[:] = asked or [signal.SIGTERM]
                say(f"stopped after {step + 1} of {steps} steps, and saved; --resume goes on from there")
                raise SystemExit(128 + asked[0])
