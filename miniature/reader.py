"""Recipe of the miniature's text encoder: it learns to read the facts off captions, and is frozen from then on.

    caption ids (B, 32) -> encoding (B, 32, 128), at the caption's end -> scores of the slots and of the whole picture

Stable Diffusion's text encoder is CLIP's, trained beside pictures before any UNet saw it. Trained with the UNet alone,
the miniature's dropped "left" and "right": what a place means shows only once the UNet uses it, and the UNet cannot
use it before the encoding tells it.
"""

from collections import Counter
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import MINIATURE
from common.files import fingerprint, write_file, write_json, write_text
from miniature.facts import Picture, random_stream
from miniature.judge import IGNORE, SLOT_SIZES, SLOTS, WHOLE_SIZES, labels, labels_of, reading_losses
from miniature.recipe import Recipe, Setup, reset, write_part
from miniature.words import caption, facts_in
from miniature.world import sample_pair
from published.clip_tokenizer import ClipTokenizer, join_pair
from published.parts import config_of
from text_encoder import TextConfig, TextEncoder

TEXT_SIZES = config_of("text encoder", MINIATURE / "stable-diffusion" / "text_encoder" / "config.json")
PHRASINGS = 4  # captions of a picture
TEXTS = 20_000  # captions whose words become the byte-pair vocabulary
CAPTIONS, READ = 300, 302  # purposes of the random streams


# ---- captions as tokens


def full_caption(picture: Picture, rng: np.random.Generator) -> str:
    """A caption that names every size and place."""
    while True:
        text = caption(picture, rng)
        if all(thing.size and thing.place for thing in facts_in(text).things):
            return text


def byte_pairs(words: Counter) -> list[tuple[str, str]]:
    """The commonest pair of neighbouring parts, joined, and again, until every word (of a-z) is one: CLIP's merges."""
    split, found = {word: [*word[:-1], word[-1] + "</w>"] for word in words}, []
    while True:
        pairs = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return found
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.append(best)
        split = {word: join_pair(parts, best) for word, parts in split.items()}


def write_clip_tokenizer(folder: Path, seed: int) -> None:
    """vocab.json, merges.txt and settings as published ones are, from the words of TEXTS captions."""
    words = Counter(word for i in range(TEXTS) for word in sample_pair(seed, i)[1].split())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # "!" first: it pads, and its id is 0
    letters = [*map(chr, printable), *map(chr, range(256, 512 - len(printable)))]  # CLIP's spelling of the 256 bytes
    pairs = byte_pairs(words)
    tokens = [*letters, *(f"{x}</w>" for x in letters), *map("".join, pairs), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        write_file(folder / name, (MINIATURE / "stable-diffusion" / "tokenizer" / name).read_bytes())
    # The last file: where it is, all are.
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, pairs)]) + "\n")


tokenizer_at = lru_cache(ClipTokenizer)  # of a folder


def caption_ids(folder: Path, seed: int, i: int) -> np.ndarray:
    """int16 (PHRASINGS, S): the ids of several captions of picture i, the first of which names every size and place."""
    picture, rng = sample_pair(seed, i)[0], random_stream(seed, i, CAPTIONS)
    texts = [(caption if k else full_caption)(picture, rng) for k in range(PHRASINGS)]
    return tokenizer_at(folder)(texts)[0].numpy().astype(np.int16)


# ---- reading


class Reader(nn.Module):
    """Caption ids (B, S) -> scores as the judge's, read off the encoding at the caption's end (B, D)."""

    def __init__(self, sizes: TextConfig, end: int):
        super().__init__()
        self.end, self.text_encoder = end, TextEncoder(sizes)
        self.slots = nn.Linear(sizes.hidden_size, len(SLOTS) * sum(SLOT_SIZES))
        self.whole = nn.Linear(sizes.hidden_size, sum(WHOLE_SIZES))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.text_encoder(ids)[torch.arange(len(ids), device=ids.device), ends_of(ids, self.end)]  # (B, D)
        return self.slots(x).unflatten(-1, (len(SLOTS), -1)), self.whole(x)


def ends_of(ids: Tensor, end: int) -> Tensor:
    """Where the captions (B, S) end: the first `end` token of each -> (B,)."""
    return (ids == end).long().argmax(-1)


def caption_set(setup: Setup, folder: Path) -> Tensor:
    """Several captions of every training picture as ids (n, PHRASINGS, S), made once for a tokenizer."""
    version = fingerprint([folder / "merges.txt"])
    return setup.training_set(f"captions-{version}", partial(caption_ids, folder, setup.seed))


class TextRecipe(Recipe):
    name, batch_sizes, budgets = "text", (1024, 64), (1, 15)
    lr, matrix_lr, hold = 2e-3, 0.02, 200

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.tokenizer_folder = setup.sets / f"byte-pairs-{setup.seed}"
        if not (self.tokenizer_folder / "merges.txt").exists():
            write_clip_tokenizer(self.tokenizer_folder, setup.seed)
        tokenizer = tokenizer_at(self.tokenizer_folder)
        self.texts = caption_set(setup, self.tokenizer_folder)
        self.labels = setup.training_set("labels", partial(labels_of, partial(sample_pair, setup.seed)))
        self.sizes = replace(TEXT_SIZES, vocab_size=len(tokenizer.vocabulary))
        self.begin, self.end = tokenizer([""])[0][0, :2].tolist()
        self.model = Reader(self.sizes, self.end)
        reset(self.model)
        tested = [sample_pair(setup.seed, i, "held-out")[0] for i in range(setup.tested)]
        texts = [full_caption(picture, random_stream(setup.seed, i, READ)) for i, picture in enumerate(tested)]
        self.tested = tokenizer(texts)[0].to(setup.device)
        self.wanted = torch.from_numpy(np.stack([labels(picture) for picture in tested]))

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        picked, phrasing = (self.pick(length, generator) for length in (len(self.texts), PHRASINGS))
        return self.texts[picked, phrasing].long(), self.labels[picked].long()

    def losses(self, reader: Reader, ids: Tensor, known: Tensor) -> dict[str, Tensor]:
        losses = reading_losses(*reader(ids), known)
        return {"loss": sum(losses.values()), **losses}

    def measure(self, reader: Reader) -> dict[str, float]:
        """The share of held-out captions, with all facts named, of which every fact is read rightly."""
        slots, whole = reader(self.tested)
        slots = torch.stack([s.argmax(-1) for s in slots.split(SLOT_SIZES, -1)], -1).flatten(1)
        whole = torch.stack([s.argmax(-1) for s in whole.split(WHOLE_SIZES, -1)], -1)
        right = (torch.cat([slots, whole], -1).cpu() == self.wanted) | (self.wanted == IGNORE)  # (n, 21)
        return {"read": right.all(-1).float().mean().item()}

    def export(self, reader: Reader, weights: Path) -> None:
        sizes = asdict(self.sizes) | {"bos_token_id": self.begin, "eos_token_id": self.end}
        write_part(weights, "stable-diffusion/text_encoder", "model", reader.text_encoder, sizes)
        for file in self.tokenizer_folder.iterdir():
            write_file(weights / "stable-diffusion" / "tokenizer" / file.name, file.read_bytes())
