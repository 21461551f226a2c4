"""One process or several: the ranks that torchrun started, and a model sharded over them.

With `torchrun train.py`, each rank computes its share of every batch and stores a slice of every
weight, gradient and optimizer state (FSDP2's `fully_shard`; the paper's appendix names the same
idea, ZeRO stage 3). With plain `python train.py` there is one rank, and these functions do nothing.
"""

import atexit
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from .cli import user_error
from .io import InputError


# How long ranks wait for rank 0 while it checks images or writes a model: NCCL's own limit is 10
# minutes. torchrun notices a rank that ends within a second.
TIMEOUT = timedelta(hours=6)


def init_distributed(device: str) -> str:
    """Join the other ranks, if torchrun started this process. Returns its device: "cuda:3", say.

    Raises InputError if WORLD_SIZE is set by something other than torchrun, or a GPU is missing.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        if device.startswith("cuda:"):  # or pinned memory would take up some of GPU 0
            torch.cuda.set_device(device)
        return device
    missing = {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    missing -= os.environ.keys()
    if missing:
        raise InputError(f"WORLD_SIZE is set, but not {', '.join(sorted(missing))}: start several "
                         "processes with torchrun")
    if ":" in device:
        raise InputError(f"--device {device}: torchrun gives each process a GPU of its own; give "
                         f"--device {device.partition(':')[0]}")
    if device.startswith("cuda"):
        num_ranks, num_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if num_ranks > num_gpus:  # every rank finds out by itself: none waits for another
            raise InputError(f"torchrun starts {num_ranks} processes here, and each needs a GPU of "
                             f"its own, but there are {num_gpus}: give --nproc-per-node {num_gpus}")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        # tensors on GPUs go through NCCL, Python objects through gloo: waiting for rank 0 then
        # keeps no GPU busy
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT,
                                device_id=torch.device(device))
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    return device


def shutdown() -> None:
    """End this process successfully, if it is one of several ranks.

    A normal exit can crash: Python frees its objects while gloo's threads still hold tensors
    (PyTorch pull request 179291). `os._exit` ends the process before that.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def rank() -> int:
    """The number of this process. Rank 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensor over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather_list(items: list) -> list:
    """The lists of all ranks, joined in the order of the ranks."""
    if not dist.is_initialized():
        return items
    lists = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for one_list in lists for item in one_list]


def on_rank0(function: Callable, *arguments) -> None:
    """Call a function on rank 0 while the other ranks wait.

    If it fails with InputError or OSError, all ranks raise InputError: none is left waiting.
    """
    errors = []
    if rank() == 0:
        try:
            function(*arguments)
        except (InputError, OSError) as error:
            errors = [user_error(error)]
    for message in all_gather_list(errors):
        raise InputError(message)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, gathered from all ranks, which must all call this. Others are returned."""
    # only a DTensor has this method; importing its class to ask for it is slow
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_model(model: torch.nn.Module, blocks, dtype: torch.dtype, device: str) -> None:
    """Move a model to its device: trainable weights in float32, frozen ones in `dtype`.

    Over several ranks, each block and then the rest of the model becomes a unit of `fully_shard`.
    A unit's weights are gathered in `dtype` when the unit runs, and its gradients are averaged over
    ranks in float32. The weights come from memory-mapped files and are converted unit by unit, so a
    rank never holds more than one full unit in float32.
    """
    if world_size() == 1:
        return convert_weights(model.parameters(), dtype, device)
    # these imports take half a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    mesh = dist.init_device_mesh(device.partition(":")[0], (world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*blocks, model):
        local = [weight for weight in unit.parameters() if not isinstance(weight, DTensor)]
        convert_weights(local, dtype, "cpu")  # fully_shard moves each rank's slice to its device
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def convert_weights(weights, dtype: torch.dtype, device: str) -> None:
    """In place: trainable weights to float32, frozen ones to `dtype`."""
    for weight in weights:
        weight.data = weight.data.to(device, torch.float32 if weight.requires_grad else dtype)
