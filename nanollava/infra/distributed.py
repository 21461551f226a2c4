"""One process or many: what torchrun started, and the model cut into shards over its processes.

With `torchrun train.py`, every process works on its part of each batch and owns a slice of every weight, gradient
and optimizer state (FSDP2, `fully_shard`; ZeRO stage 3 in the paper's appendix). With plain `python train.py` there
is one process, and nothing here does anything.
"""

import atexit
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from .io import InputError


def init_distributed(device: str) -> str:
    """Join the processes that torchrun started, if it did; returns this one's device, "cuda:3" where it was "cuda"."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return device
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise InputError(f"WORLD_SIZE says that there are several processes, but {', '.join(sorted(missing))} is not "
                         "set: start them with torchrun")
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    atexit.register(dist.destroy_process_group)
    return device


def shutdown() -> None:
    """End this process if it is one of several and all went well.

    Not in Python's own way: gloo's threads may still hold tensors, and to let go of one while Python takes itself
    apart aborts the process (PyTorch's pull request 179291).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def rank() -> int:
    """The number of this process; 0 tells the user things and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather_list(items: list) -> list:
    """What every process has in its list, one after the other."""
    lists = [None] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]
    return items


def on_rank0(work: Callable[[], object]) -> None:
    """The first process does it, the others wait. Raises InputError in all of them if it fails."""
    problem = []
    if rank() == 0:
        try:
            work()
        except (InputError, OSError) as error:
            problem = [str(error)]
    for text in all_gather_list(problem):
        raise InputError(text)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its slices; every process has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor, whose class imports slowly


def shard_model(model: torch.nn.Module, blocks, dtype: torch.dtype, device: str) -> None:
    """Put a model's weights where they will be trained: what learns in float32, what is frozen in `dtype`.

    Over several processes each of `blocks`, then what is left, becomes a unit: its weights are gathered, in `dtype`,
    when it is their turn, and its gradients are averaged in float32. Tensors come from memory-mapped files and go
    block by block, so no process ever holds more than one block of the whole in float32.
    """

    def settle(parameters, device: str) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(device, torch.float32 if parameter.requires_grad else dtype)

    if world_size() == 1:
        return settle(model.parameters(), device)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes half a second
    from torch.distributed.tensor import DTensor

    mesh = dist.init_device_mesh(device.partition(":")[0], (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*blocks, model):
        settle([parameter for parameter in unit.parameters() if not isinstance(parameter, DTensor)], "cpu")
        fully_shard(unit, mesh=mesh, mp_policy=policy)
