"""What this machine can do: the rate of its matrix products and of reading its memory, and the
least time that steps and tokens need at those rates."""

import time
from collections.abc import Callable

import torch

from ..infra.device import pick_compute_dtype
from ..infra.progress import print0
from ..llava import Llava
from ..plan import count_parameters, step_flops
from ..training import freeze
from .sides import CONFIG, NEW_TOKENS, ROWS, TARGETS, TOKENS


def best_time(function: Callable, device: str, repeat: int = 5) -> float:
    """Seconds of the fastest of several calls, including the work that they start on the device."""
    def synchronize() -> None:
        if device != "cpu":
            torch.accelerator.synchronize(torch.device(device))

    times = []
    for _ in range(repeat):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_flops(dtype: torch.dtype, device: str) -> float:
    """Operations per second in a product of two square matrices, of the fastest size."""
    rates = []
    for size in (512, 1024, 2048) if device == "cpu" else (2048, 4096, 8192):
        x = torch.randn(size, size, device=device).to(dtype)
        rates.append(2 * size**3 / best_time(lambda: x @ x, device, 20))
    return max(rates)


def memory_bandwidth(device: str) -> float:
    """Bytes per second read from memory, by a sum over a gigabyte."""
    x = torch.ones(2**28, device=device)
    return x.nbytes / best_time(x.sum, device)


def machine_limits(dtype: torch.dtype, device: str) -> dict[str, float]:
    """The least seconds that this machine needs, by its matrix products or its memory bandwidth."""
    compute_dtype = pick_compute_dtype(dtype, device)
    flops, bandwidth = matmul_flops(compute_dtype, device), memory_bandwidth(device)
    print0(f"this machine: {flops / 1e9:,.0f} GFLOP/s in {str(compute_dtype)[6:]} matrix products, "
           f"reads {bandwidth / 1e9:,.1f} GB/s")
    with torch.device("meta"):
        model = Llava(CONFIG)
    limits = {}
    for stage in (1, 2):
        freeze(model, stage)
        limits[f"stage {stage} step"] = step_flops(model, ROWS, TOKENS, TARGETS) / flops
    # a new token reads every weight once, except the embeddings, and the keys and values so far
    D, V = CONFIG.text.hidden_size, CONFIG.text.vocab_size
    weights = count_parameters(model.language_model) - V * D
    cache = 2 * CONFIG.text.num_hidden_layers * (TOKENS + NEW_TOKENS / 2) * D
    num_bytes = dtype.itemsize * weights + compute_dtype.itemsize * cache
    return limits | {"next token": num_bytes / bandwidth}
