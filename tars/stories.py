"""Tars of stories and dialogues into batches for stage 2 (MLS, section 3.3 of the paper, on VIST and MMDialog).

A sample of such a tar is `KEY.json`, {"kind": "story" | "dialog", "turns": [{"text": ..., "image": ...}, ...]}, and its
pictures; "image" is the name of a picture (`KEY.0.jpg`), a list of names, or null. prompts.py has the tasks' texts.

The items of the order (batches.py) are every turn of a dialogue but the first, and every step of a story in each task,
the first step as an image alone: 13 items of five steps. An epoch meets each once.

    data = StoryData(["vist-train.tar"], tokenizer, 32, partial(qformer.preprocess_input, size=224),
                     partial(images.preprocess_output, size=512))
    batch = next(Batches(data, batch_size=32))

    batch["pairs"]          B (source, target); batch["ids"] the same as token ids, for `collate`
    batch["inputs"]         (P, 3, H, W) of all <ImageHere> of the batch, in order of samples; None where there is none
    batch["outputs"]        (M, 3, H, W) of all vokens of the batch, in order of samples; None where there is none
                            of precomputed tars (P, Q, D) and (M, 2, C, h, w), see precomputed.py
    batch["tasks"]          B names of tasks; batch["keys"] beside them, KEY.k
    batch["bad"]            as in batches.py
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from torch.utils.data import default_collate

from common.tokenizer import Tokenizer
from prompts import TASKS, Example, System, Turn, dialog_example, history_start, one_line, story_example
from tars.batches import Reader, TarData, decode
from tars.index import STORY, Member, TarIndex, Unusable, member_of
from tars.precomputed import NOTHING, Precomputed, read_tensors


def read_turns(content: bytes | None, key: str, escape: Callable[[str], str]) -> tuple[str, list[Turn]]:
    """KEY.json -> (kind, turns), whose texts are cleaned and escaped and whose pictures are members of the tar.
    escape: `Tokenizer.escape`, or `str` where no language model reads the texts. Raises Unusable."""
    try:
        sample = json.loads(content)
        turns = [read_turn(turn, key, escape) for turn in sample["turns"]]
        if sample["kind"] not in ("story", "dialog") or len(turns) < 2:
            raise ValueError
        return sample["kind"], turns
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unusable("neither story nor dialogue") from None


def read_turn(turn: dict, key: str, escape: Callable[[str], str]) -> Turn:
    names = turn.get("image")
    names = names if isinstance(names, list) else [names] if names is not None else []
    places = [member_of(name) or ("", None) for name in names]
    if any(owner.rpartition("/")[2] != key.rpartition("/")[2] for owner, _ in places):
        raise Unusable("foreign picture name")
    return Turn(escape(one_line(turn["text"])), tuple(member for _, member in places))


@dataclass(eq=False)
class StoryData(TarData):
    """The turns of the stories and dialogues in tars, as samples (see the head of the file).

    tokenizer: its `escape` escapes what comes from the tar, its `encode` makes token ids. queries: positions that an
    input picture takes. limit: of tokens in a sequence, pictures and <s> counted; the oldest turns are left out whole,
    but never the last one before the sample. to_input, to_output: RGB picture -> (3, H, W). tasks: of a story's steps.
    precomputed: tensors that take the place of pictures. blind: share of story steps whose history has no pictures.
    words_only: answers have no pictures. system: opens every prompt; None: those of prompts.py.
    """

    tars: list[str]
    tokenizer: Tokenizer
    queries: int
    to_input: Callable
    to_output: Callable
    limit: int = 2048
    tasks: Sequence[str] = TASKS
    precomputed: Precomputed = NOTHING
    blind: float = 0.0
    words_only: bool = False
    system: System | None = None

    def __post_init__(self):
        self.items_of_first_step = int("image" in self.tasks)
        super().__init__(self.tars)

    def count_items(self, index: TarIndex) -> np.ndarray:
        """At least one, so that a broken sample is met and counted."""
        steps = self.items_of_first_step + len(self.tasks) * (index.turns - 1)
        return np.maximum(np.where(index.kinds == STORY, steps, index.turns - 1), 1)

    def choose(self, bits: np.random.PCG64) -> int:
        """64 random bits. The request's wording is their value modulo the number of wordings, and a story's history is
        blind where they are in the lowest share `blind` of all values."""
        return int(bits.random_raw(2)[1])

    def turn_and_task(self, kind: int, item: int) -> tuple[int, str]:
        """Which turn an item of a sample is, and its task."""
        if kind != STORY:
            return item + 1, "reply"
        if item < self.items_of_first_step:
            return 0, "image"
        step, nth = divmod(item - self.items_of_first_step, len(self.tasks))
        return step + 1, self.tasks[nth]

    def read_item(self, key: str, read: Reader, kind: int, item: int, choice: int) -> dict:
        """{"key", "task", "source", "target", "inputs", "outputs", "ids"}: lists of tensors, and of token ids."""
        k, task = self.turn_and_task(kind, item)
        kind_now, turns = read_turns(read(Member.JSON), key, self.tokenizer.escape)
        if k >= len(turns) or (kind_now == "story") != (kind == STORY):
            raise Unusable("tar and index differ")
        example = self.fit(kind_now, turns[: k + 1], task, choice)
        if self.precomputed.shapes:
            inputs = [f"{member - Member.NUMBERED}.queries" for member in example.inputs]
            outputs = [f"{member - Member.NUMBERED}.moments" for member in example.outputs]
            tensors = read_tensors(read(Member.TENSORS), self.precomputed, inputs + outputs)
            inputs, outputs = ([tensors[name] for name in names] for names in (inputs, outputs))
        elif example.inputs and self.to_input is None:
            raise Unusable("picture to be read, and no image encoder")
        else:
            inputs = [self.to_input(decode(read(member))) for member in example.inputs]
            outputs = [self.to_output(decode(read(member))) for member in example.outputs]
        return {"key": f"{key}.{k}", "task": task, **example._replace(inputs=inputs, outputs=outputs)._asdict()}

    def fit(self, kind: str, turns: list[Turn], task: str, phrase: int) -> Example:
        """The last of `turns` with as much of its history as has room, encoded. Raises Unusable."""
        *before, turn = turns
        vokens, k = self.tokenizer.voken_text(), len(before)
        if kind == "story" and not all(step.text and step.pictures for step in turns):
            raise Unusable("step without text or picture")
        if not turn.text and not turn.pictures:
            raise Unusable("empty turn")
        if self.words_only and task != "text":  # whose picture is part of the question
            turn = Turn(turn.text)
        if kind == "story" and phrase < self.blind * 2.0**64:
            before = [Turn(step.text) for step in before]

        def since(first: int) -> Example:
            if kind == "story":
                return story_example(before[first:], turn, task, phrase, vokens, self.system)
            return dialog_example(before[first:], turn, k, vokens, self.system)

        oldest = history_start(k) if kind == "dialog" else 0
        if whole := self.encoded(since(oldest)):
            return whole
        longer = (self.encoded(since(first)) for first in reversed(range(oldest + 1, k)))
        fitting = list(takewhile(bool, longer))  # ends after few, even if there are ten thousand turns
        if not fitting:
            raise Unusable("too long")
        return fitting[-1]

    def encoded(self, example: Example) -> Example | None:
        """The example with its token ids; None where these and <s> are more than `limit`."""
        source, target = (self.tokenizer.encode(text, self.queries) for text in (example.source, example.target))
        return example._replace(ids=(source, target)) if 1 + len(source) + len(target) <= self.limit else None

    def collate(self, samples: list[dict]) -> dict:
        inputs, outputs = ([picture for s in samples for picture in s[name]] for name in ("inputs", "outputs"))
        return {
            "pairs": [(sample["source"], sample["target"]) for sample in samples],
            "ids": [sample["ids"] for sample in samples],
            "tasks": [sample["task"] for sample in samples],
            "keys": [sample["key"] for sample in samples],
            "inputs": default_collate(inputs) if inputs else None,
            "outputs": default_collate(outputs) if outputs else None,
        }
