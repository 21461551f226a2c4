"""The training loop of all stages, and what is trained in each (section 4.2 and the appendix).

AdamW without weight decay, 3 % linear warm-up and a cosine to zero are the paper's. Clipping the
gradient to norm 1 is a default of the trainer that the paper's code uses.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .infra import distributed
from .infra.io import InputError
from .infra.run_log import Run
from .lora import add_lora


class DivergedError(InputError):
    """The loss or the gradient of a step is not finite."""

    def __init__(self, label: str, step: int, loss: float, grad_norm: float):
        super().__init__(
            f"{label}: at step {step} the loss is {loss} and the gradient norm {grad_norm}")
        self.step = step


def train(run: Run, model: nn.Module, batches: Iterable, optimizers: list[torch.optim.Optimizer],
          compute_gradients: Callable, validate: Callable | None = None) -> None:
    """Take one optimizer step for each batch.

    run: yields the steps that are left, logs, saves checkpoints, notes signals (infra/run_log.py).
    compute_gradients(model, batch, device): adds to the gradients, and returns the loss, a scalar
        tensor, and the number of tokens, both of all ranks: `forward_backward`, or stage 0's own.
    validate(best_loss): measures the validation loss, saves the model if that is below best_loss,
        and returns it.
    Raises DivergedError before the weights are changed.
    """
    weights = [weight for optimizer in optimizers for group in optimizer.param_groups
               for weight in group["params"]]
    device = weights[0].device
    peak_lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    with run:
        for step, batch in run.enumerate(batches):
            # 1. the learning rate of this step
            for optimizer, peak_lr in zip(optimizers, peak_lrs):
                lr = optimizer.param_groups[0]["lr"] = learning_rate(step, run.num_steps, peak_lr)
            # 2. forward and backward
            loss, num_tokens = compute_gradients(model, batch, device)
            # 3. scale the gradient to norm 1 if it is longer
            grad_norm = distributed.full_tensor(nn.utils.clip_grad_norm_(weights, 1.0))
            # 4. read the results, the only GPU sync of a step; what one rank requests, all do
            requests = torch.stack([torch.full_like(loss, flag) for flag in run.requests(step)])
            results = [loss, grad_norm, *distributed.all_reduce_sum(requests)]
            loss, grad_norm, save, stop = torch.stack(results).tolist()
            if not math.isfinite(loss + grad_norm):
                raise DivergedError(run.label, step, loss, grad_norm)
            # 5. change the weights; a GPU does it while the CPU prepares the next batch
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            # 6. validate, log and save
            is_due = validate and run.validation_is_due(step)
            val_loss = validate(run.best_val_loss) if is_due else None
            run.log(step, loss, lr, grad_norm, num_tokens, val_loss)
            run.save(step, save > 0, stop > 0)


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Of step 0 .. num_steps - 1: a line up to `peak` for 3 % of the steps, then a cosine to 0."""
    warmup = max(1, round(0.03 * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def forward_backward(model: nn.Module, batch: list, device) -> tuple[torch.Tensor, int]:
    """Gradients of the mean loss over all target tokens of a step; that loss and the token count.

    A batch is a list of micro-batches (data.Batch), and each rank has its own. The mean of their
    means would give more weight to a token whose micro-batch has few targets. So losses are summed,
    and divided once by the number of targets on all ranks.
    """
    num_targets = sum(len(micro_batch.target_positions) for micro_batch in batch)
    # torch.full fills on the device: copying a number to a GPU would wait for it
    num_targets = distributed.all_reduce_sum(torch.full((), float(num_targets), device=device))
    step_loss = torch.zeros((), device=device)
    for micro_batch in batch:
        inputs = micro_batch.to(device)._asdict()
        loss = model(**inputs, reduction="sum") / num_targets
        # fully_shard averages gradients over ranks; scaling by the world size restores the sum
        (loss * distributed.world_size()).backward()
        step_loss += loss.detach()
    num_tokens = distributed.world_size() * sum(part.tokens.numel() for part in batch)
    return distributed.all_reduce_sum(step_loss), num_tokens


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable, device) -> float:
    """The mean loss over all target tokens of the batches, on all ranks."""
    total = torch.zeros(2, device=device)  # sum of losses, number of targets
    for batch in batches:
        for micro_batch in batch:
            loss = model(**micro_batch.to(device)._asdict(), reduction="sum")
            num_targets = torch.full_like(loss, len(micro_batch.target_positions))
            total += torch.stack([loss, num_targets])
    loss_sum, num_targets = distributed.all_reduce_sum(total).tolist()
    return loss_sum / num_targets


# ---------------------------------------------------------------------------------------------
# What is trained


def freeze(model: nn.Module, stage: int, lora_rank: int | None = None) -> None:
    """Stage 1 trains the projector; stage 2 also the language model, or LoRA matrices in it."""
    model.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    if stage == 2 and lora_rank:
        add_lora(model.language_model, lora_rank)
    elif stage == 2:
        model.language_model.requires_grad_(True)


def adamw(module: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """The paper's optimizer, for the trainable weights."""
    trainable = [weight for weight in module.parameters() if weight.requires_grad]
    return [torch.optim.AdamW(trainable, lr, weight_decay=0.0, fused=True)]


# ---------------------------------------------------------------------------------------------
# Less memory for more time. Both functions change a Llama from outside: its code does not know
# about them.


def apply_gradient_checkpointing(llama: nn.Module) -> None:
    """Store only the input of each block; the backward pass computes the block a second time."""
    for block in llama.model.layers:
        block.forward = partial(recompute, block.forward)


def recompute_swiglu(llama: nn.Module) -> None:
    """Store SwiGLU's gate and up; the backward pass computes silu(gate) * up a second time."""
    for block in llama.model.layers:
        block.mlp.forward = partial(swiglu, block.mlp)


def swiglu(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """MLP.forward of llama.py in two steps, the second of which is recomputed.

    The second ends with down_proj, but backward needs only its input: PyTorch stops before it.
    """
    return recompute(partial(swiglu_product, mlp), mlp.gate_proj(x), mlp.up_proj(x))


def swiglu_product(mlp: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(F.silu(gate) * up)


def recompute(function: Callable, *inputs):
    """function(*inputs). For gradients only the inputs are stored, and backward calls it again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    # the function draws no random numbers, so no random state has to be stored
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
