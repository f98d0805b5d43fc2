"""Compiled training steps, and steps that save memory, without a line for either in the model.

torch.compile makes a graph for every shape that it meets, which takes a minute or more. So batches are padded to few
shapes when they are made, and the losses are compiled in three parts, each of which depends on one length alone:

    hidden_states     tokens of the sequences, T    collate(round_length=bucket_length)
    text_loss         tokens of the targets, L      collate(round_target=bucket_length)
    picture_losses    pictures of the batch, M      pad_pictures

The number of graphs is thus the sum of the parts' numbers of lengths, not their product.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.collate import Batch
from llama import Block
from minigpt5 import MiniGPT5, Noise
from unet import ResBlock, SpatialTransformer

MAX_GRAPHS = 64  # of one part; torch's own limit is 8


def bucket_length(length: int) -> int:
    """The next of 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320 ..."""
    step = 1 << max(4, length.bit_length() - 3)
    return -(-length // step) * step


def pad_pictures(
    batch: Batch, noise: Noise, posterior: tuple[Tensor, Tensor] | None, multiple: int
) -> tuple[Batch, Noise, tuple[Tensor, Tensor] | None]:
    """All three with M padded to a multiple of `multiple`, by pictures of zeros whose weight in the losses is 0."""
    M = len(batch.picture_sequences)

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, [0, 0] * (x.dim() - 1) + [0, -M % multiple])

    pictures = {name: pad(x) for name, x in batch._asdict().items() if name.startswith("picture_")}
    return batch._replace(**pictures), Noise(*map(pad, noise)), posterior and tuple(map(pad, posterior))


def compile_losses(model: MiniGPT5) -> None:
    """Compile the three parts of `MiniGPT5.losses`."""
    torch._dynamo.config.cache_size_limit = MAX_GRAPHS
    for name in ("hidden_states", "text_loss", "picture_losses"):
        setattr(model, name, torch.compile(getattr(model, name), dynamic=False, fullgraph=True))


def count_graphs() -> int:
    """How many graphs torch.compile has made in this process. Once all lengths have occurred, it stays the same."""
    from torch._dynamo.utils import counters  # takes a second to import

    return counters["stats"]["unique_graphs"]


def recompute(layer: Callable, *inputs, **options) -> Tensor:
    """The layer's output, for whose gradients the layer is computed again: only its inputs are kept. Without gradients
    `checkpoint` would do nothing, but torch.compile lets no layer write into a cache inside it."""
    if not torch.is_grad_enabled():
        return layer(*inputs, **options)
    return checkpoint(layer, *inputs, use_reentrant=False, **options)


def checkpoint_gradients(model: nn.Module) -> None:
    """Keep only the inputs of the language model's and the UNet's layers, and compute each layer again in the backward
    pass (arXiv 1604.06174): the same gradients, with less memory and more work."""
    for layer in model.modules():
        if isinstance(layer, Block | ResBlock | SpatialTransformer):
            layer.forward = partial(recompute, layer.forward)
