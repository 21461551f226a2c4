"""LoRA (Hu et al., 2021): a frozen weight W is used as W + 2 B A, with thin trainable A and B.

Stage 2 then needs no gradients and no optimizer state for the language model's own weights, and
fits on one GPU. Saving adds 2 B A to W: the result is a model folder like any other.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .layers import Linear

SCALE = 2.0  # alpha / rank, as in LLaVA's own LoRA recipe


class LoRALinear(Linear):
    """A linear layer W (out, in) with A (rank, in) and B (out, rank).

    B starts at zero, so the layer starts as W.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = SCALE * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        # W x comes last. When the backward pass recomputes this layer, PyTorch stops at the last
        # tensor that a gradient needs, and so does not compute W x again.
        return update + super().forward(x)


def add_lora(llama: nn.Module, rank: int) -> list[nn.Parameter]:
    """Give every linear layer in the blocks of a Llama an A and a B; return them."""
    parameters = []
    for block in llama.model.layers:
        for module in (block.self_attn, block.mlp):
            for name, linear in list(module.named_children()):
                layer = LoRALinear(linear, rank)
                setattr(module, name, layer)
                parameters += [layer.A, layer.B]
    return parameters


def merge_lora(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The named tensors of a model with every A and B merged into its W."""
    merged = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and f"{layer}.A" in tensors:
            update = SCALE * tensors[f"{layer}.B"].float() @ tensors[f"{layer}.A"].float()
            tensor = (tensor.float() + update).to(tensor.dtype)
        if kind not in ("A", "B"):
            merged[name] = tensor
    return merged
