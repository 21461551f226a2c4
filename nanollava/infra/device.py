"""Where to compute and how: device, dtype, compiled blocks."""

from pathlib import Path

import torch
import torch.nn as nn

from .io import InputError

CPU_INFO = Path("/proc/cpuinfo")  # who made the CPU, on Linux


def best_device(requested: str | None = None) -> str:
    """The requested device, else the fastest available. Raises InputError if it does not exist.

    Also chooses the attention kernels of CUDA GPUs: not cuDNN's. Since torch 2.11 they are the
    first choice on the H100 and its successors, but planning a new shape takes 116 ms, forward and
    backward (ATen/native/cudnn/MHA.cpp), and a run of stage 2 has a thousand shapes.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
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
    """Whether bfloat16 is faster than float32.

    It is on GPUs since the A100 and on CPUs with AMX. AVX-512's bfloat16 is faster than float32 on
    AMD's CPUs, which have it since Zen 4, but runs at half the rate on Intel's. Other CPUs emulate
    bfloat16, at a tenth of the rate.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not device.startswith("cpu"):
        return False
    return torch.cpu._is_amx_tile_supported() or (
        torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in CPU_INFO.read_text())


def best_dtype(device: str, requested: str | None = None, generating=False) -> torch.dtype:
    """The requested dtype, else the fastest, for training and the files that are saved.

    generating: float16 is then possible, on GPUs that are slow in bfloat16 but have units for
    float16 (V100, T4). Training needs a larger range: small gradients become 0 in float16.
    """
    if requested:
        return getattr(torch, requested)
    if fast_in_bfloat16(device):
        return torch.bfloat16
    has_float16 = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if generating and has_float16 else torch.float32


def pick_compute_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype to compute in with weights of `dtype`: float32 on a CPU that is slow in it.

    There, generation with bfloat16 weights rounds next tokens to bfloat16, but not prompts
    (`infra/cpu.py`).
    """
    fast = dtype == torch.bfloat16 and fast_in_bfloat16(device)
    return torch.float32 if device.startswith("cpu") and not fast else dtype


def slot_multiple(device: torch.device | str) -> int:
    """A KV cache is read in lengths that are a multiple of this.

    On a GPU, next tokens then have a new shape once in 64 tokens: Apple's kernels are planned for
    each shape, CUDA's need masks with aligned rows, and the CPU that starts them is the bottleneck.
    On a CPU, every slot that is read takes time.
    """
    return 1 if torch.device(device).type == "cpu" else 64


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
