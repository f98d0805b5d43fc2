"""Recipes of the miniature's Stable Diffusion: its autoencoder, its text encoder, and the UNet that both serve.

    vae          pixels (B, 3, 64, 64) <-> latents (B, 16, 8, 8)
    text         caption ids (B, 32) -> encoding (B, 32, 128); from its last token the facts that the judge sees
    diffusion    noisy latents (B, 16, 8, 8), timesteps (B,), caption encodings (B, 32, 128) -> velocity (B, 16, 8, 8)

Stable Diffusion's text encoder is CLIP's, trained beside pictures before any UNet saw it. Trained with the UNet alone,
the miniature's dropped "left" and "right": what a place means shows only once the UNet uses it, and the UNet cannot
use it before the encoding tells it. So the text encoder first learns to read the facts off captions, and is
frozen from then on. Its tokenizer is the shipped one.
"""

from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import MINIATURE
from common.files import fingerprint, write_file
from experiments.recipes.judge import IGNORE, labels, labels_of, reading_losses
from experiments.recipes.recipe import Recipe, Setup, cached, reset, to_pixels, write_part, write_settings
from generation import Sampling, denoise
from miniature.facts import Picture, random_stream
from miniature.judge import SLOT_SIZES, SLOTS, WHOLE_SIZES, load_judge, read, right_shares
from miniature.paint import draw
from miniature.words import caption, facts_in
from miniature.world import sample_pair
from minigpt5 import send
from published.clip_tokenizer import ClipTokenizer
from published.parts import config_of, load_text_encoder, load_vae
from scheduler import NoiseSchedule, ScheduleConfig
from text_encoder import TextEncoder
from unet import UNet
from vae import VAE

SD = MINIATURE / "stable-diffusion"
VAE_SIZES = replace(config_of("vae", SD / "vae" / "config.json"), scaling_factor=1.0)
TEXT_SIZES = config_of("text encoder", SD / "text_encoder" / "config.json")
UNET_SIZES = config_of("unet", SD / "unet" / "config.json")
SCHEDULE = ScheduleConfig(prediction_type="v_prediction")

# ---- autoencoder

KL_WEIGHT = 1e-5  # keeps the latents within bounds, no more
THING_WEIGHT = 4.0  # a thing's pixel counts 1 + this: there are few, and they are what a picture is about


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


def latent_block(vae: VAE, drawn: Tensor, entries: range) -> np.ndarray:
    """float16 (n, 2, C, h, w): mean and deviation of the scaled latents of these training pictures."""
    device = next(vae.parameters()).device
    with torch.no_grad():
        encoded = [vae.encode(to_pixels(part.to(device))) for part in drawn[entries.start : entries.stop].split(64)]
        mean, logvar = map(torch.cat, zip(*encoded, strict=True))
        both = torch.stack([mean, torch.exp(0.5 * logvar)], 1) * vae.config.scaling_factor
    return both.half().cpu().numpy()


# ---- text encoder

PHRASINGS = 4  # captions of a picture
CAPTIONS, READ = 300, 302  # purposes of the random streams


def full_caption(picture: Picture, rng: np.random.Generator) -> str:
    """A caption that names every size and place."""
    while True:
        text = caption(picture, rng)
        if all(thing.size and thing.place for thing in facts_in(text).things):
            return text


tokenizer_at = lru_cache(ClipTokenizer)  # of a folder


def caption_ids(folder: Path, seed: int, i: int) -> np.ndarray:
    """int16 (PHRASINGS, S): the ids of several captions of picture i, the first of which names every size and place."""
    picture, rng = sample_pair(seed, i)[0], random_stream(seed, i, CAPTIONS)
    texts = [(caption if k else full_caption)(picture, rng) for k in range(PHRASINGS)]
    return tokenizer_at(folder)(texts)[0].numpy().astype(np.int16)


class Reader(nn.Module):
    """Caption ids (B, S) -> scores as the judge's, read off the encoding at the caption's end (B, D), whose id is the
    largest of all, as CLIP's."""

    def __init__(self):
        super().__init__()
        self.text_encoder = TextEncoder(TEXT_SIZES)
        self.slots = nn.Linear(TEXT_SIZES.hidden_size, len(SLOTS) * sum(SLOT_SIZES))
        self.whole = nn.Linear(TEXT_SIZES.hidden_size, sum(WHOLE_SIZES))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.text_encoder(ids)[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]  # (B, D)
        return self.slots(x).unflatten(-1, (len(SLOTS), -1)), self.whole(x)


