"""The frozen image side of MiniGPT-4, which MiniGPT-5 keeps as it is: a picture becomes 32 embeddings that the language
model reads in place of a word (MiniGPT-5, section 3.1; BLIP-2, arXiv 2301.12597, section 3.1).

    pixels (B, 3, 224, 224) -> EVA-ViT-g, 39 blocks               (B, 257, 1408)   vision_model.encoder
                            -> its final norm, "ln_vision"         (B, 257, 1408)   vision_model
    query tokens (32, 768)  -> Q-Former, reading the patches       (B, 32, 768)     qformer
                            -> linear to the language model        (B, 32, 4096)    llama_proj

The names are those of Salesforce/blip2-flan-t5-xxl, and llama_proj is MiniGPT-4's. Left out: BLIP-2's own language
model and its projection, the Q-Former's text half, which the query tokens never pass through, and other picture sizes
(positions are learned for one size).

B batch, T picture tokens (patches and one class token), Q query tokens, D width, H heads, Dh head width.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common.images import resize_and_crop, to_tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# BLIP-2's own code, which MiniGPT-4 and 5 run, has 1e-5 for this norm and 1e-6 for the others of the vision tower. The
# config.json of the Hugging Face copy has one number for both, so this one is not read from there.
LN_VISION_EPS = 1e-5


@dataclass
class VisionConfig:
    """The "vision_config" of a BLIP-2 config.json; the defaults are EVA-ViT-g with its last block cut off."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6


@dataclass
class QFormerConfig:
    """The "qformer_config" of a BLIP-2 config.json: BERT-base, reading the picture in every second layer."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    layer_norm_eps: float = 1e-12
    num_query_tokens: int = 32  # the one field that the published file keeps at its top level


def preprocess_input(image: Image.Image, size: int = 224, pad: bool = False) -> Tensor:
    """RGB picture -> float32 (3, size, size), normalised as CLIP's pictures are.

    Training crops to the centre square; the released demo pads to a square with white instead (`pad`).
    """
    pixels = to_tensor(resize_and_crop(image, size, pad))
    return (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of every query to every key. (B, Q, D), (B, T, D), (B, T, D) -> (B, Q, D)."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))  # (B, H, ., Dh)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # (B, Q, D)


# The vision transformer: pre-norm, its class token first, all tokens kept.


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        D, patch = config.hidden_size, config.patch_size
        tokens = (config.image_size // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(1, tokens, D))
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # (B, D, h, w)
        x = x.flatten(2).transpose(1, 2)  # (B, T - 1, D)
        x = torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1)  # (B, T, D)
        return x + self.position_embedding


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        # EVA has no bias for the keys; the published fused bias holds zeros in its place.
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(attend(*self.qkv(x).chunk(3, dim=-1), self.heads))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.layer_norm1 = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(D, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, D)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """pixels (B, 3, size, size), normalised as `preprocess_input` does -> all tokens after ln_vision, (B, T, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        layers = nn.Sequential(*(VisionLayer(config) for _ in range(config.num_hidden_layers)))
        self.encoder = nn.Sequential(OrderedDict(layers=layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=LN_VISION_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        size = self.config.image_size
        assert pixels.shape[1:] == (3, size, size), f"pixels {tuple(pixels.shape)}, expected (B, 3, {size}, {size})"
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))


# The Q-Former: a post-norm BERT whose only input is a set of learned queries.


class QFormerProjections(nn.Module):
    def __init__(self, config: QFormerConfig, source_width: int):
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(source_width, D), nn.Linear(source_width, D)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        return attend(self.query(x), self.key(source), self.value(source), self.heads)


class ResidualNorm(nn.Module):
    """BERT's end of a sub-layer: project, add what came in, normalise the sum."""

    def __init__(self, config: QFormerConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class QFormerAttention(nn.Module):
    def __init__(self, config: QFormerConfig, source_width: int):
        super().__init__()
        self.attention = QFormerProjections(config, source_width)
        self.output = ResidualNorm(config, config.hidden_size)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        return self.output(self.attention(x, source), x)


class QFormerLayer(nn.Module):
    def __init__(self, config: QFormerConfig, index: int):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        reads_picture = index % config.cross_attention_frequency == 0
        self.attention = QFormerAttention(config, D)
        self.crossattention = QFormerAttention(config, config.encoder_hidden_size) if reads_picture else None
        self.intermediate_query = nn.Sequential(OrderedDict(dense=nn.Linear(D, hidden), gelu=nn.GELU()))
        self.output_query = ResidualNorm(config, hidden)

    def forward(self, x: Tensor, picture: Tensor) -> Tensor:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, picture)
        return self.output_query(self.intermediate_query(x), x)


class QFormer(nn.Module):
    """queries (B, Q, D), picture tokens (B, T, encoder_hidden_size) -> (B, Q, D)."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = nn.Module()  # here for the published names only
        self.encoder.layer = nn.ModuleList(QFormerLayer(config, index) for index in range(config.num_hidden_layers))

    def forward(self, queries: Tensor, picture: Tensor) -> Tensor:
        x = self.layernorm(queries)
        for layer in self.encoder.layer:
            x = layer(x, picture)
        return x


class ImageEncoder(nn.Module):
    """pixels (B, 3, size, size), normalised as `preprocess_input` does -> (B, Q, llm_width)."""

    def __init__(self, vision: VisionConfig, qformer: QFormerConfig, llm_width: int = 4096):
        super().__init__()
        self.vision_model = VisionTransformer(vision)
        self.qformer = QFormer(qformer)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, qformer.num_query_tokens, qformer.hidden_size))
        self.llama_proj = nn.Linear(qformer.hidden_size, llm_width)

    def forward(self, pixels: Tensor) -> Tensor:
        picture = self.vision_model(pixels)  # (B, T, Dv)
        queries = self.query_tokens.expand(len(pixels), -1, -1)  # (B, Q, D)
        return self.llama_proj(self.qformer(queries, picture))  # (B, Q, llm_width)
