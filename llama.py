"""Vicuna, the frozen language model.

The decoder is LLaMA's: RMSNorm before each half of a block, rotary positions, SwiGLU. Others of its family load as
well: Llama 2 and 3, TinyLlama, SmolLM2. Left out: biases, sliding windows, and all scaling of rotary positions but
Llama 3's. Embeddings come in and hidden states go out: `minigpt5.Vokens` embeds the ids and computes the logits.

    embeddings     (B, T, D)
    hidden         (B, T, D)   after the final norm
    KV cache       (B, S, Hk, Dh) a layer, S slots allocated once

B batch, T tokens, S cache slots, D width, H heads, Hk key-value heads, Dh head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3 stretches its rotary positions over longer texts than it was first trained on; by default not at all.

    Frequencies that turn at least high_freq_factor times within the original positions stay, those that turn at most
    low_freq_factor times are divided by `factor`, and between the two the share that is divided falls linearly.
    """

    rope_type: str = "default"  # or "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.rope_type != "llama3" and (self.rope_type, self.factor) != ("default", 1.0):
            raise ValueError(f"rope_scaling of type {self.rope_type!r:.80} is not supported, only 'llama3'")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("rope_scaling has a low_freq_factor that is not below its high_freq_factor")


@dataclass
class LlamaConfig:
    """Fields of the published config.json; the defaults are Vicuna-7B v0's."""

    vocab_size: int = 32000  # v0 has one more, an old padding token
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # fewer than attention heads: grouped-query attention; 0: as many
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6  # v1.5 has 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False  # lm_head is embed_tokens

    @property
    def heads(self) -> tuple[int, int, int]:
        """H, Hk, Dh: the numbers of attention heads and of key-value heads, and the width of each."""
        H = self.num_attention_heads
        return H, self.num_key_value_heads or H, self.head_dim or self.hidden_size // H


