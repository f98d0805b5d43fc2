"""Stable Diffusion 2.1's autoencoder: pictures <-> latents an eighth of their size.

Paper: MiniGPT-5, section 3.2: the encoder makes the latents z of Eq. 3, the decoder makes a picture of what the UNet
has denoised. It stays frozen. The published AutoencoderKL of SD 2.1 loads into it. Left out: tiling, slicing,
autoencoders without quant_conv or with a latent shift.

    pixels (B, 3, 512, 512) in [-1, 1]
    encoder.down_blocks             (B, 128, 256, 256) (B, 256, 128, 128) (B, 512, 64, 64) (B, 512, 64, 64)
    quant_conv                      (B, 8, 64, 64): mean and log variance
    sample: scaled latents          (B, 4, 64, 64)
    decode                          (B, 3, 512, 512) about [-1, 1]

Latents are *scaled* (times scaling_factor, so that their variance is about 1) wherever the UNet or the noise schedule
sees them: `sample` returns and `decode` takes scaled latents. `encode` returns the posterior of unscaled ones.
B batch, C channels, h w latent height and width, T = h*w tokens.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every group norm; no published config names it


@dataclass(frozen=True)
class VAEConfig:
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # of the encoder; the decoder has one more
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # brings the latents' variance to about 1; early files leave it out

    @property
    def downsampling(self) -> int:
        """Pixels to a latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) -> float32 in [-1, 1], the range that the autoencoder was trained on. (The released code
    precomputed its latents from pixels in [0, 1].)"""
    return pictures.float().div_(255).mul_(2).sub_(1)


class ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, EPS)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, EPS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class Attention(nn.Module):
    """Self-attention over all places of a feature map, one head as wide as the map has channels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        y = self.group_norm(x).permute(0, 2, 3, 1).reshape(B, 1, h * w, C)  # (B, 1, T, C)
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        y = self.to_out(y)
        return x + y.reshape(B, h, w, C).permute(0, 3, 1, 2)  # (B, C, h, w)


def downsampler(channels: int) -> nn.Module:
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # right and bottom only, unlike the UNet
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(channels, channels, 3, stride=2)))


def upsampler(channels: int) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


def levels(channels: tuple[int, ...], layers: int, groups: int, name: str, resampler: Callable) -> nn.Sequential:
    """For each width in `channels`: `layers` residual blocks and, after all widths but the last, a resampler, which the
    published files call `name`."""
    blocks = []
    for i, (width_in, width) in enumerate(pairwise(channels[:1] + channels), 1):
        resnets = [ResBlock(width if layer else width_in, width, groups) for layer in range(layers)]
        resamplers = [resampler(width)] if i < len(channels) else []
        parts = {"resnets": nn.Sequential(*resnets), name: nn.Sequential(*resamplers)}
        blocks.append(nn.Sequential(OrderedDict(parts)))
    return nn.Sequential(*blocks)


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, layers, groups = config.block_out_channels, config.layers_per_block, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = levels(channels, layers, groups, "downsamplers", downsampler)
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, layers, groups = config.block_out_channels[::-1], config.layers_per_block + 1, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = levels(channels, layers, groups, "upsamplers", upsampler)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_blocks(self.mid_block(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, 8h, 8w), bytes or of any float dtype in [-1, 1] -> mean and log variance of the unscaled
        latents, each (B, C, h, w) in the weights' dtype."""
        factor = self.config.downsampling
        assert pixels.shape[-2] % factor == 0 and pixels.shape[-1] % factor == 0, tuple(pixels.shape)
        pixels = to_pixels(pixels) if pixels.dtype == torch.uint8 else pixels
        mean, logvar = self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight.dtype))).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """Unscaled posterior and standard normal noise, each (B, C, h, w) -> scaled latents (B, C, h, w)."""
        return (mean + torch.exp(0.5 * logvar) * noise) * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) of any dtype -> pixels (B, 3, 8h, 8w) in the weights' dtype, about [-1, 1] and
        not clamped."""
        assert latents.shape[1] == self.config.latent_channels, tuple(latents.shape)
        latents = latents.float() / self.config.scaling_factor
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))
