"""Matrix products without gradients on a CPU: the same values as F.linear, sooner and in less
memory.

A CPU that generates text spends its time reading weights. Three tricks help it, and only big
weights need them. The callers are `layers.linear` and `quantize.Int8Linear`.
"""

from math import gcd

import torch
import torch.nn.functional as F

MIN_NUMEL = 2**18  # smaller weights gain nothing
CHUNK_NUMEL = 2**20  # weights that are cast at a time: a chunk stays in the CPU's cache
SLICES = 16  # of a weight, to be read by all cores


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, exact: bool):
    """x (..., in) times weight (out, in), plus bias (out,), in the dtype of x.

    With exact=False and a bfloat16 weight, next tokens (B, 1, in) and the result are rounded to
    bfloat16: one row is then multiplied without casting the weight. Several rows are rounded as
    well, so that a reply does not depend on the batch.
    """
    is_decoding = x.ndim == 3 and x.shape[1] == 1
    if weight.numel() < MIN_NUMEL:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if is_decoding and not exact and weight.dtype == torch.bfloat16 and x.dtype != torch.bfloat16:
        return rounded_linear(x, weight, bias)
    product = decode_linear if is_decoding and x.dtype == torch.float32 else F.linear
    if weight.dtype == x.dtype:
        y = product(x, weight)
    else:
        y = cast_linear(x, weight, product)
    return y if bias is None else y + bias.to(x.dtype)


def cast_linear(x: torch.Tensor, weight: torch.Tensor, product=F.linear) -> torch.Tensor:
    """product(x, weight), with the weight cast to the dtype of x chunk by chunk.

    So it is never in memory twice. All chunks share one buffer, which stays in the CPU's cache: new
    memory for each would take as long as the product.
    """
    rows = max(SLICES, CHUNK_NUMEL // weight.shape[1] // SLICES * SLICES)
    buffer = torch.empty_like(weight[:rows], dtype=x.dtype)
    products = [product(x, buffer[: len(chunk)].copy_(chunk)) for chunk in weight.split(rows)]
    return torch.cat(products, dim=-1)


def rounded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """`linear` for next tokens (B, 1, in), x and the result rounded to the weight's bfloat16."""
    rounded = x.to(weight.dtype)
    if len(x) == 1:  # all cores multiply one bfloat16 row, twice as fast as after a cast
        y = F.linear(rounded, weight)
    else:  # several bfloat16 rows are slow on most CPUs; float32 sums give the same values
        y = linear(rounded.to(x.dtype), weight, None, exact=True).to(weight.dtype)
    return y.to(x.dtype) if bias is None else y.to(x.dtype) + bias.to(x.dtype)


def decode_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear for next tokens x (B, 1, in) in float32.

    torch multiplies a single row on one core, but spreads the products of a batch over all of them.
    Slices of the weight make such a batch.
    """
    slices, (out, size) = gcd(len(weight), SLICES), weight.shape
    # (slices, out / slices, in) times (slices, in, B)
    y = torch.bmm(weight.view(slices, -1, size), x.permute(1, 2, 0).expand(slices, -1, -1))
    return y.view(1, out, -1).permute(2, 0, 1).contiguous()  # (B, 1, out)


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (..., in) times weight (out, in), int8, times scale (out,), bfloat16: in the dtype of x.

    Next tokens (B, 1, in) and the result are rounded to bfloat16: torch's kernel for int8 is slow
    in float32. Its result for a row does not depend on the batch. In other products, which have
    many rows, the weight is cast chunk by chunk.
    """
    is_decoding = x.ndim == 3 and x.shape[1] == 1
    if is_decoding and weight.shape[1] % 16 == 0:  # the kernel reads past the end of other rows
        y = torch._weight_int8pack_mm(x[:, 0].bfloat16(), weight, scale)  # (B, out)
        return y[:, None].to(x.dtype)
    return cast_linear(x, weight) * scale.to(x.dtype)
