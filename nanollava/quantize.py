"""int8 weights: a row of a weight becomes a row of int8 numbers and a scale, half of bfloat16's
bytes.

A generated token reads every weight once, so fewer bytes are more tokens a second. The linear
layers in the blocks of the language model are quantized, 92 % of LLaVA-1.5-7B. The rest gains
little: the ViT runs once an image, a token reads one row of the embeddings, and the next token is
the maximum of lm_head's products, which therefore stay exact.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .infra import cpu

ROWS = 64  # quantized at a time: they stay in the CPU's cache


class Int8Linear(nn.Module):
    """A frozen linear layer W (out, in), as int8 numbers (out, in) times scales (out,)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        rows = [quantize_rows(part) for part in linear.weight.detach().split(ROWS)]
        numbers, scales = zip(*rows)
        self.register_buffer("weight", torch.cat(numbers))
        self.register_buffer("scale", torch.cat(scales))

    def _apply(self, function, recurse: bool = True):
        """`to(dtype)` casts buffers, but torch's kernel takes the scales in bfloat16."""
        super()._apply(function, recurse)
        self.scale = self.scale.bfloat16()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cpu:
            return cpu.int8_linear(x, self.weight, self.scale)
        # torch.compile fuses this: the kernel then reads int8
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None])


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, in) to int8 numbers (n, in) and scales (n,) in bfloat16.

    The largest number of a row becomes 127. The scale is rounded first, so that this adds no error.
    """
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_int8(llama: nn.Module) -> None:
    """Replace the linear layers in the blocks of a Llama by Int8Linears, one after the other.

    If its weights are memory-mapped, the peak of memory is the quantized model and one layer.
    """
    for block in llama.model.layers:
        for module in (block.self_attn, block.mlp):
            for name, linear in list(module.named_children()):
                setattr(module, name, Int8Linear(linear))
