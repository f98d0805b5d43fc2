"""The pairing: pictures and texts of the miniature world in one space, as CLIP has them for photographs.

Two small networks learn by CLIP's loss (Radford et al. 2021), with the other pictures and texts of the batch as what
does not go together. Half of the pairs are captions, half are steps of stories and turns of dialogues, of which many
("it drifts to the right.") tell little of their picture. It measures what MiniGPT-5 makes and trains no part of it.
Unlike the judge it is told no facts, and it has no idea of what it was never shown: nonsense gets a cosine too.

    pixels -> features (B, 128, 8, 8) -> learned views of the places (B, K * 128) -> (B, 128)
    words, by hash -> ids (B, T) -> small text transformer, its state at the end (B, 128) -> (B, 128)
"""

import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.metrics import words
from miniature.facts import Picture, pick, random_stream
from miniature.judge import WIDTH, convolutions
from miniature.recipe import Recipe, Setup, drawn, reset, to_pixels, write_tensors
from miniature.world import sample_dialogue, sample_pair, sample_story
from text_encoder import TextConfig, TextEncoder

VIEWS, LENGTH = 12, 40  # learned views of a picture; words of a text, its end counted
PAD, END, WORDS = 0, 1, 8192  # ids; words have ids by their hash, so that any text can be read: few of them collide
PAIRS = 1 << 16  # pairs to train on at most
CHOICE = 303  # purpose of the random streams
PAIRING_SIZES = TextConfig(
    vocab_size=WORDS,
    hidden_size=WIDTH,
    intermediate_size=4 * WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
)


def ids_of(text: str) -> list[int]:
    """LENGTH ids: the first words, END, PAD."""
    ids = [2 + zlib.crc32(word.encode()) % (WORDS - 2) for word in words(text)[: LENGTH - 1]]
    return ids + [END] + [PAD] * (LENGTH - 1 - len(ids))


class Pairing(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = convolutions()
        self.look = nn.Parameter(0.5 * torch.randn(VIEWS, 64))
        self.picture_projection = nn.Linear(VIEWS * WIDTH, WIDTH)
        self.text = TextEncoder(PAIRING_SIZES)
        self.text_projection = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor([2.5]))  # of the cosines in the loss, as a logarithm

    def see(self, pixels: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, 128), length 1."""
        x = self.features(pixels).flatten(2)  # (B, D, L)
        views = torch.einsum("bdl,kl->bkd", x, self.look.softmax(-1)).flatten(1)  # (B, K * D)
        return F.normalize(self.picture_projection(views), dim=-1)

    def read_ids(self, ids: Tensor) -> Tensor:
        ends = (ids == END).long().argmax(-1)
        states = self.text(ids)[torch.arange(len(ids), device=ids.device), ends]  # (B, D)
        return F.normalize(self.text_projection(states), dim=-1)

    def read(self, texts: list[str]) -> Tensor:
        return self.read_ids(torch.tensor([ids_of(text) for text in texts], device=self.look.device))


# ---- training


def told_picture(seed: int, i: int, split: str = "train") -> tuple[Picture, str, int]:
    """Picture i, a text that goes with it, its jitter: a caption, or a story's step or a dialogue's turn."""
    if i % 2:
        turns, jitter = (sample_story if i % 4 == 1 else sample_dialogue)(seed, i, split)
        shown = [turn for turn in turns if turn.pictures]
        if shown:  # some dialogues have no picture
            text, (picture,) = pick(random_stream(seed, i, CHOICE), shown)
            return picture, text, jitter
    return sample_pair(seed, i, split)


def paired_text(seed: int, i: int) -> np.ndarray:
    return np.array(ids_of(told_picture(seed, i)[1]), np.int16)


class PairingRecipe(Recipe):
    name, batch_sizes, budgets = "pairing", (1024, 128), (1, 15)
    lr, matrix_lr, hold = 2e-3, 0.01, 1000

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model = Pairing()
        reset(self.model.text)
        length = min(setup.pictures, PAIRS)
        self.pictures = setup.training_set("paired-pictures", partial(drawn, partial(told_picture, setup.seed)), length)
        self.texts = setup.training_set("paired-texts", partial(paired_text, setup.seed), length)
        self.tested = to_pixels(setup.held_out_pictures()[0])
        self.tested_texts = [sample_pair(setup.seed, i, "held-out")[1] for i in range(setup.tested)]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        picked = self.pick(len(self.pictures), generator)
        return to_pixels(self.pictures[picked]), self.texts[picked].long()

    def losses(self, pairing: Pairing, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        cosines = pairing.see(pixels) @ pairing.read_ids(ids).T
        scores = (pairing.scale.clamp(max=4.6).exp() * cosines).float()
        own = torch.arange(len(scores), device=scores.device)
        return {"loss": (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2}

    def measure(self, pairing: Pairing) -> dict[str, float]:
        """The share of held-out pictures whose own caption is the nearest of all tested ones."""
        nearest = (pairing.see(self.tested) @ pairing.read(self.tested_texts).T).argmax(-1)
        own = torch.arange(len(nearest), device=nearest.device)
        return {"own_caption": (nearest == own).float().mean().item()}

    def export(self, pairing: Pairing, weights: Path) -> None:
        write_tensors(weights / "pairing.safetensors", pairing.state_dict())
