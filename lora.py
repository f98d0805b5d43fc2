"""The two ways in which stage 2 changes the frozen language model (paper section 3.3): LoRA and prefix tuning.

LoRA (arXiv 2106.09685) adds a low-rank product to chosen linear layers, y = W x + (alpha / r) B A x, with A and B
alone trained. Prefix tuning (arXiv 2101.00190) puts keys and values of P virtual tokens before those of every layer; an
MLP makes them from P learned embeddings. Both leave llama.py as it is: LoRA wraps layers by name, a prefix enters as a
cache.

    x -> lora_A -> lora_B, added to the layer's output      (B, T, D) -> (B, T, r) -> (B, T, D')
    Prefix() -> keys, values of all layers                  (L, P, Hk, Dh) each

B batch, T tokens, D width, L layers, P virtual tokens, Hk key-value heads, Dh head width, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llama import GrowingKVCache, KVCache, LlamaConfig

TARGETS = ("q_proj", "v_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank update, computed in float32. As in peft, A starts like any nn.Linear and
    B at zero."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.frozen, self.scale, self.active = frozen, alpha / rank, True
        device = frozen.weight.device
        self.lora_A = nn.Linear(frozen.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, frozen.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(x)
        if not self.active:
            return y
        update = self.scale * self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return y + update.to(y.dtype)


def add_lora(
    model: nn.Module,
    targets: tuple[str, ...] = TARGETS,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
) -> list[LoRALinear]:
    """Wrap every linear layer of `model` whose own name is in `targets`. ValueError for a name that no layer has."""
    added, missing = [], set(targets)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                added.append(LoRALinear(child, rank, alpha, dropout))
                setattr(parent, name, added[-1])
                missing.discard(name)
    if missing:
        raise ValueError(f"no linear layer is named {' or '.join(sorted(missing))}")
    return added


@contextmanager
def disabled(layers: list[LoRALinear]) -> Iterator[None]:
    """A context in which the layers leave out their updates."""
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


class Prefix(nn.Module):
    """Keys and values of P virtual tokens, with peft's parameter names."""

    def __init__(self, config: LlamaConfig, tokens: int = 5, hidden: int = 1024):
        super().__init__()
        self.layers, (_, self.heads, head_width) = config.num_hidden_layers, config.heads
        D = self.heads * head_width  # the width of the embedding, too, as in peft
        self.embedding = nn.Embedding(tokens, D)
        self.transform = nn.Sequential(nn.Linear(D, hidden), nn.Tanh(), nn.Linear(hidden, 2 * self.layers * D))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (L, P, Hk, Dh) each, as they are after the rotary embedding: none is applied to them."""
        both = self.transform(self.embedding.weight)  # (P, L * 2 * Hk * Dh)
        return both.unflatten(-1, (self.layers, 2, self.heads, -1)).transpose(0, 1).unbind(2)

    def fill(self, cache: KVCache) -> None:
        """Decoding: put the prefix into the first P slots of every sequence."""
        keys, values = self()
        P = keys.shape[1]
        for layer in range(self.layers):
            cache.keys[layer][:, :P], cache.values[layer][:, :P] = keys[layer], values[layer]
        cache.lengths += P

    def growing_cache(self, batch: int, dtype: torch.dtype) -> GrowingKVCache:
        """Training: a cache that holds the prefix for every sequence of a batch. Gradients reach the prefix."""
        keys, values = (y.to(dtype)[:, None].expand(-1, batch, -1, -1, -1) for y in self())  # (L, B, P, Hk, Dh)
        P = keys.shape[2]
        cache = GrowingKVCache(batch, keys.device)
        cache.reserve(torch.ones(batch, P, dtype=torch.long, device=keys.device))
        cache.layers = dict(enumerate(zip(keys, values, strict=True)))
        return cache
