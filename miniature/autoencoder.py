"""Recipe of the miniature's autoencoder, and its latents as a training set.

pixels (B, 3, 64, 64) <-> latents (B, 16, 8, 8)
"""

import hashlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.cli import MINIATURE
from miniature.judge import load_judge, read, right_shares
from miniature.paint import draw
from miniature.recipe import Recipe, Setup, cached, to_pixels, write_part
from miniature.world import sample_pair
from published.parts import config_of
from vae import VAE

VAE_SIZES = replace(config_of("vae", MINIATURE / "stable-diffusion" / "vae" / "config.json"), scaling_factor=1.0)
KL_WEIGHT = 1e-5  # keeps the latents within bounds, no more
THING_WEIGHT = 4.0  # a thing's pixel counts one and this: there are few, and they are what a picture is about


def thing_pixels(seed: int, i: int) -> np.ndarray:
    """Which pixels of picture i are not its background's: bool (64, 64)."""
    picture, _, jitter = sample_pair(seed, i)
    return np.not_equal(draw(picture, jitter), draw(replace(picture, things=()), jitter)).any(-1)


class AutoencoderRecipe(Recipe):
    """L1 on pixels, those of things above all, and on their differences, and a touch of KL. Latents are unscaled until
    the export."""

    name, batch_sizes, budgets = "vae", (512, 8), (4, 200)
    lr, matrix_lr, hold = 1e-3, 0.02, 200

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model = VAE(VAE_SIZES)
        self.pictures = setup.training_pictures()
        self.things = setup.training_set("things", partial(thing_pixels, setup.seed))
        drawn, self.wanted = setup.held_out_pictures()
        self.tested = to_pixels(drawn)
        self.judge = load_judge(setup.weights / "judge.safetensors", setup.device)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Pixels, how much each of them counts, and the posterior's noise."""
        picked = self.pick(len(self.pictures), generator)
        noise = self.normal((self.batch_size, VAE_SIZES.latent_channels, 8, 8), generator)
        weight = 1 + THING_WEIGHT * self.things[picked][:, None]  # (B, 1, 64, 64)
        return to_pixels(self.pictures[picked]), weight / weight.mean(), noise

    def losses(self, vae: VAE, pixels: Tensor, weight: Tensor, noise: Tensor) -> dict[str, Tensor]:
        mean, logvar = vae.encode(pixels)
        losses = self.drawing_losses(vae.decode(vae.sample(mean, logvar, noise)) - pixels, weight)
        losses["kl_loss"] = 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()
        return losses | {"loss": losses["loss"] + KL_WEIGHT * losses["kl_loss"]}

    def drawing_losses(self, error: Tensor, weight: Tensor) -> dict[str, Tensor]:
        pixel_loss = (weight * error.abs()).mean()
        edges = error.diff(dim=2), error.diff(dim=3)  # a plain distance lets outlines blur
        edge_loss = sum((weight[..., : e.shape[2], : e.shape[3]] * e.abs()).mean() for e in edges)
        return {"loss": pixel_loss + edge_loss, "pixel_loss": pixel_loss, "edge_loss": edge_loss}

    def round_trip(self, vae: VAE, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures -> their latent means and what is drawn from them."""
        means = [vae.encode(part)[0] for part in pixels.split(32)]
        return torch.cat(means), torch.cat([vae.decode(mean) for mean in means])

    def measure(self, vae: VAE) -> dict[str, float]:
        """ "right": drawn again so that the judge still reads every fact."""
        means, drawn = self.round_trip(vae, self.tested)
        right = right_shares(read(self.judge, drawn), self.wanted)["all"]
        errors = ((drawn.clamp(-1, 1) - self.tested) / 2).square().mean((1, 2, 3))  # (B,), the largest would be 1
        psnr = -10 * errors.log10().mean().item()
        return {"psnr": psnr, "latent_deviation": means.std().item(), "right": right}

    def export(self, vae: VAE, weights: Path) -> None:
        means, _ = self.round_trip(vae, self.tested)
        config = replace(vae.config, scaling_factor=round(1 / means.std().item(), 5))
        write_part(weights, "stable-diffusion/vae", "diffusion_pytorch_model", vae, asdict(config))


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
