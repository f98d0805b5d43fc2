"""Recipes of the miniature's "Stable Diffusion": the autoencoder; then the UNet, between it and the text encoder.

    vae          pixels (B, 3, 64, 64) <-> latents (B, 16, 8, 8)
    diffusion    noisy latents, timesteps (B,), caption encodings (B, 32, 128) -> velocity (B, 16, 8, 8)

The UNet learns with the frozen text encoder and autoencoder in the weights folder. The latents are made once from that
autoencoder: a better one brings new ones.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images import draw_grid, to_image
from miniature.backdrop import VARIANTS
from miniature.facts import SCENES, TIMES, Picture
from miniature.judge import Judge, load_judge, shares
from miniature.reader import PHRASINGS, caption_sets, ends_of, full_caption, tokenizer_at
from miniature.recipe import Recipe, Shop, normal, write_json, write_part
from miniature.sets import cached, pictures, rows_of, to_pixels
from miniature.world import draw, random_stream, sample_pair
from scheduler import DPMSolver, NoiseSchedule, ScheduleConfig
from text_encoder import load_text_encoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig, load_vae

VAE_SIZES = VAEConfig(
    block_out_channels=(16, 32, 64, 96), layers_per_block=1, latent_channels=16, norm_num_groups=8, scaling_factor=1.0
)
UNET_SIZES = UNetConfig(
    sample_size=8,
    in_channels=16,
    out_channels=16,
    block_out_channels=(96, 128),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    cross_attention_dim=128,
    attention_head_dim=(3, 4),
    norm_num_groups=16,
)
SCHEDULE = ScheduleConfig(prediction_type="v_prediction")
KL_WEIGHT = 1e-5  # keeps the latents within bounds, no more
THING_WEIGHT = (
    4.0  # a pixel of a thing counts one and this: there are few of them, and they are what a picture is about
)
DROP_RATE = 0.1  # captions left empty, so that guidance has its unconditional branch
PROMPTS = 301  # purpose of the random streams


# ---- autoencoder


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels: the outlines, which a plain distance lets blur."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def decibels(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures in [-1, 1], (B, 3, h, w) twice -> (B,)."""
    return -10 * ((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3)).log10()


BACKDROPS = list(product(SCENES, TIMES, range(VARIANTS)))


def backdrop_row(seed: int, i: int) -> np.ndarray:
    """Which of BACKDROPS is behind the things of picture i."""
    picture, _, jitter = sample_pair(seed, i)
    return np.array(BACKDROPS.index((picture.scene, picture.time, jitter % VARIANTS)), np.int16)


def judge_in(weights: Path, device: torch.device) -> Judge | None:
    """The judge, if it is trained already."""
    path = weights / "judge.safetensors"
    return load_judge(path, device) if path.exists() else None


