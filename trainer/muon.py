"""Muon (Jordan et al. 2024): each matrix steps along its momentum made orthogonal, with all singular values about 1.

AdamW's step of a matrix is ruled by a few directions that all samples share. Here all directions move alike, so that
matrices which start from random values need far fewer steps. AdamW remains better for embeddings, vectors and layers
that read or write pixels.
"""

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """A convolution's kernel counts as a matrix with its output channels as rows. As with torch's fused optimisers, a
    step leaves everything unchanged where the attribute `found_inf`, a tensor, is 1; gradients must be finite even
    then."""

    def __init__(self, parameters, lr: float, momentum: float = 0.9):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        skipped = getattr(self, "found_inf", 0.0)  # 1 where a gradient was not finite
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "average" not in state:
                    state["average"] = torch.zeros_like(parameter)
                average = state["average"]
                average.mul_(group["momentum"] ** (1 - skipped)).add_(parameter.grad)
                ahead = parameter.grad.add(average, alpha=group["momentum"]).flatten(1)
                # A tall matrix's orthogonal step has smaller entries; this makes them as large as a square matrix's.
                size = group["lr"] * max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                parameter.add_((1 - skipped) * orthogonal(ahead).view_as(parameter), alpha=-size)


def orthogonal(matrix: Tensor) -> Tensor:
    """(..., R, C) -> the nearest matrix with all singular values 1, approximately, by five Newton-Schulz steps."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):  # the coefficients are those of Jordan et al.
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
