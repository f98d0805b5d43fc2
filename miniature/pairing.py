"""The pairing: pictures and texts of the miniature world in one space, as CLIP has them for photographs.

Two small networks learn by CLIP's loss (Radford et al. 2021), with the others of the batch as negatives.
Half of the pairs are captions, half are steps of stories and turns of dialogues, of which many ("it drifts to the
right.") tell little of their picture. It measures what MiniGPT-5 makes and trains no part of it. Unlike the judge it
learns from no facts, and it cannot tell what is unlike its training data: nonsense gets a cosine too.

    pixels -> features (B, 128, 8, 8) -> learned views of the places (B, K * 128) -> (B, 128)
    words, by hash -> ids (B, T) -> small text transformer, its state at the end (B, 128) -> (B, 128)
"""

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.metrics import words
from miniature.judge import WIDTH, convolutions
from text_encoder import TextConfig, TextEncoder

VIEWS, LENGTH = 12, 40  # learned views of a picture; ids of a text, END included
PAD, END, WORDS = 0, 1, 8192  # ids; words have ids by their hash, so that any text can be read: few of them collide
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

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, 128), length 1."""
        x = self.features(pixels).flatten(2)  # (B, D, L)
        views = torch.einsum("bdl,kl->bkd", x, self.look.softmax(-1)).flatten(1)  # (B, K * D)
        return F.normalize(self.picture_projection(views), dim=-1)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Captions' ids (B, T) -> their features (B, D) of length 1."""
        ends = (ids == END).long().argmax(-1)
        states = self.text(ids)[torch.arange(len(ids), device=ids.device), ends]  # (B, D)
        return F.normalize(self.text_projection(states), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        return self.embed_ids(torch.tensor([ids_of(text) for text in texts], device=self.look.device))
