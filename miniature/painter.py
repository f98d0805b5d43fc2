"""Recipe of the miniature's UNet, which learns with the frozen text encoder and autoencoder in the weights folder.

noisy latents (B, 16, 8, 8), timesteps (B,), caption encodings (B, 32, 128) -> velocity (B, 16, 8, 8)
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import write_json
from common.images import draw_grid, to_image
from miniature.autoencoder import judge_in, latent_set
from miniature.facts import random_stream
from miniature.judge import shares
from miniature.reader import PHRASINGS, caption_set, ends_of, full_caption, tokenizer_at
from miniature.recipe import Recipe, Shop, normal, write_part
from miniature.sets import pictures
from miniature.world import sample_pair
from minigpt5 import send
from published.parts import load_text_encoder, load_vae
from scheduler import DPMSolver, NoiseSchedule, ScheduleConfig
from unet import UNet, UNetConfig

UNET_SIZES = UNetConfig(
    sample_size=8,
    in_channels=16,
    out_channels=16,
    block_out_channels=(64, 128),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    cross_attention_dim=128,
    attention_head_dim=(2, 4),
    norm_num_groups=16,
)
SCHEDULE = ScheduleConfig(prediction_type="v_prediction")
DROP_RATE = 0.1  # captions left empty, so that guidance has its unconditional branch
DECIDING = 400, 950  # timesteps where it is decided what goes where: half of a batch is from these
PROMPTS = 301  # purpose of the random streams


@torch.no_grad()
def paint(predict: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, noise: Tensor, steps: int) -> Tensor:
    """Noise (B, C, h, w) -> latents; predict(latents, t) is the guided prediction."""
    sampler, latents = DPMSolver(schedule, steps), noise
    for index, timestep in enumerate(sampler.timesteps):
        latents = sampler.step(predict(latents, timestep), index, latents)
    return latents


class DiffusionRecipe(Recipe):
    name, lr, matrix_lr, hold = "diffusion", 1e-3, 0.01, 1000

    def __init__(self, shop: Shop):
        self.modules = nn.ModuleDict({"unet": UNet(UNET_SIZES)})
        nn.init.zeros_(self.modules["unet"].conv_out.weight)
        self.batch_size = 1024 if shop.device.type == "cuda" else 64
        self.device, self.seed = shop.device, shop.seed
        self.schedule = NoiseSchedule(SCHEDULE).to(shop.device)
        folder = shop.weights / "stable-diffusion"
        self.text_encoder = load_text_encoder(folder / "text_encoder", torch.float32, shop.device)
        self.vae = load_vae(folder / "vae", torch.float32, shop.device)
        self.tokenizer, self.texts = tokenizer_at(folder / "tokenizer"), caption_set(shop, folder / "tokenizer")
        self.empty = self.tokenizer([""])[0].to(shop.device)
        self.latents = latent_set(shop, self.vae, pictures(shop.sets, shop.pictures, shop.seed, shop.workers))
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
        rows, phrasing, t = (torch.randint(top, (B,), generator=generator) for top in tops)
        half = B // 2
        t[:half] = torch.randint(*DECIDING, (half,), generator=generator)
        drop, unmasked = (torch.rand(B, generator=generator) < share for share in (DROP_RATE, 0.5))
        rows, phrasing, t, drop, unmasked = (send(x, self.device) for x in (rows, phrasing, t, drop, unmasked))
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
