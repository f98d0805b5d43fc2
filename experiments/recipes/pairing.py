"""Recipe of the pairing, `miniature.pairing.Pairing`: pictures and texts that go together come near each other.

pixels (B, 3, 64, 64), ids (B, 40) -> cosines (B, B), of which the diagonal should be the largest
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.recipes.recipe import Recipe, Setup, drawn, reset, to_pixels, write_tensors
from miniature.facts import Picture, pick, random_stream
from miniature.pairing import Pairing, ids_of
from miniature.world import sample_dialogue, sample_pair, sample_story

PAIRS = 1 << 16  # pairs to train on at most
CHOICE = 303  # purpose of the random streams


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
        cosines = pairing.embed_pixels(pixels) @ pairing.embed_ids(ids).T
        scores = (pairing.scale.clamp(max=4.6).exp() * cosines).float()
        own = torch.arange(len(scores), device=scores.device)
        return {"loss": (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2}

    def measure(self, pairing: Pairing) -> dict[str, float]:
        """The share of held-out pictures whose own caption is the nearest of all tested ones."""
        nearest = (pairing.embed_pixels(self.tested) @ pairing.embed_texts(self.tested_texts).T).argmax(-1)
        own = torch.arange(len(nearest), device=nearest.device)
        return {"own_caption": (nearest == own).float().mean().item()}

    def export(self, pairing: Pairing, weights: Path) -> None:
        write_tensors(weights / "pairing.safetensors", pairing.state_dict())
