"""The layers of the ViT and of LLaMA: PyTorch's own, with one rule for dtypes.

A layer computes in the dtype of its input and casts its weights to it. So trainable weights can be
float32 and frozen ones bfloat16 while the arithmetic is in either. Where both are the same, the
cast does nothing.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .infra import cpu


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, exact=True):
    """x (..., in) times weight (out, in), plus bias (out,), in the dtype of x: (..., out).

    exact=False lets a CPU round x to the weight's dtype where that is faster (`infra/cpu.py`). The
    layers allow it; logits stay exact, because the next token is their maximum.
    """
    if x.is_cpu and not torch.is_grad_enabled():
        return cpu.linear(x, weight, bias, exact)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, exact=False)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, 2019), in float32 inside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def normal_(tensor: torch.Tensor, std: float = 1.0) -> torch.Tensor:
    """Fill with normal numbers, except a meta tensor: for one, normal_ imports torch._dynamo, which
    takes a second."""
    return tensor if tensor.is_meta else tensor.normal_(std=std)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        normal_(self.weight.data)


class PatchEmbedding(nn.Conv2d):
    """Images (N, 3, H, W) to one vector a patch, (N, D, H / patch_size, W / patch_size)."""

    def __init__(self, hidden_size: int, patch_size: int):
        super().__init__(3, hidden_size, patch_size, stride=patch_size, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, self.weight.to(images.dtype), stride=self.stride)
