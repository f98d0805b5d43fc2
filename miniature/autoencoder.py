"""Recipes of the miniature's autoencoder, and its latents as a training set.

    vae          pixels (B, 3, 64, 64) <-> latents (B, 16, 8, 8)
    decoder      latents (B, 16, 8, 8) -> pixels, the encoder as it is

The UNet learns on the latents of one encoder. The decoder can be trained further alone and still fits them, as Stable
Diffusion's later decoders were.
"""

import hashlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from miniature.judge import Judge, load_judge, read, right_shares
from miniature.paint import draw
from miniature.recipe import Recipe, Setup, normal, write_part
from miniature.sets import cached, held_out_pictures, to_pixels, training_pictures, training_set
from miniature.world import sample_pair
from published.parts import load_vae
from vae import VAE, VAEConfig

VAE_SIZES = VAEConfig(
    block_out_channels=(16, 32, 64, 96), layers_per_block=1, latent_channels=16, norm_num_groups=8, scaling_factor=1.0
)
KL_WEIGHT = 1e-5  # keeps the latents within bounds, no more
THING_WEIGHT = 4.0  # a thing's pixel counts one and this: there are few, and they are what a picture is about


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels: the outlines, which a plain distance lets blur."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def drawing_losses(error: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Errors of pixels (B, 3, h, w) and how much each pixel counts (B, 1, h, w) -> the mean, that of edges, the sum."""
    pixel_loss = (weight * error.abs()).mean()
    edge_loss = sum((weight[..., : e.shape[2], : e.shape[3]] * e.abs()).mean() for e in edges(error))
    return {"loss": pixel_loss + edge_loss, "pixel_loss": pixel_loss, "edge_loss": edge_loss}


def decibels(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures in [-1, 1], (B, 3, h, w) twice -> (B,)."""
    return -10 * ((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3)).log10()


def thing_pixels(seed: int, i: int) -> np.ndarray:
    """Which pixels of picture i are not its background's: bool (64, 64)."""
    picture, _, jitter = sample_pair(seed, i)
    return np.not_equal(draw(picture, jitter), draw(replace(picture, things=()), jitter)).any(-1)


def judge_in(weights: Path, device: torch.device) -> Judge | None:
    """The judge, if it is trained already."""
    path = weights / "judge.safetensors"
    return load_judge(path, device) if path.exists() else None


class AutoencoderRecipe(Recipe):
    """L1 on pixels, those of things above all, and on their differences, and a touch of KL. Latents are unscaled until
    the export."""

    name, batch_sizes, lr, matrix_lr, hold = "vae", (512, 8), 1e-3, 0.02, 200

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.modules = nn.ModuleDict({"vae": VAE(VAE_SIZES)})
        self.pictures = training_pictures(setup)
        self.things = training_set(setup, "things", partial(thing_pixels, setup.seed))
        drawn, self.wanted = held_out_pictures(setup)
        self.tested = to_pixels(drawn)
        self.judge = judge_in(setup.weights, setup.device)

    def weighted(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures of the training set and how much each of their pixels counts."""
        weight = 1 + THING_WEIGHT * self.things[picked][:, None]  # (B, 1, 64, 64)
        return to_pixels(self.pictures[picked]), weight / weight.mean()

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        picked = self.pick(len(self.pictures), generator)
        noise = normal((self.batch_size, VAE_SIZES.latent_channels, 8, 8), generator, self.device)
        return *self.weighted(picked), noise

    def losses(self, modules: nn.ModuleDict, pixels: Tensor, weight: Tensor, noise: Tensor) -> dict[str, Tensor]:
        vae = modules["vae"]
        mean, logvar = vae.encode(pixels)
        losses = drawing_losses(vae.decode(vae.sample(mean, logvar, noise)) - pixels, weight)
        kl_loss = 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()
        return losses | {"loss": losses["loss"] + KL_WEIGHT * kl_loss, "kl_loss": kl_loss}

    def round_trip(self, modules: nn.ModuleDict, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures -> their latent means and what is drawn from them."""
        vae = modules["vae"]
        means = [vae.encode(part)[0] for part in pixels.split(32)]
        return torch.cat(means), torch.cat([vae.decode(mean * vae.config.scaling_factor) for mean in means])

    def measure(self, modules: nn.ModuleDict) -> dict[str, float]:
        """ "right": drawn again so that the judge still reads every fact."""
        means, drawn = self.round_trip(modules, self.tested)
        figures = {"psnr": decibels(drawn, self.tested).mean().item(), "latent_deviation": means.std().item()}
        return figures | ({"right": right_shares(read(self.judge, drawn), self.wanted)["all"]} if self.judge else {})

    def export(self, modules: nn.ModuleDict, weights: Path) -> None:
        config = modules["vae"].config
        if config.scaling_factor == 1.0:
            means, _ = self.round_trip(modules, self.tested)
            config = replace(config, scaling_factor=round(1 / means.std().item(), 5))
        levels = len(config.block_out_channels)
        published = {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "sample_size": 64,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
        folder = weights / "stable-diffusion" / "vae"
        write_part(folder, "diffusion_pytorch_model", modules["vae"], published | asdict(config))


# ---- latents as a training set


def latent_block(vae: VAE, drawn: Tensor, entries: range) -> np.ndarray:
    """float16 (n, 2, C, h, w): mean and deviation of the scaled latents."""
    device = next(vae.parameters()).device
    with torch.no_grad():
        encoded = [vae.encode(to_pixels(part.to(device))) for part in drawn[entries.start : entries.stop].split(64)]
        mean, logvar = map(torch.cat, zip(*encoded, strict=True))
        both = torch.stack([mean, torch.exp(0.5 * logvar)], 1) * vae.config.scaling_factor
    return both.half().cpu().numpy()


def latent_set(setup: Setup, vae: VAE, drawn: Tensor) -> Tensor:
    """Mean and deviation of the scaled latents of the training pictures (n, 2, C, h, w), made once for an encoder."""
    frozen = {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    version = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in frozen.values())).hexdigest()[:8]
    path = setup.sets / f"latents-{version}-{setup.seed}-{setup.pictures}.npy"
    return cached(path, setup.pictures, partial(latent_block, vae, drawn), 1).to(setup.device)


class DecoderRecipe(AutoencoderRecipe):
    """The decoder alone, from the weights folder on."""

    name, lr, matrix_lr, hold = "decoder", 3e-4, 0.005, 500

    def __init__(self, setup: Setup):
        super().__init__(setup)
        vae = load_vae(setup.weights / "stable-diffusion" / "vae", torch.float32, setup.device)
        for part in (vae.decoder, vae.post_quant_conv):
            part.requires_grad_(True)
        self.modules = nn.ModuleDict({"vae": vae})
        self.latents = latent_set(setup, vae, self.pictures)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        picked = self.pick(len(self.pictures), generator)
        mean, deviation = self.latents[picked].float().unbind(1)
        return *self.weighted(picked), mean + deviation * normal(mean.shape, generator, self.device)

    def losses(self, modules: nn.ModuleDict, pixels: Tensor, weight: Tensor, latents: Tensor) -> dict[str, Tensor]:
        return drawing_losses(modules["vae"].decode(latents) - pixels, weight)
