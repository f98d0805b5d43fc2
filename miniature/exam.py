"""What `score.py` measures with: the weights, questions in batches, and the shares of facts that come out right.

Words are decoded greedily by default; prompt i then starts from the same noise whichever way its picture is made.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from baselines.stable_diffusion import StableDiffusion
from common.cli import MINIATURE
from common.images import to_image, to_tensor
from common.page import draw_sheet, save_image
from common.texts import Words, clean_caption
from evaluation.cases import spoken
from generation import Sampling, answer, prompt_ids, split
from miniature.facts import Picture, random_stream
from miniature.judge import NOTHING, Judge, load_judge, read, share
from miniature.paint import draw
from minigpt5 import MiniGPT5
from prompts import WORDS_FIRST_SYSTEM, Turn, dialog_source, user_turn
from published.parts import load_minigpt5

BATCH = 50  # prompts at a time
SHOWN = 10  # prompts of a sheet
LONGEST = 96  # tokens of an answer
SIDE = 64  # of the judge's pictures
NOISE = 400  # purpose of the random streams
Figures = dict[str, dict[str, float]]  # {row: {column: figure}}


@dataclass
class Exam:
    """What is measured, and with how many samples. Judge and model are loaded when they are first asked for."""

    weights: Path
    checkpoint: Path | None  # of the parts that MiniGPT-5 trains
    device: torch.device
    sampling: Sampling
    n: int
    seed: int
    sheets: Path | None = None  # folder for pictures of the first prompts

    @cached_property
    def judge(self) -> Judge:
        """That of the weights, or the miniature's."""
        own = self.weights / "judge.safetensors"
        return load_judge(own if own.is_file() else MINIATURE / own.name, self.device)

    @cached_property
    def model(self) -> MiniGPT5:
        options = {"device": self.device, "read_pictures": (self.weights / "blip2").is_dir()}
        return load_minigpt5(self.weights, self.checkpoint, dtype=torch.float32, **options).eval()

    @cached_property
    def words(self) -> Words | None:
        return Words.of(self.weights) if self.sampling.words_first else None

    def user_turn(self, text: str, pictures: tuple = ()) -> Turn:
        """What somebody typed, as `sample.py` reads it."""
        text = self.words.read(text)[0] if self.words else text
        return user_turn(self.model.tokenizer, text, pictures)

    @property
    def system(self) -> str | None:
        return WORDS_FIRST_SYSTEM if self.sampling.words_first else None

    def generator(self, i: int) -> torch.Generator:
        """The random numbers of prompt i: its noise."""
        return torch.Generator().manual_seed(int(random_stream(self.seed, i, NOISE).integers(1 << 62)))

    def sheet(self, name: str, texts: list[str], pictures: list[Image.Image | None]) -> None:
        """The first prompts below their pictures; a picture that did not come is grey."""
        blank = Image.new("RGB", (SIDE, SIDE), "lightgrey")
        columns = [(text, [picture or blank]) for text, picture in zip(texts[:SHOWN], pictures, strict=False)]
        if self.sheets and columns:
            save_image(draw_sheet(columns), self.sheets / f"{name.replace(' ', '-')}.png")


# ---- ways to answers


def heard(told: list[Turn], jitter: int) -> list[Turn]:
    """Turns of a story or a dialogue as the language model reads them, their pictures drawn."""
    return [Turn(text, tuple(draw(facts, jitter, SIDE) for facts in pictures)) for text, pictures in told]


class Said(NamedTuple):
    text: str
    picture: Image.Image | None  # the first one, if any came


@torch.no_grad()
def text_to_pictures(exam: Exam, prompts: list[str]) -> list[Image.Image]:
    """Drawn by Stable Diffusion alone; no language model takes part."""
    model = StableDiffusion(exam.weights, torch.float32, exam.device).eval()
    pictures = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        noise = torch.cat([model.sample_latents(1, exam.generator(start + i)) for i in range(len(part))])
        pictures += map(to_image, model.paint(part, noise, exam.sampling))
    return pictures


def ask(exam: Exam, sources: list[str], pictures: list[tuple[Image.Image, ...]] | None = None, **options) -> list[Said]:
    """What the model answers to each source, which holds a placeholder for each of its pictures. `options` change the
    sampling's."""
    sampling = Sampling(**vars(exam.sampling) | options)
    pictures = pictures or [()] * len(sources)
    said = []
    for start in range(0, len(sources), BATCH):
        part = slice(start, start + BATCH)
        generators = [exam.generator(start + i) for i in range(len(sources[part]))]
        prompts = [prompt_ids(exam.model, source) for source in sources[part]]
        for segments in answer(exam.model, prompts, pictures[part], sampling, generators):
            words, came = split(spoken(segments))
            said.append(Said(words, came[0] if came else None))
    return said


def chat_source(exam: Exam, text: str, pictures: tuple = ()) -> str:
    """A chat's first turn, as the model reads it."""
    return dialog_source([exam.user_turn(text, pictures)], 1, exam.system)


def draw_prompts(exam: Exam, texts: list[str]) -> list[Said]:
    """What sample.py answers to prompts: words first, to a chat's first turn, otherwise to stage 1's bare caption."""
    if exam.sampling.words_first:
        return ask(exam, [chat_source(exam, text) for text in texts])
    return ask(exam, [exam.model.tokenizer.plain(clean_caption(text)) for text in texts])


# ---- what came out right


def look(exam: Exam, pictures: list[Image.Image | None]) -> list[Picture]:
    """What the judge sees; nothing where there is no picture."""
    given = [picture for picture in pictures if picture]
    if not given:
        return [NOTHING] * len(pictures)
    if given[0].size != (SIDE, SIDE):
        raise ValueError(f"the judge reads pictures of {SIDE}x{SIDE}, these are {given[0].width}x{given[0].height}")
    seen = iter(read(exam.judge, torch.stack([2 * to_tensor(picture) - 1 for picture in given]).to(exam.device)))
    return [next(seen) if picture else NOTHING for picture in pictures]


def means(rows: list[dict[str, bool]]) -> dict[str, float]:
    """The share that is true, column by column."""
    return {name: share([row[name] for row in rows]) for name in rows[0]}
