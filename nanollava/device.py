"""Where to compute, and in which dtype: what was asked for, or the fastest that is there."""

import torch

from .files import InputError


def best_device(wanted: str | None = None) -> str:
    """The device that was asked for, or the fastest kind there is. Raises InputError where it is not there."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    there = {name: count for name, count in there.items() if count}
    wanted = wanted or next(iter(there))
    name, _, number = wanted.partition(":")
    if name not in there or number and not (number.isdecimal() and int(number) < there[name]):
        raise InputError(f"--device {wanted} is not there, only {' and '.join(there)}")
    return wanted


def best_dtype(device: str, wanted: str | None = None) -> torch.dtype:
    """The dtype that was asked for, or bfloat16 where it is faster than float32: on GPUs that multiply it, and on
    processors with AMX. AVX-512's own bfloat16 has half the rate of float32 (on a Xeon; 167 GFLOP/s and 328)."""
    if wanted:
        return getattr(torch, wanted)
    fast = torch.cpu._is_amx_tile_supported()
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast and not device.startswith("mps") else torch.float32
