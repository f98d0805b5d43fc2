"""Stable Diffusion 2.1's UNet: noisy latents, a timestep and conditioning tokens -> the noise (or velocity) in them.

Paper: MiniGPT-5, section 3.2: epsilon_theta of Eq. 3. It stays frozen; the mapper's output takes the place of the text
encoding, and gradients flow through this conditioning. The published SD 2.1-base and 2.1 load into it. Left out:
SD 1's convolutional projections, class and size embeddings, control inputs.

    sample (B, 4, 64, 64), timesteps (B,), conditioning (B, 77, 1024)
    conv_in                         (B, 320, 64, 64)
    down_blocks, four levels        (B, 320, 32, 32) (B, 640, 16, 16) (B, 1280, 8, 8) (B, 1280, 8, 8)
    mid_block                       (B, 1280, 8, 8)
    up_blocks                       (B, 1280, 16, 16) (B, 1280, 32, 32) (B, 640, 64, 64) (B, 320, 64, 64)
    conv_out                        (B, 4, 64, 64)

B batch, C channels, h w latent size, T = h*w tokens of width D, S conditioning tokens of width Dc, H heads of width Dh.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class UNetConfig:
    sample_size: int = 64  # latent height and width that the model was trained at; 96 in the 768-pixel model
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    cross_attention_dim: int = 1024
    attention_head_dim: tuple[int, ...] = (5, 10, 20, 20)  # the NUMBER of heads of each level: a misnomer of the source
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0


def timestep_embedding(timesteps: Tensor, width: int, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """(B,) -> float32 (B, width): waves of geometrically falling frequency, cosines first if `flip_sin_to_cos`."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - freq_shift)
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * exponent)
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=-1)


class ResBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels_in: int, channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, channels_in, config.norm_eps)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], channels)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(time)[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class Attention(nn.Module):
    """Queries from x, keys and values from x itself or from the conditioning. Only the output projection has a bias."""

    attend = staticmethod(F.scaled_dot_product_attention)  # published/cpu.py replaces it for bfloat16 on a CPU

    def __init__(self, width: int, source_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(source_width, width, bias=False)
        self.to_v = nn.Linear(source_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, T or S, Dh)
        y = self.attend(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class GEGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, conditioning_width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, conditioning_width, heads)
        self.norm3 = nn.LayerNorm(width)
        net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))  # net.1 was a dropout
        self.ff = nn.Sequential(OrderedDict(net=net))

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), conditioning)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the h*w places of a feature map. The conditioning enters here and nowhere else."""

    def __init__(self, config: UNetConfig, channels: int, heads: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)  # whatever norm_eps is
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, config.cross_attention_dim, heads)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        B, C, h, w = x.shape
        y = self.norm(x).permute(0, 2, 3, 1).reshape(B, h * w, C)  # (B, T, C)
        y = self.proj_in(y)
        for block in self.transformer_blocks:
            y = block(y, conditioning)
        y = self.proj_out(y)
        return x + y.reshape(B, h, w, C).permute(0, 3, 1, 2)  # (B, C, h, w)


def downsampler(channels: int) -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


def upsampler(channels: int) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


class DownBlock(nn.Module):
    """One level on the way down, without attention if `heads` is 0. Returns x and the maps that the way up takes in."""

    def __init__(self, config: UNetConfig, channels_in: int, channels: int, heads: int, downsample: bool):
        super().__init__()
        widths = [channels_in] + [channels] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResBlock(config, width, channels) for width in widths)
        self.attentions = nn.ModuleList(SpatialTransformer(config, channels, heads) for _ in widths if heads)
        self.downsamplers = nn.ModuleList([downsampler(channels)] if downsample else [])

    def forward(self, x: Tensor, time: Tensor, conditioning: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, conditioning)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels: int, heads: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(config, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(config, channels, heads)])

    def forward(self, x: Tensor, time: Tensor, conditioning: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, conditioning)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level on the way up: every ResBlock also takes in one map of the way down."""

    def __init__(
        self, config: UNetConfig, channels_in: int, skip_channels: list[int], channels: int, heads: int, upsample: bool
    ):
        super().__init__()
        widths = [channels_in] + [channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            ResBlock(config, width + skip, channels) for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.attentions = nn.ModuleList(SpatialTransformer(config, channels, heads) for _ in widths if heads)
        self.upsamplers = nn.ModuleList([upsampler(channels)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, conditioning: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[i]], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, conditioning)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, levels, layers = config.block_out_channels, len(config.block_out_channels), config.layers_per_block
        heads, width = config.attention_head_dim, channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        linear_1, linear_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        self.time_embedding = nn.Sequential(OrderedDict(linear_1=linear_1, silu=nn.SiLU(), linear_2=linear_2))

        self.down_blocks = nn.ModuleList()
        skip_channels = [width]  # those of every map that the way up takes in again
        for level, kind in enumerate(config.down_block_types):
            level_heads = heads[level] if kind == "CrossAttnDownBlock2D" else 0
            downsample = level < levels - 1
            self.down_blocks.append(DownBlock(config, width, channels[level], level_heads, downsample))
            width = channels[level]
            skip_channels += [width] * (layers + downsample)
        self.mid_block = MidBlock(config, width, heads[-1])

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(reversed(range(levels)), config.up_block_types, strict=True):
            level_heads = heads[level] if kind == "CrossAttnUpBlock2D" else 0
            skips = [skip_channels.pop() for _ in range(layers + 1)]
            self.up_blocks.append(UpBlock(config, width, skips, channels[level], level_heads, upsample=level > 0))
            width = channels[level]

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        """sample (B, C, h, w) of scaled latents, timesteps (B,) or a scalar, conditioning (B, S, Dc) -> (B, C, h,
        w) in the weights' dtype: epsilon or v, as the schedule's prediction_type says. h and w are multiples of
        2^(levels - 1).
        """
        config, dtype = self.config, self.conv_in.weight.dtype
        sample, conditioning = sample.to(dtype), conditioning.to(dtype)
        _, C, h, w = sample.shape
        factor = 2 ** (len(self.down_blocks) - 1)
        assert (C, h % factor, w % factor) == (config.in_channels, 0, 0), tuple(sample.shape)

        time = timestep_embedding(  # in float32 always: half precision cannot tell large timesteps apart
            timesteps.reshape(-1), config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )
        time = F.silu(self.time_embedding(time.to(dtype)))  # (B or 1, 4 C0)

        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, maps = block(x, time, conditioning)
            skips += maps
        x = self.mid_block(x, time, conditioning)
        for block in self.up_blocks:
            maps = [skips.pop() for _ in block.resnets]
            x = block(x, maps, time, conditioning)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
