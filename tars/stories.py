"""Interleaved tars into batches for stage 2 (MLS, section 3.3 of the paper, on VIST and MMDialog).

A sample of an interleaved tar is `KEY.json`, {"kind": "story" | "dialog", "turns": [{"text": ..., "image": ...}, ...]},
and its pictures; "image" is the name of a picture (`KEY.0.jpg`), a list of names, or null. `python -m tars vist` and
`python -m tars mmdialog` write such tars (published.py).

    task          source                                                 target
    image         steps before k, "Generate an image ...: text of k"     vokens ###
    text+image    steps before k, "What should happen then?"             text of k, vokens ###
    text          steps before k, "Tell me ... by this image:" picture   text of k ###
    reply         the previous exchange of a dialogue, turns before k    text of turn k, its vokens if any ###

The items of the order that data.py's head explains are every turn of a dialogue but the first, and every step of a
story in each task, the first step as an image alone: 13 items of five steps. An epoch meets each once. Where the tasks
have weights, the step's task is drawn by (seed, position).

    batches = open_stories(["vist-train.tar"], tokenizer, 32, partial(qformer.preprocess_input, size=224),
                           partial(vae.preprocess_output, size=512), batch_size=32)
    batch = next(batches)

    batch["pairs"]          B (source, target), made for minigpt5.collate
    batch["inputs"]         (P, 3, H, W) of all <ImageHere> of the batch, row by row; None where there is none
    batch["outputs"]        (M, 3, H, W) of all vokens of the batch, row by row; None where there is none
                            of precomputed tars (P, Q, D) and (M, 2, C, h, w), see features.py
    batch["tasks"]          B names of tasks; batch["keys"] beside them, KEY.k
    batch["bad"]            as in data.py

Left out: tars behind http(s).
"""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate

from tars.features import NONE, Features, read_features
from tars.index import FEATURES, JSON, NUMBERED, TarIndex, Unusable, expand, is_url, member_of, read_member
from tars.pairs import Batches, Broken, TarData, decode
from tokenizer import Tokenizer

TASKS = ("image", "text+image", "text")
PICTURE = "<Img><ImageHere></Img>"
END = " ###"
LONGEST_PIECE = 16  # characters of a token, as sentencepiece models are trained
SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. "
    "You will be able to see the images once I provide it to you. "
)
STORY = SYSTEM + "Please look at the images and tell the story."
DIALOG = SYSTEM + "Please talk with me and show images where they fit."
SPEAKERS = ("###Human:", "###Assistant:")
REQUESTS = {  # {}: the text or the picture of the step
    "image": ("Generate an image with the scene description: {}", "Draw the scene that is described here: {}"),
    "text+image": ("What should happen then?", "Continue the story with an image.", "Show and tell me the next scene."),
    "text": ("Tell me the next scene description by this image: {}", "What does the story tell about this image: {}"),
}


class Turn(NamedTuple):
    """A turn of a dialogue or a step of a story."""

    text: str  # plain: nothing in it is read as a special token
    pictures: tuple = ()  # whatever stands for its pictures


class Row(NamedTuple):
    """A row for the language model and the pictures that its placeholders and its vokens stand for, in order."""

    source: str
    target: str
    inputs: tuple = ()
    outputs: tuple = ()


# ---- strings: the template marks are the released code's


def shown(turn: Turn, picture: str) -> str:
    """A turn's text and `picture` for each of its pictures."""
    return f"{turn.text} {picture * len(turn.pictures)}".strip()


def story_source(before: list[Turn], request: str, system: str | None = None) -> str:
    """A story so far and a request, which may hold pictures of its own, as the language model reads them. `system`: the
    sentences that open the prompts of a checkpoint, where it has others (`MiniGPT5.system`). Texts without a picture
    between them are kept apart: together they could make a special token."""
    told = "".join(turn.text + (PICTURE * len(turn.pictures) or " ") for turn in before).rstrip(" ")
    return f"{system or STORY}###Human:{told}" + ("\n" if told else "") + f" {request} ###Assistant:"


