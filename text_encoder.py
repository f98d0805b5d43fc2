"""Stable Diffusion 2.1's text encoder: OpenCLIP ViT-H's text tower without its last block.

MiniGPT-5 needs it in training only: its encoding of the caption is the target of the caption loss L_CAP
(section 3.3), whose other side is the mapper's output. The Stable Diffusion baselines sample with it.

    input_ids (B, 77)        -> token + position           (B, 77, 1024)       text_model.embeddings
                             -> 23 causal blocks           (B, 77, 1024)       text_model.encoder
                             -> last hidden state, normed  (B, 77, 1024)       TextEncoder

Left out: CLIP's pooled and projected vector, which Stable Diffusion does not use.
B batch, T tokens, D width, H heads, Dh head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class TextConfig:
    """text_encoder/config.json of Stable Diffusion 2.1."""

    vocab_size: int = 49408
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's CLIP and Stable Diffusion 1 were trained with this; OpenCLIP and Stable Diffusion 2 use exact GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        D, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, Dh)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """input_ids (B, T), attention_mask (B, T) of 0 and 1, or None -> last hidden state after the final norm (B, T, D).

    Stable Diffusion passes no mask: padding is read like text. MiniGPT-5's released training code passes the
    tokenizer's mask, which changes the states at the padding a great deal. A mask begins with 1, as the tokenizer's
    does, so that every query has a key.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.text_model = model = nn.Module()  # it and `encoder` are here for the published names only
        model.embeddings = Embeddings(config)
        model.encoder = nn.Module()
        model.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        model.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None
        if attention_mask is not None:
            T = input_ids.shape[1]
            causal = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).tril()
            mask = causal & attention_mask.bool()[:, None, None, :]  # (B, 1, T, T): whether a query reads a key
        model = self.text_model
        x = model.embeddings(input_ids)  # (B, T, D)
        for layer in model.encoder.layers:
            x = layer(x, mask)
        return model.final_layer_norm(x)
