"""Muon: momentum whose matrices are made near-orthogonal, in single precision throughout."""

import torch


def orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Newton-Schulz steps that bring all singular values of a stack of matrices near one."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """The usual Muon with Nesterov momentum; matrices of one shape are worked on in one stack."""

    def __init__(self, params, lr: float = 2e-3, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                looked_ahead = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params]
                # With this factor updates are as large as AdamW's, so that one learning rate suits both.
                size = 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonal(torch.stack(looked_ahead)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)
