"""What `score.py` measures with: the weights, questions in batches, and the shares of facts that come out right.

Words are decoded greedily by default. Prompt i starts from the same noise whichever way its picture is made.
"""

from collections.abc import Sequence
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
from evaluation.cases import drop_text_after_img
from generation import Sampling, answer, prompt_ids, split
from miniature.facts import Picture, random_stream
from miniature.judge import NOTHING, Judge, load_judge, read, share
from miniature.paint import draw
from minigpt5 import MiniGPT5
from prompts import WORDS_FIRST_SYSTEM, System, Turn, dialog_source, user_turn
from published.parts import load_minigpt5

BATCH = 50  # prompts at a time
SHEET_PROMPTS = 10
SIDE = 64  # pixels of the judge's pictures, in width and height
NOISE = 400  # purpose of the random streams
Figures = dict[str, dict[str, float]]  # {row: {column: figure}}


@dataclass
class Exam:
    """What is measured, and with how many samples. Judge and model are loaded at their first use."""

    weights: Path
    checkpoint: Path | None  # of the parts that MiniGPT-5 trains
    device: torch.device
    sampling: Sampling
    n: int
    seed: int
    sheets: Path | None = None  # folder for pictures of the first prompts

    @cached_property
    def judge(self) -> Judge:
        """The judge that the weights bring, or else the miniature's."""
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
    def system(self) -> System | None:
        return WORDS_FIRST_SYSTEM if self.sampling.words_first else None

    def chat_source(self, text: str, pictures: tuple = ()) -> str:
        """The source of a chat's first reply: what somebody typed, with a placeholder for each picture."""
        return dialog_source([self.user_turn(text, pictures)], 1, self.system)

    def generator(self, i: int) -> torch.Generator:
        """The random numbers of prompt i: of its words, unless the temperature is 0, and of its noise."""
        return torch.Generator().manual_seed(int(random_stream(self.seed, i, NOISE).integers(1 << 62)))

    def sheet(self, name: str, texts: list[str], pictures: list[Image.Image | None]) -> None:
        """Write the first prompts below their pictures into the folder `sheets`; a missing picture is grey."""
        blank = Image.new("RGB", (SIDE, SIDE), "lightgrey")
        columns = [(text, [picture or blank]) for text, picture in zip(texts[:SHEET_PROMPTS], pictures, strict=False)]
        if self.sheets and columns:
            save_image(draw_sheet(columns), self.sheets / f"{name.replace(' ', '-')}.png")


# ---- answers


def draw_turns(turns: list[Turn], jitter: int) -> list[Turn]:
    """Turns of a story or a dialogue as the language model reads them: with pictures in the place of their facts."""
    return [Turn(text, tuple(draw(facts, jitter, SIDE) for facts in pictures)) for text, pictures in turns]


class Answer(NamedTuple):
    text: str
    picture: Image.Image | None  # the first one of the answer


@torch.no_grad()
def text_to_pictures(exam: Exam, prompts: list[str]) -> list[Image.Image]:
    """Pictures that Stable Diffusion draws for the prompts alone; no language model takes part."""
    model = StableDiffusion(exam.weights, torch.float32, exam.device).eval()
    pictures = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        noise = torch.cat([model.sample_latents(1, exam.generator(start + i)) for i in range(len(part))])
        pictures += map(to_image, model.paint(part, noise, exam.sampling))
    return pictures


def ask(exam: Exam, sources: list[str], pictures: Sequence[tuple] = (), **options) -> list[Answer]:
    """The model's answer to each source, which holds a placeholder for each of its pictures. `options` replace fields
    of `exam.sampling`."""
    sampling = Sampling(**vars(exam.sampling) | options)
    pictures, answers = pictures or [()] * len(sources), []
    for start in range(0, len(sources), BATCH):
        part = slice(start, start + BATCH)
        generators = [exam.generator(start + i) for i in range(len(sources[part]))]
        prompts = [prompt_ids(exam.model, source) for source in sources[part]]
        for segments in answer(exam.model, prompts, pictures[part], sampling, generators):
            text, new_pictures = split(drop_text_after_img(segments))
            answers.append(Answer(text, new_pictures[0] if new_pictures else None))
    return answers


def draw_prompts(exam: Exam, texts: list[str]) -> list[Answer]:
    """sample.py's answers to prompts: words first, each is a chat's first turn, otherwise a caption as in stage 1."""
    if exam.sampling.words_first:
        return ask(exam, [exam.chat_source(text) for text in texts])
    return ask(exam, [exam.model.tokenizer.escape(clean_caption(text)) for text in texts])


# ---- facts


def picture_facts(exam: Exam, pictures: list[Image.Image | None]) -> list[Picture]:
    """The facts that the judge reads in each picture; `NOTHING` for None. ValueError where the size is not SIDE."""
    present = [picture for picture in pictures if picture]
    if not present:
        return [NOTHING] * len(pictures)
    if present[0].size != (SIDE, SIDE):
        raise ValueError(f"the judge reads pictures of {SIDE}x{SIDE}, these are {present[0].width}x{present[0].height}")
    pixels = torch.stack([2 * to_tensor(picture) - 1 for picture in present])
    facts = iter(read(exam.judge, pixels.to(exam.device)))
    return [next(facts) if picture else NOTHING for picture in pictures]


def means(rows: list[dict[str, bool]]) -> dict[str, float]:
    """The share of rows that are true, column by column."""
    return {name: share([row[name] for row in rows]) for name in rows[0]}
