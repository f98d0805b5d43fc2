"""bfloat16 on CPUs: where its kernels are slow, the same in another way. GPUs take none of these detours.

Some CPUs have no instructions for it, newer ones have units that multiply matrices of it (AMX, Xeons from 2023 on), on
which the full UNet runs four times as fast as in float32. No kernel here is ours: the work is cast to float32.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLIES_BF16 = torch.cpu._is_amx_tile_supported()  # has AMX; AVX-512's own instructions gain nothing over float32
WITHOUT_BF16 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # no instructions for it at all
ROWS = 256  # of a matrix that are in float32 at a time: few enough for the cache
FEW_KEYS = 256  # of attention


def is_bf16_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def in_float32(matrix: Tensor) -> Iterator[Tensor]:
    """The matrix in float32, ROWS rows at a time, all in the same memory, as the system would have to clear new memory
    each time: use a piece before you ask for the next."""
    memory = torch.empty(ROWS, matrix.shape[1])
    for rows in matrix.split(ROWS):
        yield memory[: len(rows)].copy_(rows)


class InFloat32(torch.autograd.Function):
    """x W^T for a frozen bfloat16 W, in float32: on a CPU without bfloat16 instructions several times as fast as its
    own products, and the gradient some 40 times."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        x32 = x.float()
        return torch.cat([F.linear(x32, rows) for rows in in_float32(weight)], dim=-1).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        parts = gradient.float().split(ROWS, dim=-1)
        products = (part @ rows for part, rows in zip(parts, in_float32(*ctx.saved_tensors), strict=True))
        return sum(products).to(gradient.dtype), None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., D) W^T, without a bias."""
    slow = WITHOUT_BF16 and is_bf16_on_cpu(x) and not weight.requires_grad
    if slow and (x.requires_grad or x[..., 0].numel() > 2):  # of one token or two the own products are quick
        return InFloat32.apply(x, weight)
    return F.linear(x, weight)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """torch's fused attention for frozen networks that gradients pass through: q (B, H, T, Dh), k and v (B, H, S, Dh)
    -> (B, H, T, Dh). mask: added to the scores.

    Of the fused kernel the gradient in bfloat16 takes a CPU two to ten times as long as in float32 while keys are few,
    and about as long or less from FEW_KEYS on.
    """
    if is_bf16_on_cpu(q) and (q.requires_grad or k.requires_grad) and k.shape[-2] < FEW_KEYS:
        mask = mask if mask is None else mask.float()
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, is_causal=is_causal).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
