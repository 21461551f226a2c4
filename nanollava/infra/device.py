"""Where to compute, and in which dtype: what was asked for, or the fastest that is there."""

import torch

from .io import InputError


def best_device(wanted: str | None = None) -> str:
    """The device that was asked for, or the fastest kind there is. Raises InputError where it is not there."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    there = {name: count for name, count in there.items() if count}
    wanted = wanted or next(iter(there))
    name, _, number = wanted.partition(":")
    if name not in there or number and not (number.isdecimal() and int(number) < there[name]):
        raise InputError(f"--device {wanted} is not there, only {' and '.join(there)}")
    return wanted


def fast_in_bfloat16(device: str) -> bool:
    """Is bfloat16 faster than float32? On GPUs that multiply it, and on processors with AMX; AVX-512's own bfloat16 has
    half the rate of float32 (on a Xeon; 167 GFLOP/s and 328), and without it a tenth."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.startswith("cpu") and torch.cpu._is_amx_tile_supported()


def best_dtype(device: str, wanted: str | None = None) -> torch.dtype:
    """The dtype that was asked for, or the fastest: of weights that are read only, and of what training writes."""
    if wanted:
        return getattr(torch, wanted)
    return torch.bfloat16 if fast_in_bfloat16(device) else torch.float32


def pick_compute_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What to compute in with weights of `dtype`: float32, too, on a processor where bfloat16 would be slow."""
    return torch.float32 if device.startswith("cpu") and not fast_in_bfloat16(device) else dtype
