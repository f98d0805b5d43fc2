"""Muon (Jordan et al. 2024): momentum, made orthogonal matrix by matrix: all singular values of a step are about 1.

AdamW's step of a matrix is ruled by a few directions that every sample shares; here each direction moves alike, so that
far fewer steps are needed where weights start from nothing. For embeddings, vectors and what reads or writes pixels,
AdamW stays the better one.
"""

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """A convolution's kernel is a matrix of its output channels by all else. As with torch's fused optimisers, a step
    with the attribute `found_inf`, a tensor, at 1 leaves everything as it was; gradients must be finite even then."""

    def __init__(self, parameters, lr: float, momentum: float = 0.9):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        skipped = getattr(self, "found_inf", 0.0)  # 1: a gradient was not finite
        for group in self.param_groups:
            shapes = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.flatten(1).shape, []).append(parameter)
            for shape, parameters in shapes.items():
                for parameter in parameters:
                    if "average" not in self.state[parameter]:
                        self.state[parameter]["average"] = torch.zeros_like(parameter)
                averages = [self.state[p]["average"] for p in parameters]
                gradients = [p.grad for p in parameters]
                torch._foreach_mul_(averages, group["momentum"] ** (1 - skipped))
                torch._foreach_add_(averages, gradients)
                ahead = torch._foreach_add(gradients, averages, alpha=group["momentum"])
                steps = orthogonal(torch.stack([g.flatten(1) for g in ahead]))
                # Entries of a tall matrix's orthogonal step are smaller: this makes them as large as a square one's.
                size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, steps, strict=True):
                    parameter.add_((1 - skipped) * update.view_as(parameter), alpha=-size)


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, R, C) -> about the nearest matrices with all singular values 1, by five Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):  # coefficients of Jordan et al.
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
