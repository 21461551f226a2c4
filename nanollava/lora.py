"""LoRA (Hu et al., 2021): a big matrix W stays as it is, and W + 2 B A is used, where the thin A and B learn.

With it, stage 2 needs no gradients and no optimizer state for the language model's own weights, and fits one GPU.
On saving, 2 B A is added to W: the result is a folder like any other.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .layers import Linear

SCALE = 2.0  # alpha / rank, as in LLaVA's own LoRA recipe


class LoRALinear(Linear):
    """A linear layer W (out, in) with A (rank, in) and B (out, rank) beside it; B begins at zero: nothing changes."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # W comes last: its product is no gradient's business, and so is not computed again (`layers.recomputed`)
        return SCALE * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) + super().forward(x)


def add_lora(llama: nn.Module, rank: int) -> list[nn.Parameter]:
    """Put A and B beside every linear layer in the blocks of a Llama, and return them."""
    learned = []
    for block in llama.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                layer = LoRALinear(linear, rank)
                setattr(part, name, layer)
                learned += [layer.A, layer.B]
    return learned


def merge_lora(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Named tensors of a model, with every A and B gone into their W."""
    merged = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and f"{layer}.A" in tensors:
            change = SCALE * tensors[f"{layer}.B"].float() @ tensors[f"{layer}.A"].float()
            tensor = (tensor.float() + change).to(tensor.dtype)
        if kind not in ("A", "B"):
            merged[name] = tensor
    return merged