def story_row(before: list[Turn], turn: Turn, task: str, phrase: int, vokens: str, system: str | None = None) -> Row:
    """The next step `turn` of a story as a sample of `task`, in one of the phrasings of its request."""
    requests, given = REQUESTS[task], PICTURE if task == "text" else turn.text
    source = story_source(before, requests[phrase % len(requests)].format(given), system)
    inputs = tuple(picture for step in before for picture in step.pictures)
    if task == "text":
        return Row(source, turn.text + END, inputs + turn.pictures)
    answer = Turn("" if task == "image" else turn.text, turn.pictures)
    return Row(source, shown(answer, vokens) + END, inputs, turn.pictures)


def dialog_source(before: list[Turn], k: int, system: str | None = None) -> str:
    """The turns before turn k and the mark of who speaks next; even turns are the human's, odd ones the assistant's."""
    said = [f"{SPEAKERS[i % 2]} {shown(turn, PICTURE)}\n" for i, turn in enumerate(before, k - len(before))]
    return (system or DIALOG) + "".join(said) + SPEAKERS[k % 2]


def dialog_row(before: list[Turn], turn: Turn, k: int, vokens: str, system: str | None = None) -> Row:
    """Turn k of a dialogue as the answer to the turns before it."""
    inputs = tuple(picture for earlier in before for picture in earlier.pictures)
    return Row(dialog_source(before, k, system), shown(turn, vokens) + END, inputs, turn.pictures)


