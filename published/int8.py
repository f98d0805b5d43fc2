"""Weight-only int8 quantisation of the language model: half of bfloat16's memory, and of what a GPU reads for a token.

Each row of a matrix becomes integers from -127 to 127 and a scale, by which the product is multiplied:
x (s Q)^T = s (x Q^T). A compiled step reads 8-bit numbers only; without torch.compile nothing gets faster. Embeddings
and norms keep their dtype. LoRA may be added.

    weight (out, in) -> Q (out, in) int8, scale (out,)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama


class Int8Linear(nn.Linear):
    def __init__(self, weight: Tensor, scale: Tensor):
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a matrix of floats
        self.out_features, self.in_features = weight.shape
        self.weight, self.scale = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, scale))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


def int8_rows(weight: Tensor, dtype: torch.dtype, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> int8 (out, in) and scale (out,) in `dtype`, on `device`."""
    weight = weight.to(device, torch.float32)
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-8).to(dtype)  # rounded before it divides
    return (weight / scale.float()[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def to_int8(llama: Llama, dtype: torch.dtype, device: str | torch.device = "cpu") -> Llama:
    """Replace the matrices of a frozen model's blocks, one after the other; all else goes to `device` in `dtype`."""
    for parent in list(llama.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(*int8_rows(child.weight, dtype, device)))
    return llama.to(device, dtype)
