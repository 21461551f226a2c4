"""Where to compute and how: device, dtype, compiled blocks."""

import torch
import torch.nn as nn

from .io import InputError


def best_device(requested: str | None = None) -> str:
    """The requested device, else the fastest available. Raises InputError if it does not exist."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()),
              "cpu": 1}
    names = [name for name, count in counts.items() if count]
    if requested is None:
        return names[0]
    numbered = {f"{name}:{number}" for name in names for number in range(counts[name])}
    if requested not in numbered.union(names):
        raise InputError(f"--device {requested} does not exist here, only {' and '.join(names)}")
    return "cpu" if requested == "cpu:0" else requested


def fast_in_bfloat16(device: str) -> bool:
    """Whether bfloat16 is faster than float32: on most GPUs, and on CPUs with AMX.

    Other CPUs emulate it, at a tenth of the rate, or have AVX-512's bfloat16, at half the rate.
    """
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.startswith("cpu") and torch.cpu._is_amx_tile_supported()


def best_dtype(device: str, requested: str | None = None) -> torch.dtype:
    """The requested dtype, else the fastest: for generation, and for the files that are saved."""
    if requested:
        return getattr(torch, requested)
    return torch.bfloat16 if fast_in_bfloat16(device) else torch.float32


def pick_compute_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype to compute in with weights of `dtype`: float32 on a CPU that is slow in bfloat16.

    There, generation rounds each next token to bfloat16 weights (`infra/cpu.py`), prompts it does
    not.
    """
    slow = device.startswith("cpu") and not fast_in_bfloat16(device)
    return torch.float32 if slow else dtype


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device, without waiting where that is safe: from pinned memory to a CUDA GPU."""
    non_blocking = device.type == "cuda" and tensor.is_pinned()
    return tensor.to(device, non_blocking=non_blocking)


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of each of `model.blocks`, for rows of any length.

    Parameters keep their names, and hooks on a block (fully_shard's) stay outside the graph.
    """
    # training, validation, prompt, next token; the last block differs; so does a single row
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)