def caption_set(setup: Setup, folder: Path) -> Tensor:
    """Several captions of every training picture as ids (n, PHRASINGS, S), made once for the tokenizer in `folder`."""
    version = fingerprint([folder / "merges.txt"])
    return setup.training_set(f"captions-{version}", partial(caption_ids, folder, setup.seed))


class TextRecipe(Recipe):
    name, batch_sizes, budgets = "text", (1024, 64), (1, 15)
    lr, matrix_lr, hold = 2e-3, 0.02, 200

    def __init__(self, setup: Setup):
        super().__init__(setup)
        tokenizer, self.texts = tokenizer_at(SD / "tokenizer"), caption_set(setup, SD / "tokenizer")
        self.labels = setup.training_set("labels", partial(labels_of, partial(sample_pair, setup.seed)))
        self.model = Reader()
        reset(self.model)
        tested = [sample_pair(setup.seed, i, "held-out")[0] for i in range(setup.tested)]
        texts = [full_caption(picture, random_stream(setup.seed, i, READ)) for i, picture in enumerate(tested)]
        self.tested = tokenizer(texts)[0].to(setup.device)
        self.wanted = torch.from_numpy(np.stack([labels(picture) for picture in tested]))

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        picked, phrasing = (self.pick(length, generator) for length in (len(self.texts), PHRASINGS))
        return self.texts[picked, phrasing].long(), self.labels[picked].long()

    def losses(self, reader: Reader, ids: Tensor, known: Tensor) -> dict[str, Tensor]:
        return reading_losses(*reader(ids), known)

    def measure(self, reader: Reader) -> dict[str, float]:
        """The share of held-out captions, with all facts named, of which every fact is read rightly."""
        slots, whole = reader(self.tested)
        slots = torch.stack([s.argmax(-1) for s in slots.split(SLOT_SIZES, -1)], -1).flatten(1)
        whole = torch.stack([s.argmax(-1) for s in whole.split(WHOLE_SIZES, -1)], -1)
        right = (torch.cat([slots, whole], -1).cpu() == self.wanted) | (self.wanted == IGNORE)  # (n, 21)
        return {"read": right.all(-1).float().mean().item()}

    def export(self, reader: Reader, weights: Path) -> None:
        write_part(weights, "stable-diffusion/text_encoder", "model", reader.text_encoder, asdict(TEXT_SIZES))
        for file in (SD / "tokenizer").iterdir():
            write_file(weights / "stable-diffusion" / "tokenizer" / file.name, file.read_bytes())


# ---- UNet

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
        version = fingerprint([folder / "vae" / "diffusion_pytorch_model.safetensors"])
        path = setup.sets / f"latents-{version}-{setup.seed}-{setup.pictures}.npy"
        make = partial(latent_block, self.vae, setup.training_pictures())
        self.latents = cached(path, setup.pictures, make, 1).to(setup.device)
        self.judge = load_judge(setup.weights / "judge.safetensors", setup.device)
        self.wanted = [sample_pair(setup.seed, i, "held-out", 1)[0] for i in range(min(64, setup.tested))]
        self.prompts = [full_caption(p, random_stream(setup.seed, i, PROMPTS)) for i, p in enumerate(self.wanted)]

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
        ends = ids.argmax(-1, keepdim=True)
        mask = (torch.arange(ids.shape[1], device=self.device) <= ends) | unmasked[:, None]
        with torch.no_grad():
            conditioning = self.text_encoder(ids, mask)
        return mean + deviation * sampling, noise, t, conditioning

    def losses(self, unet: UNet, latents: Tensor, noise: Tensor, t: Tensor, conditioning: Tensor) -> dict[str, Tensor]:
        noisy, target = self.schedule.add_noise(latents, noise, t)
        # No min-SNR weights: they would all but take away the high noise, where it is decided what goes where.
        return {"loss": F.mse_loss(unet(noisy, t, conditioning).float(), target)}

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
