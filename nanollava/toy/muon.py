"""Muon, the optimizer of stage 0: it trains tiny networks from scratch in fewer steps than AdamW.

Stages 1 and 2 start from trained networks and use the paper's AdamW (training.py).
"""

import torch

MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum whose update matrix is made orthogonal before it is applied (Jordan et al., 2024).

    torch.optim.Muon does the same in bfloat16, which most laptop CPUs only emulate, and one matrix
    at a time. Here all matrices of one shape are processed together, in float32.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float):
        super().__init__(matrices, dict(lr=lr))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                # flatten: a convolution is a matrix (out, in * height * width)
                updates = torch.stack([self.momentum(matrix).flatten(1) for matrix in matrices])
                updates = orthogonalize(updates)  # (matrices, rows, columns)
                scale = max(1, updates.shape[1] / updates.shape[2]) ** 0.5
                for matrix, update in zip(matrices, updates):
                    matrix.sub_(update.view(matrix.shape), alpha=group["lr"] * scale)

    def momentum(self, matrix: torch.nn.Parameter) -> torch.Tensor:
        """Update the running mean of a matrix's gradient; return Nesterov's look ahead of it."""
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(state["momentum"], MOMENTUM)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of matrices (N, rows, columns) near 1, by Newton-Schulz steps."""
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        # x = a x + (b x x^T + c (x x^T)^2) x; baddbmm adds in the same pass as it multiplies
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.mT if is_tall else x


def muon(module: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of transformer blocks and the patch convolution, AdamW for the rest.

    `lr` is AdamW's. Muon's is 20/3 of it, a ratio that works for all networks here: an update of
    Muon has about the same size for every matrix.
    """
    matrices, others = [], []
    for name, parameter in module.named_parameters():
        is_block_matrix = parameter.ndim == 2 and ".layers." in name
        is_convolution = parameter.ndim == 4
        (matrices if is_block_matrix or is_convolution else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr * 20 / 3), adamw]