def first_heard(k: int) -> int:
    """Where the history of turn k of a dialogue begins: with the exchange before its own, as in the released code."""
    return max(0, k // 2 * 2 - 2)


# ---- the JSON of a sample


def clean(text: str) -> str:
    """A text of the outside world: on one line, valid UTF-8, and no "###", which ends a turn."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub("#(?=##)", "# ", " ".join(text.split()))


def read_turns(content: bytes | None, key: str, plain: Callable[[str], str]) -> tuple[str, list[Turn]]:
    """KEY.json -> (kind, turns), pictures as kinds of members of a tar. `plain` takes what looks like a special token
    out of a text. Raises Unusable."""
    if content is None:
        raise Unusable("no JSON")
    try:
        sample = json.loads(content)
    except (ValueError, RecursionError):
        raise Unusable("broken JSON") from None
    if not isinstance(sample, dict) or sample.get("kind") not in ("story", "dialog"):
        raise Unusable("neither story nor dialogue")
    if not isinstance(sample.get("turns"), list) or len(sample["turns"]) < 2:
        raise Unusable("fewer than two turns")
    turns = []
    for turn in sample["turns"]:
        text, names = (turn.get("text"), turn.get("image")) if isinstance(turn, dict) else (None, None)
        names = [] if names is None else names if isinstance(names, list) else [names]
        if not isinstance(text, str):
            raise Unusable("turn without text")
        turns.append(Turn(plain(clean(text)), tuple(picture_member(name, key) for name in names)))
    return sample["kind"], turns


def picture_member(name: object, key: str) -> int:
    """The kind of the member KEY.k.jpg of the sample KEY."""
    member = member_of(name) if isinstance(name, str) else None
    if member is None or member[0].rpartition("/")[2] != key.rpartition("/")[2]:
        raise Unusable("foreign picture name")
    return member[1]


# ---- samples and batches


class StoryData(TarData):
    """The turns of the stories and dialogues in local tars, as samples (see the head of the file).

    tokenizer: its `plain` guards what comes from the tar, its `encode` tells lengths; queries: positions that an input
    picture takes. A row has at most `limit` tokens, pictures and <s> counted: the oldest turns are left out whole, the
    last one before the sample never. to_input, to_output: RGB picture -> (3, H, W). weights: of TASKS, for stories.
    features: what is there in the place of pictures. blind: the share of story steps whose history has no pictures.
    """

    def __init__(
        self,
        tars: list[str],
        tokenizer: Tokenizer,
        queries: int,
        to_input: Callable,
        to_output: Callable,
        limit: int = 2048,
        weights: dict[str, float] | None = None,
        features: Features = NONE,
        blind: float = 0.0,
    ):
        self.tokenizer, self.queries, self.limit = tokenizer, queries, limit
        self.to_input, self.to_output, self.features, self.blind = to_input, to_output, features, blind
        self.weights = checked_weights(dict.fromkeys(TASKS, 1.0) if weights is None else weights)
        self.first, self.tasks = int(self.weights[0] > 0), sum(weight > 0 for weight in self.weights)  # items of a step
        super().__init__(tars)
        self.row_ends = [np.cumsum(self.row_items(index)) for index in self.indices]

    def row_items(self, index: TarIndex) -> np.ndarray:
        """Items of each row of a tar; what is no story has one too, so that it is met and counted as broken."""
        steps = self.first + self.tasks * (index.turns - 1)
        return np.maximum(np.where(index.turns > 0, steps, -index.turns - 1), 1)

    def items(self, index: TarIndex) -> int:
        return int(self.row_items(index).sum())

    def draw(self, bits: np.random.PCG64) -> tuple[int, int]:
        """The task and the phrasing, each as 64 random bits."""
        task, phrase = bits.random_raw(2)
        return int(task), int(phrase)

    def turn(self, i: int, bits: int) -> tuple[int, int, int, str]:
        """Item -> (tar, row in its table, turn, task). bits: of a story's task."""
        tar, at = self.place(i)
        ends = self.row_ends[tar]
        row = int(np.searchsorted(ends, at, side="right"))
        at -= int(ends[row - 1]) if row else 0
        if self.indices[tar].turns[row] <= 0:
            return tar, row, at + 1, "reply"
        k, nth = divmod(at - self.first, self.tasks)
        task = pick_task(self.weights, (nth + uniform(bits)) / self.tasks) if k >= 0 else "image"
        return tar, row, k + 1, task

    def length(self, i: int, draw: tuple[int, int]) -> float:
        """How long the row is, about, known without reading the story: turns before it, one more for a picture in its
        request."""
        *_, k, task = self.turn(i, draw[0])
        return k - first_heard(k) if task == "reply" else k + (task == "text")

    def sample(self, i: int, draw: tuple[int, int]) -> dict | Broken:
        """{"key", "task", "source", "target", "inputs", "outputs"}, the last two lists of tensors."""
        tar, row, k, task = self.turn(i, draw[0])
        index = self.indices[tar]
        key, read = index.key(row), partial(read_member, self.tars[tar], index.table[row])
        try:
            kind, turns = read_turns(read(JSON), key, self.tokenizer.plain)
            if k >= len(turns) or (kind == "dialog") != (task == "reply"):
                raise Unusable("tar and index differ")
            fitting = self.fit(kind, turns[: k + 1], task, draw[1])
            inputs, outputs = self.pictures(read, fitting)
        except Unusable as error:
            return Broken(key, str(error))
        except OSError:
            return Broken(key, "tar not readable")
        words = {"key": f"{key}.{k}", "task": task, "source": fitting.source, "target": fitting.target}
        return {**words, "inputs": inputs, "outputs": outputs}

    def pictures(self, read: Callable[[int], bytes | None], row: Row) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The row's inputs and outputs, or what was precomputed of them. Raises Unusable, OSError."""
        if "moments" in self.features:
            inputs = [f"{k - NUMBERED}.queries" for k in row.inputs]
            outputs = [f"{k - NUMBERED}.moments" for k in row.outputs]
            tensors = read_features(read(FEATURES), self.features, inputs + outputs)
            return [tensors[name] for name in inputs], [tensors[name] for name in outputs]
        inputs = [self.to_input(decode(read(k))) for k in row.inputs]
        return inputs, [self.to_output(decode(read(k))) for k in row.outputs]

    def fit(self, kind: str, turns: list[Turn], task: str, phrase: int) -> Row:
        """The last of `turns` as a row with as much of its history as has room. Raises Unusable."""
        *before, turn = turns
        vokens, k = self.tokenizer.voken_text(), len(before)
        if kind == "story" and not all(step.text and step.pictures for step in turns):
            raise Unusable("step without text or picture")
        if not turn.text and not turn.pictures:
            raise Unusable("empty turn")
        if kind == "story" and uniform(phrase) < self.blind:  # high bits; the wording takes the low ones
            before = [Turn(step.text) for step in before]

        def since(first: int) -> Row:
            if kind == "story":
                return story_row(before[first:], turn, task, phrase, vokens)
            return dialog_row(before[first:], turn, k, vokens)

        oldest = first_heard(k) if kind == "dialog" else 0
        fitting = since(oldest)
        if self.tokens(fitting) <= self.limit:
            return fitting
        fitting = None
        for first in reversed(range(oldest + 1, k)):  # few steps, even if there are ten thousand turns
            row = since(first)
            if self.tokens(row) > self.limit:
                break
            fitting = row
        if fitting is None:
            raise Unusable("too long")
        return fitting

    def tokens(self, row: Row) -> int:
        """Tokens of the row as minigpt5.collate makes it: <s>, source, target. Of a row that is far too long, fewer:
        a hostile one could take seconds to encode."""
        least = max(self.queries * len(row.inputs), (len(row.source) + len(row.target)) // LONGEST_PIECE)
        if least > self.limit:
            return least
        words = len(self.tokenizer.encode(row.source)) + len(self.tokenizer.encode(row.target))
        return 1 + words + (self.queries - 1) * len(row.inputs)

    def collate(self, samples: list[dict]) -> dict:
        inputs, outputs = ([picture for s in samples for picture in s[name]] for name in ("inputs", "outputs"))
        return {
            "pairs": [(sample["source"], sample["target"]) for sample in samples],
            "tasks": [sample["task"] for sample in samples],
            "keys": [sample["key"] for sample in samples],
            "inputs": default_collate(inputs) if inputs else None,
            "outputs": default_collate(outputs) if outputs else None,
        }


def uniform(bits: int) -> float:
    """64 random bits -> a number in [0, 1)."""
    return (bits >> 11) * 2.0**-53


def checked_weights(weights: dict[str, float]) -> list[float]:
    """{"image": 2, "text": 1} -> [2, 0, 1], in the order of TASKS. ValueError for what cannot be drawn from."""
    unknown = sorted(set(weights) - set(TASKS))
    if unknown:
        raise ValueError(f"no such task: {', '.join(unknown)}; there are {', '.join(TASKS)}")
    values = [float(weights.get(task, 0)) for task in TASKS]
    if not all(0 <= value < float("inf") for value in values) or not sum(values):
        raise ValueError("the weights of the tasks must be 0 or more, one of them above 0")
    return values


def pick_task(weights: list[float], place: float) -> str:
    """A place in [0, 1) -> that of TASKS which is there if each takes up its weight."""
    ends = np.cumsum(weights)
    return TASKS[int(np.searchsorted(ends, place * ends[-1], side="right"))]


def open_stories(
    data: list[str],
    tokenizer: Tokenizer,
    queries: int,
    to_input: Callable,
    to_output: Callable,
    batch_size: int,
    limit: int = 2048,
    weights: dict[str, float] | None = None,
    features: Features = NONE,
    blind: float = 0.0,
    **options,
) -> Batches:
    """What the user named (see `tars.expand`) -> its batches. Arguments: StoryData's, `options`: those of Batches."""
    tars = expand(data)
    for tar in filter(is_url, tars):
        raise ValueError(f"{tar}: stories are read at random, give local tars")
    return Batches(
        StoryData(tars, tokenizer, queries, to_input, to_output, limit, weights, features, blind), batch_size, **options
    )
