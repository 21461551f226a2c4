"""The training loop that all stages share: schedule, clipping, precision, log (section 4.2 and appendix C).

AdamW without weight decay, 3 % linear warm-up and a cosine to zero are the paper's; that the gradient's norm is clipped
to 1 is a default of the trainer that its code uses.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .conversation import IGNORE_INDEX
from .infra import distributed
from .infra.io import InputError
from .infra.progress import print0
from .infra.resume import Checkpoints
from .infra.run_log import Log, asked_to_stop
from .lora import add_lora


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


def count_targets(labels: torch.Tensor) -> int:
    """How many tokens are predicted: labels (B, T) but for the first, which nothing comes before."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def losses(model: torch.nn.Module, batch):
    """Yield for each micro-batch its mean loss, and how many tokens are learned in it."""
    for tokens, labels, images in batch:
        yield model(tokens, images, labels), count_targets(labels)


def learner(model: torch.nn.Module, device: str) -> Callable:
    """What `fit` calls for a batch of LLaVA's: gradients of the mean loss over every token that is learned in it.

    A batch is a list of micro-batches here, and more of them in other processes; each of those tokens weighs the
    same, wherever it is.
    """

    def learn(batch) -> torch.Tensor:
        counts = sum(count_targets(labels) for _, labels, _ in batch)
        count = distributed.all_reduce_sum(torch.full((), float(counts), device=device))  # filled there: a copy would be waited for
        total = torch.zeros((), device=device)
        for loss, learned in losses(model, batch):
            loss = loss * (learned / count)
            (loss * distributed.world_size()).backward()  # for fully_shard takes the mean over processes, and this is a sum
            total += loss.detach()
        return distributed.all_reduce_sum(total)

    return learn


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches, device: str) -> float:
    """The mean loss over every token of the batches that would be learned."""
    total = torch.zeros(2, device=device)  # loss, tokens
    for batch in batches:
        for loss, learned in losses(model, batch):
            total += torch.stack([loss * learned, torch.full_like(loss, learned)])
    loss, count = distributed.all_reduce_sum(total).tolist()
    return loss / count


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
            norm = distributed.full_tensor(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            stop = distributed.all_reduce_sum(torch.full((), float(bool(asked)), device=loss.device))  # whichever process was asked
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
                print0(f"stopped after {step + 1} of {steps} steps, and saved; --resume goes on from there")
                raise SystemExit(128 + asked[0])
