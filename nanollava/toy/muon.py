"""Muon, the optimizer of stage 0: it teaches tiny networks from nothing in fewer steps than AdamW.

Stages 1 and 2 begin with networks that know something, and keep the paper's AdamW (`training.py`).
"""

import torch

MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is applied (Jordan et al., 2024).

    torch.optim.Muon does the same, one matrix at a time and in bfloat16, which most laptop processors only
    emulate; here matrices of one shape go through together, in float32.
    """

    def __init__(self, matrices, lr: float):
        super().__init__(matrices, dict(lr=lr))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                update = []
                for matrix in matrices:
                    state = self.state[matrix]
                    if not state:
                        state["average"] = torch.zeros_like(matrix)
                    state["average"].lerp_(matrix.grad, 1 - MOMENTUM)
                    ahead = matrix.grad.lerp(state["average"], MOMENTUM)
                    update.append(ahead.flatten(1))
                update = orthogonal(torch.stack(update))  # (matrices, rows, columns)
                scale = max(1, update.shape[1] / update.shape[2]) ** 0.5
                for matrix, change in zip(matrices, update):
                    matrix.sub_(change.view(matrix.shape), alpha=group["lr"] * scale)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices (N, rows, columns) with all singular values drawn near 1: five Newton-Schulz steps."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)  # adds while it multiplies
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.mT if tall else x


def muon(module: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside transformer blocks and the patch convolution, AdamW, at `lr`, for the rest.

    One rate serves both: a step of Muon is about as long for every matrix, and 20/3 suits all networks here.
    """
    matrices, rest = [], []
    for name, parameter in module.named_parameters():
        in_block = parameter.ndim == 2 and ".layers." in name
        (matrices if in_block or parameter.ndim == 4 else rest).append(parameter)
    return [Muon(matrices, lr * 20 / 3), torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
