"""bfloat16 on CPUs: where its kernels are slow, the same operation in float32. GPUs never need this.

Some CPUs have no instructions for bfloat16. Newer ones have units that multiply matrices of it (AMX, in Xeons from 2023
on), with which the full UNet runs four times as fast as in float32.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAS_AMX = torch.cpu._is_amx_tile_supported()  # AVX-512's own bfloat16 instructions are no faster than float32
HAS_NO_BF16 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # no instructions for it at all
ROWS = 256  # of a matrix that are cast at a time: few enough for the cache
MIN_KEYS = 256  # from this many keys on, the attention's own kernel is fast enough


def use_float32_kernels(model: nn.Module) -> None:
    """Replace what is slow in a frozen model in bfloat16 on a CPU: attention wherever a module has `attend`, and the
    linear layers without a bias, which are nearly all of a language model."""
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = attention
        if HAS_NO_BF16 and type(module) is nn.Linear and module.bias is None:
            module.forward = partial(linear, module)


def is_bf16_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def in_float32(matrix: Tensor) -> Iterator[Tensor]:
    """The matrix in float32, ROWS rows at a time. All pieces use the same memory, since fresh memory would have to be
    cleared by the system each time: a piece is overwritten when the next one is asked for."""
    memory = torch.empty(ROWS, matrix.shape[1])
    for rows in matrix.split(ROWS):
        yield memory[: len(rows)].copy_(rows)


class InFloat32(torch.autograd.Function):
    """x W^T for a frozen bfloat16 W, computed in float32. On a CPU without bfloat16 instructions this is several times
    as fast as torch's product, and its gradient some 40 times."""

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


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """The forward pass of a linear layer without a bias: x (..., D) -> x W^T."""
    weight = module.weight
    is_slow = is_bf16_on_cpu(x) and not weight.requires_grad
    if is_slow and (x.requires_grad or x[..., 0].numel() > 2):  # torch's product of one or two tokens is fast
        return InFloat32.apply(x, weight)
    return F.linear(x, weight)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: bool) -> Tensor:
    """torch's attention: q (B, H, T, Dh), k and v (B, H, S, Dh) -> (B, H, T, Dh). `mask` is added to the scores.

    With fewer than MIN_KEYS keys, torch's gradient in bfloat16 takes two to ten times as long as in float32.
    """
    if is_bf16_on_cpu(q) and (q.requires_grad or k.requires_grad) and k.shape[-2] < MIN_KEYS:
        mask = mask if mask is None else mask.float()
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, **options)