class AutoencoderRecipe(Recipe):
    """L1 on pixels, those of things above all, and on their differences, and a touch of KL. Latents are unscaled until
    the export."""

    name, lr, matrix_lr, hold = "vae", 1e-3, 0.02, 2000

    def __init__(self, shop: Shop):
        self.modules = nn.ModuleDict({"vae": VAE(VAE_SIZES)})
        self.batch_size = 512 if shop.device.type == "cuda" else 8
        self.device = shop.device
        self.pictures = pictures(shop.sets, shop.pictures, shop.seed, shop.workers).to(shop.device)
        path = shop.sets / f"backdrops-{shop.seed}-{shop.pictures}.npy"
        self.behind = cached(path, shop.pictures, rows_of(partial(backdrop_row, shop.seed)), shop.workers)
        empty = [np.asarray(draw(Picture(scene, time, ()), variant)) for scene, time, variant in BACKDROPS]
        self.backdrops = torch.from_numpy(np.stack(empty)).to(shop.device)
        self.tested = to_pixels(pictures(shop.sets, shop.tested, shop.seed, 1, "held-out").to(shop.device))
        self.wanted = [sample_pair(shop.seed, i, "held-out")[0] for i in range(shop.tested)]
        self.judge = judge_in(shop.weights, shop.device)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(self.pictures), (self.batch_size,), generator=generator)
        noise = normal((self.batch_size, VAE_SIZES.latent_channels, 8, 8), generator, self.device)
        drawn, behind = self.pictures[rows.to(self.device)], self.backdrops[self.behind[rows].long().to(self.device)]
        weight = 1 + THING_WEIGHT * (drawn != behind).any(-1)[:, None]  # (B, 1, 64, 64)
        return to_pixels(drawn), weight / weight.mean(), noise

    def losses(self, modules: nn.ModuleDict, pixels: Tensor, weight: Tensor, noise: Tensor) -> dict[str, Tensor]:
        vae = modules["vae"]
        mean, logvar = vae.encode(pixels)
        drawn = vae.decode(vae.sample(mean, logvar, noise))
        error = drawn - pixels
        pixel_loss = (weight * error.abs()).mean()
        edge_loss = sum((weight[..., : e.shape[2], : e.shape[3]] * e.abs()).mean() for e in edges(error))
        kl_loss = 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()
        loss = pixel_loss + edge_loss + KL_WEIGHT * kl_loss
        return {"loss": loss, "pixel_loss": pixel_loss, "edge_loss": edge_loss, "kl_loss": kl_loss}

    def round_trip(self, modules: nn.ModuleDict, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures -> their latent means and what is drawn from them."""
        means = [modules["vae"].encode(part)[0] for part in pixels.split(32)]
        return torch.cat(means), torch.cat([modules["vae"].decode(mean) for mean in means])

    def measure(self, modules: nn.ModuleDict) -> dict[str, float]:
        """ "right": drawn again so that the judge still reads every fact."""
        means, drawn = self.round_trip(modules, self.tested)
        figures = {"psnr": decibels(drawn, self.tested).mean().item(), "latent_deviation": means.std().item()}
        return figures | ({"right": shares(self.judge, drawn, self.wanted)["all"]} if self.judge else {})

    def sheet(self, modules: nn.ModuleDict, path: Path) -> None:
        shown = self.tested[:10]
        drawn = self.round_trip(modules, shown)[1]
        columns = zip(shown, drawn, decibels(drawn, shown), strict=True)
        draw_grid([(f"{dB:.1f} dB", [to_image(a), to_image(b)]) for a, b, dB in columns], path.with_suffix(".png"))

    def export(self, modules: nn.ModuleDict, weights: Path) -> None:
        means, _ = self.round_trip(modules, self.tested)
        config = replace(VAE_SIZES, scaling_factor=round(1 / means.std().item(), 5))
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


# ---- diffusion


def latent_block(vae: VAE, drawn: Tensor, rows: range) -> np.ndarray:
    """float16 (rows, 2, C, h, w): mean and deviation of the scaled latents."""
    with torch.no_grad():
        encoded = [vae.encode(to_pixels(part)) for part in drawn[rows.start : rows.stop].split(64)]
        mean, logvar = map(torch.cat, zip(*encoded, strict=True))
        both = torch.stack([mean, torch.exp(0.5 * logvar)], 1) * vae.config.scaling_factor
    return both.half().cpu().numpy()


@torch.no_grad()
def paint(predict: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, noise: Tensor, steps: int) -> Tensor:
    """Noise (B, C, h, w) -> latents; predict(latents, t) is the guided prediction."""
    sampler, latents = DPMSolver(schedule, steps), noise
    for index, timestep in enumerate(sampler.timesteps):
        latents = sampler.step(predict(latents, timestep), index, latents)
    return latents


class DiffusionRecipe(Recipe):
    name, lr, matrix_lr, hold = "diffusion", 1e-3, 0.01, 5000

    def __init__(self, shop: Shop):
        self.modules = nn.ModuleDict({"unet": UNet(UNET_SIZES)})
        nn.init.zeros_(self.modules["unet"].conv_out.weight)
        self.batch_size = 1024 if shop.device.type == "cuda" else 64
        self.device, self.seed = shop.device, shop.seed
        self.schedule = NoiseSchedule(SCHEDULE).to(shop.device)
        folder = shop.weights / "stable-diffusion"
        self.text_encoder = load_text_encoder(folder / "text_encoder", torch.float32, shop.device)
        self.vae = load_vae(folder / "vae", torch.float32, shop.device)
        tokenizer_folder, self.texts, _ = caption_sets(shop)
        self.tokenizer = tokenizer_at(tokenizer_folder)
        self.empty = self.tokenizer([""])[0].to(shop.device)
        version = hashlib.sha256((folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:8]
        drawn = pictures(shop.sets, shop.pictures, shop.seed, shop.workers).to(shop.device)
        path = shop.sets / f"latents-{version}-{shop.seed}-{shop.pictures}.npy"
        self.latents = cached(path, shop.pictures, partial(latent_block, self.vae, drawn), 1).to(shop.device)
        self.judge = judge_in(shop.weights, shop.device)
        self.prompts, self.wanted = [], []
        for i in range(min(64, shop.tested)):
            rng = random_stream(shop.seed, i, PROMPTS)
            picture = sample_pair(shop.seed, i, "held-out", 1)[0]
            self.prompts.append(full_caption(picture, rng))
            self.wanted.append(picture)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        B, shape = self.batch_size, (self.batch_size, *self.latents.shape[2:])
        tops = (len(self.latents), PHRASINGS, SCHEDULE.num_train_timesteps)
        rows, phrasing, t = (torch.randint(top, (B,), generator=generator).to(self.device) for top in tops)
        drop, unmasked = (torch.rand(B, generator=generator).to(self.device) < share for share in (DROP_RATE, 0.5))
        sampling, noise = (normal(shape, generator, self.device) for _ in range(2))
        mean, deviation = self.latents[rows].float().unbind(1)
        ids = torch.where(drop[:, None], self.empty, self.texts[rows, phrasing].long())
        # Stable Diffusion reads the padding, MiniGPT-5's caption loss masks it: the UNet should bear both.
        ends = ends_of(ids, self.empty[0, 1])
        mask = (torch.arange(ids.shape[1], device=self.device) <= ends[:, None]) | unmasked[:, None]
        with torch.no_grad():
            context = self.text_encoder(ids, mask)
        return mean + deviation * sampling, noise, t, context

    def losses(
        self, modules: nn.ModuleDict, latents: Tensor, noise: Tensor, t: Tensor, context: Tensor
    ) -> dict[str, Tensor]:
        noisy, target = self.schedule.add_noise(latents, noise, t), self.schedule.target(latents, noise, t)
        # No min-SNR weights: they would all but take away the high noise, where it is decided what goes where.
        return {"loss": F.mse_loss(modules["unet"](noisy, t, context).float(), target)}

    def painted(self, modules: nn.ModuleDict, prompts: list[str], guidance: float = 3.0, steps: int = 16) -> Tensor:
        """Prompts -> pixels (B, 3, 64, 64), always from the same noise."""
        ids = torch.cat([self.empty.expand(len(prompts), -1), self.tokenizer(prompts)[0].to(self.device)])
        context = self.text_encoder(ids)

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            without, given = modules["unet"](torch.cat([latents, latents]), timestep, context).chunk(2)
            return without + guidance * (given - without)

        noise = torch.randn(len(prompts), 16, 8, 8, generator=torch.Generator().manual_seed(self.seed))
        return self.vae.decode(paint(predict, self.schedule, noise.to(self.device), steps))

    def measure(self, modules: nn.ModuleDict) -> dict[str, float]:
        """Shares of one-thing prompts, with all facts named, drawn right."""
        if self.judge is None:
            return {}
        found = shares(self.judge, self.painted(modules, self.prompts), self.wanted)
        return {f"{name}_right": share for name, share in found.items()}

    def sheet(self, modules: nn.ModuleDict, path: Path) -> None:
        pixels = self.painted(modules, self.prompts[:10])
        draw_grid(
            [(text, [to_image(p)]) for text, p in zip(self.prompts, pixels, strict=False)], path.with_suffix(".png")
        )

    def export(self, modules: nn.ModuleDict, weights: Path) -> None:
        folder = weights / "stable-diffusion"
        unet = {"_class_name": "UNet2DConditionModel", "use_linear_projection": True, "act_fn": "silu"}
        write_part(folder / "unet", "diffusion_pytorch_model", modules["unet"], unet | asdict(UNET_SIZES))
        write_json(
            folder / "scheduler" / "scheduler_config.json",
            {"_class_name": "PNDMScheduler", "trained_betas": None, "clip_sample": False} | asdict(SCHEDULE),
        )
        write_json(
            folder / "model_index.json",
            {
                "_class_name": "StableDiffusionPipeline",
                "feature_extractor": [None, None],
                "safety_checker": [None, None],
                "requires_safety_checker": False,
                "scheduler": ["diffusers", "PNDMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            },
        )
