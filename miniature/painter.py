"""Recipe of the miniature's UNet, which learns with the frozen text encoder and autoencoder in the weights folder.

noisy latents (B, 16, 8, 8), timesteps (B,), caption encodings (B, 32, 128) -> velocity (B, 16, 8, 8)
"""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import MINIATURE
from generation import Sampling, denoise
from miniature.autoencoder import latent_set
from miniature.facts import random_stream
from miniature.judge import load_judge, read, right_shares
from miniature.reader import PHRASINGS, caption_set, ends_of, full_caption, tokenizer_at
from miniature.recipe import Recipe, Setup, write_part, write_settings
from miniature.world import sample_pair
from minigpt5 import send
from published.parts import config_of, load_text_encoder, load_vae
from scheduler import NoiseSchedule, ScheduleConfig
from unet import UNet

UNET_SIZES = config_of("unet", MINIATURE / "stable-diffusion" / "unet" / "config.json")
SCHEDULE = ScheduleConfig(prediction_type="v_prediction")
DROP_RATE = 0.1  # captions left empty, so that guidance has its unconditional branch
DECIDING = 400, 950  # timesteps where it is decided what goes where: half of a batch is from these
PROMPTS = 301  # purpose of the random streams


class DiffusionRecipe(Recipe):
    name, batch_sizes, budgets = "diffusion", (1024, 64), (10, 600)
    lr, matrix_lr, hold = 1e-3, 0.01, 1000

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model = UNet(UNET_SIZES)
        nn.init.zeros_(self.model.conv_out.weight)
        self.schedule = NoiseSchedule(SCHEDULE, setup.device)
        folder = setup.weights / "stable-diffusion"
        self.text_encoder = load_text_encoder(folder / "text_encoder", torch.float32, setup.device)
        self.vae = load_vae(folder / "vae", torch.float32, setup.device)
        self.tokenizer, self.texts = tokenizer_at(folder / "tokenizer"), caption_set(setup, folder / "tokenizer")
        self.empty = self.tokenizer([""])[0].to(setup.device)
        self.latents = latent_set(setup, self.vae, setup.training_pictures())
        self.judge = load_judge(setup.weights / "judge.safetensors", setup.device)
        self.wanted = [sample_pair(setup.seed, i, "held-out", 1)[0] for i in range(min(64, setup.tested))]
        streams = (random_stream(setup.seed, i, PROMPTS) for i in range(len(self.wanted)))
        self.prompts = [full_caption(picture, rng) for picture, rng in zip(self.wanted, streams, strict=True)]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        B, shape = self.batch_size, (self.batch_size, *self.latents.shape[2:])
        tops = (len(self.latents), PHRASINGS, SCHEDULE.num_train_timesteps)
        picked, phrasing, t = (torch.randint(top, (B,), generator=generator) for top in tops)
        half = B // 2
        t[:half] = torch.randint(*DECIDING, (half,), generator=generator)
        drop, unmasked = (torch.rand(B, generator=generator) < share for share in (DROP_RATE, 0.5))
        picked, phrasing, t, drop, unmasked = (send(x, self.device) for x in (picked, phrasing, t, drop, unmasked))
        sampling, noise = (self.normal(shape, generator) for _ in range(2))
        mean, deviation = self.latents[picked].float().unbind(1)
        ids = torch.where(drop[:, None], self.empty, self.texts[picked, phrasing].long())
        # Stable Diffusion reads the padding, MiniGPT-5's caption loss masks it: the UNet should bear both.
        ends = ends_of(ids, self.empty[0, 1])
        mask = (torch.arange(ids.shape[1], device=self.device) <= ends[:, None]) | unmasked[:, None]
        with torch.no_grad():
            context = self.text_encoder(ids, mask)
        return mean + deviation * sampling, noise, t, context

    def losses(self, unet: UNet, latents: Tensor, noise: Tensor, t: Tensor, context: Tensor) -> dict[str, Tensor]:
        noisy, target = self.schedule.add_noise(latents, noise, t)
        # No min-SNR weights: they would all but take away the high noise, where it is decided what goes where.
        return {"loss": F.mse_loss(unet(noisy, t, context).float(), target)}

    def measure(self, unet: UNet) -> dict[str, float]:
        """Shares of one-thing prompts, with all facts named, drawn right, always from the same noise."""
        conditioning = self.text_encoder(self.tokenizer([""] * len(self.prompts) + self.prompts)[0].to(self.device))
        noise = torch.randn(len(self.prompts), 16, 8, 8, generator=torch.Generator().manual_seed(self.seed))
        sampling = Sampling(sampler="dpm", steps=16, guidance=3.0)
        latents = denoise(unet, self.schedule, noise.to(self.device), conditioning, sampling)
        found = right_shares(read(self.judge, self.vae.decode(latents)), self.wanted)
        return {f"{name}_right": value for name, value in found.items()}

    def export(self, unet: UNet, weights: Path) -> None:
        write_part(weights, "stable-diffusion/unet", "diffusion_pytorch_model", unet, asdict(UNET_SIZES))
        write_settings(weights, "stable-diffusion/scheduler/scheduler_config.json", asdict(SCHEDULE))
        write_settings(weights, "stable-diffusion/model_index.json", {})
