"""bfloat16 on CPUs: where torch's kernel is slow, the same operation in float32. GPUs never need this.

Newer CPUs have units that multiply matrices of bfloat16 (AMX, in Xeons from 2023 on), with which the full UNet runs
four times as fast as in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAS_AMX = torch.cpu._is_amx_tile_supported()  # AVX-512's own bfloat16 instructions are no faster than float32
MIN_KEYS = 256  # from this many keys on, the attention's own kernel is fast enough


def with_float32_attention(model: nn.Module) -> nn.Module:
    """A frozen model. If it is in bfloat16 on a CPU, its attention is replaced wherever a module has `attend`."""
    if any(p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in model.parameters()):
        for module in model.modules():
            if hasattr(module, "attend"):
                module.attend = attention
    return model


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: bool) -> Tensor:
    """torch's attention: q (B, H, T, Dh), k and v (B, H, S, Dh) -> (B, H, T, Dh). `mask` is added to the scores.

    With fewer than MIN_KEYS keys, torch's gradient in bfloat16 takes two to ten times as long as in float32.
    """
    is_bf16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if is_bf16_on_cpu and (q.requires_grad or k.requires_grad) and k.shape[-2] < MIN_KEYS:
        mask = mask if mask is None else mask.float()
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, **options)