def rotary_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """(Dh/2,): the angle that each pair of channels turns from one position to the next."""
    (_, _, head_width), scaling = config.heads, config.rope_scaling
    frequencies = config.rope_theta ** (-torch.arange(0, head_width, 2, device=device).float() / head_width)
    if scaling.rope_type == "llama3":
        turns = scaling.original_max_position_embeddings * frequencies / (2 * torch.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = ((turns - low) / (high - low)).clamp(0, 1)  # of each frequency, which stays undivided
        frequencies = share * frequencies + (1 - share) * frequencies / scaling.factor
    return frequencies


def rotary_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos and sin (B, T, 1, Dh) in float32, each of the Dh/2 angles twice. The first half of the
    sines is negative, so that `rotate` needs no more than a roll."""
    angles = positions[..., None, None].float() * frequencies  # (B, T, 1, Dh/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (..., Dh), halves x1 and x2: (x1 cos - x2 sin, x2 cos + x1 sin). Channel i turns with i +
    Dh/2, as in Hugging Face's files, not with i + 1."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class KVCache:
    """Keys and values of every layer in slots allocated once, so that decoding has static shapes.

    A token's slot is its position. Sequences of a batch may have different lengths: each goes on at its own position.
    One more slot, the last, takes the padding; no real token attends to it.
    """

    def __init__(self, llama: "Llama", batch: int, slots: int):
        table, (_, Hk, Dh) = llama.model.embed_tokens.weight, llama.config.heads
        self.device = table.device
        shape = (batch, slots + 1, Hk, Dh)
        layers = range(llama.config.num_hidden_layers)  # one tensor each: torch.compile would copy a stacked one
        self.keys = [torch.zeros(shape, dtype=table.dtype, device=self.device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=table.dtype, device=self.device) for _ in layers]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.batch = torch.arange(batch, device=self.device)[:, None]
        self.all_positions = torch.arange(slots + 1, device=self.device)
        self.used = slots + 1  # slots that may be filled; generation.say lowers it to those that are
        self.padding = slots

    @property
    def slots_read(self) -> int:
        """How many slots attention reads: `used`, rounded up to 64, so that shapes change seldom."""
        return -(-self.used // 64) * 64

    @property
    def key_positions(self) -> Tensor:
        return self.all_positions[: self.slots_read]  # (S,)

    def reserve(self, attention_mask: Tensor) -> Tensor:
        """Reserve the next slots for the tokens where attention_mask (B, T) is 1; returns the slots of all (B, T)."""
        positions = self.lengths[:, None] + attention_mask.cumsum(-1) - 1  # (B, T)
        self.lengths += attention_mask.sum(-1)
        return torch.where(attention_mask.bool(), positions, self.padding)

    def update(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key, value (B, T, Hk, Dh) at `positions` (B, T); returns what attention reads (B, S, Hk, Dh)."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self.batch, positions] = key
        values[self.batch, positions] = value
        return keys[:, : self.slots_read], values[:, : self.slots_read]


class GrowingKVCache:
    """The key-value cache of training. It grows by concatenation and is never overwritten, so that gradients can flow.

    A pass without gradients stores its keys and values for the next pass, in which no token attends to its padding. A
    pass with gradients stores none, so that gradient checkpointing may compute its layers a second time.
    """

    def __init__(self, batch: int, device):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.key_positions = torch.empty(batch, 1, 1, 0, dtype=torch.long, device=device)

    def reserve(self, attention_mask: Tensor) -> Tensor:
        """Positions (B, T) of the next pass's tokens, which are stored for the masks of this and later passes."""
        positions = self.lengths[:, None] + attention_mask.cumsum(-1) - 1
        unreachable = torch.iinfo(torch.long).max  # higher than any token's position: no token attends to padding
        new = torch.where(attention_mask.bool(), positions, unreachable)[:, None, None]  # (B, 1, 1, T)
        self.key_positions = torch.cat([self.key_positions, new], dim=-1)
        self.lengths = self.lengths + attention_mask.sum(-1)
        return positions

    def update(self, layer: int, _positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key, value (B, T, Hk, Dh) to the layer's; returns all of them (B, S, Hk, Dh)."""
        if layer in self.layers:
            key, value = (torch.cat(pair, dim=1) for pair in zip(self.layers[layer], (key, value), strict=True))
        if not torch.is_grad_enabled():
            self.layers[layer] = key, value
        return key, value


class Attention(nn.Module):
    attend = staticmethod(F.scaled_dot_product_attention)  # published/cpu.py replaces it for bfloat16 on a CPU

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, (H, Hk, Dh) = config.hidden_size, config.heads
        self.layer, self.heads = layer, (H, Hk)
        self.q_proj = nn.Linear(D, H * Dh, bias=False)
        self.k_proj = nn.Linear(D, Hk * Dh, bias=False)
        self.v_proj = nn.Linear(D, Hk * Dh, bias=False)
        self.o_proj = nn.Linear(H * Dh, D, bias=False)

    def forward(self, x: Tensor, rotary: tuple, positions: Tensor, mask: Tensor | None, cache) -> Tensor:
        (B, T, _), (H, Hk) = x.shape, self.heads
        q = self.q_proj(x).view(B, T, H, -1)  # (B, T, H, Dh)
        k, v = self.k_proj(x).view(B, T, Hk, -1), self.v_proj(x).view(B, T, Hk, -1)
        q, k = rotate(torch.cat([q, k], dim=2), *rotary).split((H, Hk), dim=2)
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v)  # (B, S, Hk, Dh)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or Hk, ., Dh)
        y = self.attend(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *attention) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()  # here for the published names only
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, embeddings: Tensor, attention_mask: Tensor | None = None, cache: KVCache | GrowingKVCache | None = None
    ) -> Tensor:
        """embeddings (B, T, D) -> hidden states after the final norm (B, T, D).

        attention_mask (B, T): 1 on tokens, 0 on padding on the left or right, whose hidden states mean nothing. A
        batch padded on the right needs no mask, since no token attends to later ones. With a cache the T tokens
        continue what the cache holds, and are stored in it.
        """
        B, T, _ = embeddings.shape
        device = embeddings.device
        if cache is not None:
            if attention_mask is None:
                attention_mask = torch.ones(B, T, dtype=torch.long, device=device)
            positions = cache.reserve(attention_mask)  # (B, T)
            # This is causal. Padding and empty slots have positions that are higher than any token's.
            mask = cache.key_positions <= positions[:, None, :, None]  # (B, 1, T, S)
        elif attention_mask is not None:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
            itself = torch.eye(T, dtype=torch.bool, device=device)  # so that no row of the softmax is empty
            mask = causal & attention_mask.bool()[:, None, None] | itself  # (B, 1, T, T)
        else:
            positions, mask = torch.arange(T, device=device).expand(B, T), None

        if mask is not None:
            mask = torch.where(mask, 0.0, -torch.inf).to(embeddings.dtype)  # converted once, not in each layer
        table = rotary_table(positions, rotary_frequencies(self.config, device))
        rotary = tuple(t.to(embeddings.dtype) for t in table)
        x = embeddings
        for block in self.model.layers:
            x = block(x, rotary, positions, mask, cache)
        return self.model.norm(x)
