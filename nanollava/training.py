"""The training loop that all stages share: schedule, clipping, precision, log (section 4.2 and appendix C).

AdamW without weight decay, 3 % linear warm-up, cosine to zero, gradient norm clipped to 1: the paper's
numbers. Muon is there for the toy world's tiny networks, which it teaches in fewer steps.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .files import InputError
from .progress import Progress


def best_device(wanted: str | None = None) -> str:
    """The device that was asked for, or the fastest kind there is. Raises InputError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [name for name in there if there[name]]
    try:
        return str(torch.empty(0, device=wanted or there[0]).device)
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch without it
        raise InputError(f"--device {wanted} is not there, only {' and '.join(there)}") from error


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 on GPUs and on processors that multiply it in hardware; the others only emulate it, slowly."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast and not device.startswith("mps") else torch.float32


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.03) -> float:
    """The rate of step 0..steps-1: linear from 0 to `peak` over the warm-up, then a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is applied (Jordan et al., 2024).

    torch.optim.Muon does the same, one matrix at a time and in bfloat16, which most laptop processors only
    emulate; here matrices of one shape go through together, in float32.
    """

    def __init__(self, matrices, lr: float, momentum: float = 0.95):
        super().__init__(matrices, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                gradient = torch.stack([matrix.grad.flatten(1) for matrix in matrices])  # (matrices, rows, columns)
                state = self.state[matrices[0]]
                average = state.setdefault("average", torch.zeros_like(gradient))
                average.lerp_(gradient, 1 - group["momentum"])
                update = orthogonal(gradient.lerp(average, group["momentum"]))
                scale = max(1, gradient.shape[1] / gradient.shape[2]) ** 0.5
                for matrix, change in zip(matrices, update):
                    matrix.sub_(change.view_as(matrix), alpha=group["lr"] * scale)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices (..., rows, columns) with all singular values drawn near 1: five Newton-Schulz steps."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def adamw(module: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """The paper's optimizer."""
    return [torch.optim.AdamW(module.parameters(), lr, weight_decay=0.0)]


def muon(module: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside transformer blocks and the patch convolution, AdamW, at `lr`, for all the rest.

    One rate serves both: a step of Muon is about as long for every matrix, and 20/3 suits all networks here.
    """
    matrices, rest = [], []
    for name, parameter in module.named_parameters():
        in_block = parameter.ndim == 2 and ".layers." in name
        (matrices if in_block or parameter.ndim == 4 else rest).append(parameter)
    optimizers = [torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0)]
    return [Muon(matrices, lr * 20 / 3), *optimizers] if matrices else optimizers


def fit(
    label: str, loss_of: Callable, batches: Iterable, steps: int, optimizers: list[torch.optim.Optimizer],
    log: Path | None = None, tokens_of: Callable = lambda batch: 0,
) -> None:
    """Take one optimizer step for each of `steps` batches: loss_of(batch) is the loss to go down.

    `log` gets one JSON object a step: step, loss, lr, tokens per second, seconds. Raises InputError if the loss
    or the gradient is not a number any more.
    """
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    start, average = time.monotonic(), None
    lines = open(log, "w", buffering=1) if log else None
    try:
        with Progress(label, steps, "steps") as progress:
            last = start
            for step, batch in zip(range(steps), batches):
                for optimizer, peak in zip(optimizers, peaks):
                    optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
                loss = loss_of(batch)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                value, norm = loss.item(), norm.item()
                if not math.isfinite(value + norm):
                    raise InputError(f"{label}: at step {step} the loss is {value}, the length of the gradient {norm}; "
                                     "lower the learning rate (--lr)")
                average = value if average is None else 0.95 * average + 0.05 * value
                now = time.monotonic()
                if lines:
                    row = {"step": step, "loss": value, "lr": learning_rate(step, steps, peaks[-1]),
                           "tokens_per_second": round(tokens_of(batch) / (now - last)),
                           "seconds": round(now - start, 3)}
                    lines.write(json.dumps(row) + "\n")
                last = now
                progress.update(step + 1, f"loss {average:.3f}")
    finally:
        if lines:
            lines.close()
