"""The voken feature mapper: from the language model's voken features to the diffusion model's conditioning.

Paper section 3.2.2: a two-layer MLP, then an encoder-decoder transformer whose decoder reads learned queries in the
place of words. Its 77 x 1024 output replaces Stable Diffusion's text encoding. The transformer is the one that
torch.nn.Transformer builds (pre-norm, ReLU, final norms) and has its parameter names, which are those of the released
checkpoints. As released it has no dropout and no masks.

    voken features   (M, N, D_llm)   hidden states that predict [IMG0]..[IMGN-1]
    fc               (M, N, D)       Linear, GELU, Linear
    memory           (M, N, D)       encoder
    conditioning     (M, S, D)       decoder over the S learned queries, in place of the text encoding

M pictures, N vokens, S conditioning tokens, D conditioning width, H heads, Dh head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 8  # whatever the width
LAYERS = 4  # in the encoder and in the decoder


class Attention(nn.Module):
    """Multi-head attention with torch.nn.MultiheadAttention's parameters: one matrix for query, key and value."""

    heads = HEADS

    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Queries from x (B, S, D), or (1, S, D) for a whole batch; keys and values from memory (B, N, D) or x."""
        D, weight, bias = x.shape[-1], self.in_proj_weight, self.in_proj_bias
        if memory is None:
            q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            q = F.linear(x, weight[:D], bias[:D])
            k, v = F.linear(memory, weight[D:], bias[D:]).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, ., Dh)
        y = F.scaled_dot_product_attention(q.expand(len(k), -1, -1, -1), k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, S, D)


class EncoderLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.self_attn = Attention(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        return x + self.linear2(F.relu(self.linear1(self.norm2(x))))


class DecoderLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.self_attn = Attention(width)
        self.multihead_attn = Attention(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.multihead_attn(self.norm2(x), memory)
        return x + self.linear2(F.relu(self.linear1(self.norm3(x))))


class Stack(nn.Module):
    """Layers and a final norm; a decoder's layers also read `memory`."""

    def __init__(self, layer: type[nn.Module], width: int):
        super().__init__()
        self.layers = nn.ModuleList(layer(width) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, *memory: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *memory)
        return self.norm(x)


class Transformer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.encoder = Stack(EncoderLayer, width)
        self.decoder = Stack(DecoderLayer, width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)  # torch.nn.Transformer's start


class VokenMapper(nn.Module):
    """voken features (B, N, D_llm) -> conditioning (B, S, D). Features of zeros: guidance's unconditional branch."""

    def __init__(self, llm_width: int = 4096, width: int = 1024, tokens: int = 77):
        super().__init__()
        if width % HEADS:
            raise ValueError(f"the conditioning width {width} is not a multiple of the mapper's {HEADS} heads")
        self.fc = nn.Sequential(nn.Linear(llm_width, width), nn.GELU(), nn.Linear(width, width))
        self.llm_to_t2i_mapping = Transformer(width)
        self.t2i_decoder_prompt = nn.Parameter(torch.randn(1, tokens, width))  # as released: a unit normal start

    def forward(self, features: Tensor) -> Tensor:
        memory = self.llm_to_t2i_mapping.encoder(self.fc(features))  # (B, N, D)
        # The queries are the same for the whole batch until they attend to `memory`, in the middle of the first layer.
        return self.llm_to_t2i_mapping.decoder(self.t2i_decoder_prompt, memory)  # (B, S, D)
