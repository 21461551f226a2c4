"""Layers that compute in the dtype of their input, whatever dtype their weights are kept in.

So what learns is kept in float32 while the arithmetic is bfloat16; and a processor that is slow in bfloat16 computes in
float32 with weights that fit its memory in bfloat16 only. Where the two are the same, nothing is converted. One case
computes in less than its input: a single token on a processor, to which a weight in bfloat16 is the bigger part.
"""

from math import gcd

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PIECE = 2**20  # weights that are converted at once, where they are not wanted again: they stay in the cache
MANY, SLICES = 2**18, 16  # a weight as big as this is read slice by slice, by all cores


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., in) times weight (out, in), in the dtype of x.

    On a processor, unless gradients want it back, a big weight is converted piece by piece, so that it is never in
    memory twice, and next tokens (B, 1, in) have every core read.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if torch.is_grad_enabled() or not x.is_cpu or weight.numel() < MANY:
        return F.linear(x, weight.to(x.dtype), bias)
    product = next_tokens if x.dtype == torch.float32 and x.ndim == 3 and x.shape[1] == 1 else F.linear
    if weight.dtype == x.dtype:
        return product(x, weight, bias)
    rows = max(SLICES, PIECE // weight.shape[1] // SLICES * SLICES)
    y = torch.cat([product(x, piece.to(x.dtype)) for piece in weight.split(rows)], dim=-1)
    return y if bias is None else y + bias


def next_tokens(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` for x (B, 1, in) on a processor. To read the weight is all the work then; torch lets one core do that
    for a row of float32, but shares out the products of a batch: here, of slices of the weight."""
    S, (out, D) = gcd(len(weight), SLICES), weight.shape
    y = torch.bmm(weight.view(S, -1, D), x[:, 0].T.expand(S, -1, -1))  # (S, out / S, in) times (S, in, B)
    y = y.view(out, -1).T.contiguous()[:, None]  # (B, 1, out)
    return y if bias is None else y + bias


def recomputed(function, *inputs):
    """function(*inputs). In training only the inputs are kept, and the backward pass runs the function again, up to the
    last thing that a gradient wants."""
    if torch.is_grad_enabled():  # and nothing random in there whose state would have to be kept
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


class Linear(nn.Linear):
    """`linear`; but where a single token on a processor meets a big weight in bfloat16, the token is rounded to it, and
    so is what comes out. To read the weight is all the work then, and torch does that twice as fast unconverted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single = x.is_cpu and x.numel() == self.in_features and self.weight.numel() >= MANY
        if single and self.weight.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            return linear(x.to(torch.bfloat16), self.weight, self.bias).to(x.dtype)
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """Divided by the root of the mean square (Zhang & Sennrich, 2019); torch computes it in float32 and rounds once."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def normal(tensor: torch.Tensor, std: float = 1.0) -> torch.Tensor:
    """Fill with normal numbers; not on the meta device, where torch takes a second to import what draws nothing."""
    return tensor if tensor.is_meta else tensor.normal_(std=std)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        normal(self.weight.data)


class PatchEmbedding(nn.Conv2d):
    """Cuts pictures (N, 3, H, W) into patches and maps each to a vector, (N, D, H / patch, W / patch)."""

    def __init__(self, size: int, patch: int):
        super().__init__(3, size, patch, stride=patch, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, self.weight.to(images.dtype), stride=self.stride)
