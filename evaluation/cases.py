"""The cases of an evaluation, and the folder that holds a system's answers to them.

A case is a pair, or a turn of a story or dialogue (`prompts.py` writes their prompts):

    task          from        prompt                                        expected answer
    caption       a pair      the bare caption, as in stage 1               its picture
    image         a story     steps before, the text of this one            its picture
    text+image    a story     steps before                                  its text and picture
    text          a story     steps before, the picture of this one         its text
    reply         a dialogue  the previous exchange and the turn before     its text, its pictures if any

A folder of answers has KEY.json for every case, as `sample.py` writes answer.json, {"segments": [{"text": ...},
{"image": "KEY.0.png"}, ...]}, and beside it the pictures. Whatever system writes such a folder can be evaluated.
KEY.json is written after its pictures and renamed into place, so that a case with a KEY.json is answered. A stopped run
goes on with the others. `_answers.json` holds the settings of the answers; to go on with other settings is an error.
"""

import argparse
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.cli import FROM_0, FROM_1, make_folder
from common.files import read_json, write_json
from common.images import ImageError, read_image
from common.page import save_image
from common.texts import clean_caption
from generation import Sampling, answer, prompt_ids, room_after, room_wanted
from miniature.facts import Picture
from miniature.words import facts_in
from minigpt5 import MiniGPT5
from prompts import TASKS, Example, Turn, dialog_example, history_start, story_example
from tars.batches import decode, describe, read_caption, read_member
from tars.index import Member, Unusable, expand, read_index
from tars.stories import read_turns

CONTEXTS = {  # name -> the part of a story's earlier steps that a prompt holds
    "none": lambda before: [],
    "texts": lambda before: [Turn(turn.text) for turn in before],
    "pictures": lambda before: [Turn("", turn.pictures) for turn in before],
    "both": lambda before: before,
}
SETTINGS = "_answers.json"
MAX_NAME = 200  # bytes of a key in a file's name, which may have 255 with its ending and as a temporary name


def add_case_options(parser: argparse.ArgumentParser, contexts: list[str]) -> None:
    """The options that choose cases and contexts; the last of `contexts` is the default."""
    add = parser.add_argument
    add("--data", nargs="+", help="tars of pairs, stories or dialogues; folders of them, patterns")
    add("--task", choices=TASKS, default="image", help="what a story's step asks for")
    add("--context", choices=contexts, default=contexts[-1], help="what a prompt holds of a story's earlier steps")
    add("--last", action="store_true", help="of each story the last step alone")
    add("--n", type=FROM_0, default=0, help="the first so many cases; 0: all")
    add("--seed", type=int, default=0, help="same seed, same answers")
    add("--batch-size", type=FROM_1, default=16, help="cases answered at a time")


class Case(NamedTuple):
    key: str  # a pair's is KEY, turn k's KEY.k
    group: str  # KEY, which all turns of a story or dialogue share
    task: str
    before: list[Turn]  # all earlier turns; their pictures are `Member` numbers
    turn: Turn  # a pair: its caption and picture
    facts: Picture | None  # of the expected picture, where the data label it (the miniature's world)
    read: Callable[[int], bytes | None]  # a member's bytes

    @property
    def words(self) -> str:
        """The expected words; empty where only pictures are expected."""
        return self.turn.text if self.task in ("text+image", "text", "reply") else ""

    @property
    def pictures(self) -> tuple[int, ...]:
        """The `Member` numbers of the expected pictures."""
        return () if self.task == "text" else self.turn.pictures


def read_cases(data: list[str], task: str, last: bool) -> tuple[list[Case], Counter]:
    """The cases of tars, and how many samples cannot be used, by reason. task: of a story; last: its last step alone.
    ValueError for tars that cannot be read or hold several kinds of data, and where a key comes twice."""
    cases, bad = [], Counter()
    for tar in expand(data):
        index = read_index(tar)
        for row, turns in enumerate(index.turns):
            read, key = partial(read_member, tar, index.table[row]), index.key(row)
            try:
                cases += cases_of_turns(key, read, task, last) if turns else [case_of_pair(key, read)]
            except Unusable as error:
                bad[str(error)] += 1
    name, kind_of = ", ".join(data), {"caption": "pairs", "reply": "dialogues"}
    kinds = sorted({kind_of.get(case.task, "stories") for case in cases})
    if len(kinds) != 1:
        raise ValueError(f"{name}: " + (f"{' and '.join(kinds)} together" if kinds else f"no case, {describe(bad)}"))
    if repeated := [key for key, count in Counter(case.key for case in cases).items() if count > 1]:
        raise ValueError(f"{name}: {len(repeated):,} keys come twice, {repeated[0]} among them")
    return cases, bad


def given_cases(args: argparse.Namespace) -> tuple[list[Case], Counter, str]:
    """The first --n cases, how many samples cannot be used, and the digest of all cases."""
    if not args.data:
        raise ValueError("--data is needed")
    cases, bad = read_cases(args.data, args.task, args.last)
    return cases[: args.n or None], bad, digest(cases)


def digest(cases: list[Case]) -> str:
    """16 hex digits that tell data apart, also data with equal keys and different texts."""
    content = "\n".join(f"{case.key} {case.turn.text}" for case in cases)
    return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()[:16]


def case_of_pair(key: str, read: Callable[[int], bytes | None]) -> Case:
    caption = clean_caption(read_caption(read))
    if not caption:
        raise Unusable("empty caption")
    facts = facts_in(caption) if b'"label"' in (read(Member.JSON) or b"") else None
    return Case(key, key, "caption", [], Turn(caption, (Member.PICTURE,)), facts, read)


def cases_of_turns(key: str, read: Callable[[int], bytes | None], task: str, last: bool) -> Iterator[Case]:
    content = read(Member.JSON)
    kind, turns = read_turns(content, key, str)
    if kind == "story" and not all(turn.text and turn.pictures for turn in turns):
        raise Unusable("step without text or picture")
    labels = [turn.get("label") for turn in json.loads(content)["turns"]]
    first = 1 if kind == "dialog" else len(turns) - 1 if last else int(task != "image")  # a picture needs no history
    for k in range(first, len(turns)):
        if not turns[k].text and not turns[k].pictures:
            raise Unusable("empty turn")
        task_of = task if kind == "story" else "reply"
        yield Case(f"{key}.{k}", key, task_of, turns[:k], turns[k], facts_of(labels[k]), read)


def facts_of(label: object) -> Picture | None:
    """Facts as `Picture.label` wrote them; None for anything else."""
    try:
        return Picture.from_label(label)
    except (TypeError, LookupError):
        return None


def pictures_of(case: Case, members: tuple[int, ...]) -> list[Image.Image]:
    """The pictures with these `Member` numbers, decoded. Raises Unusable."""
    return [decode(case.read(member)) for member in members]


def prompt_of(case: Case, model: MiniGPT5, context: str, room: int) -> tuple[list[int], list[Image.Image]]:
    """The prompt's token ids and its pictures. Where they would leave fewer than `room` positions for the answer, the
    oldest turns, but never the last one, are left out. Raises Unusable where that is not enough."""
    tokenizer, k = model.tokenizer, len(case.before)
    turn = Turn(tokenizer.escape(case.turn.text), case.turn.pictures)
    before = [Turn(tokenizer.escape(text), pictures) for text, pictures in CONTEXTS[context](case.before)]
    for first in range(history_start(k) if case.task == "reply" else 0, max(len(before), 1)):
        if case.task == "caption":
            example = Example(turn.text, "")
        elif case.task == "reply":
            example = dialog_example(before[first:], turn, k, "", model.system)
        else:
            example = story_example(before[first:], turn, case.task, 0, "", model.system)
        ids = prompt_ids(model, example.source)
        if room_after(model, ids) >= room:
            return ids, pictures_of(case, example.inputs)
    raise Unusable("prompt too long")


# ---- the folder of answers


class Answer(NamedTuple):
    segments: list[str | Image.Image]
    unusable: str | None = None  # why no prompt could be made for the case


def file_of(folder: Path, key: str, ending: str) -> Path:
    """A case's file, directly in the folder: slashes of the key are escaped, and a hash stands for a long key."""
    name = key.replace("%", "%25").replace("/", "%2F")
    if len(name.encode()) > MAX_NAME:
        name = hashlib.sha256(name.encode()).hexdigest()
    return folder / f"{name}{ending}"


def write_answer(folder: Path, key: str, segments: list[str | Image.Image], unusable: str | None = None) -> None:
    entries, pictures = [], 0
    for segment in segments:
        if isinstance(segment, str):
            entries.append({"text": segment})
            continue
        path = file_of(folder, key, f".{pictures}.png")
        save_image(segment, path)
        entries.append({"image": path.name})
        pictures += 1
    write_json(file_of(folder, key, ".json"), {"segments": entries} | ({"unusable": unusable} if unusable else {}))


def read_answer(folder: Path, key: str) -> Answer | None:
    """None where the case has no answer. ValueError for a file that is no answer, or a picture that cannot be read."""
    path, segments = file_of(folder, key, ".json"), []
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        for segment in content["segments"]:
            if "image" in segment:
                segments.append(read_image(folder / Path(segment["image"]).name))
            else:
                segments.append(segment["text"].encode("utf-8", "replace").decode())
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"{path}: segments should be a list of texts and images") from None
    except ImageError as error:
        raise ValueError(f"{path}: {segment['image']!r:.80} cannot be read ({error.reason})") from None
    return Answer(drop_text_after_img(segments), content.get("unusable"))


def drop_text_after_img(segments: list[str | Image.Image]) -> list[str | Image.Image]:
    """The segments without all text from <Img> on: a language model that has not learned to say vokens may write a
    picture's facts there, which are no text of the answer."""
    result, ended = [], False
    for segment in segments:
        if isinstance(segment, str):
            text, mark, _ = segment.partition("<Img>")
            result += [text.strip()] if text.strip() and not ended else []
            ended = ended or bool(mark)
        else:
            result.append(segment)
    return result


def open_answers(folder: Path, settings: dict, data: list[str]) -> None:
    """Make the folder for answers that are made with `settings`, and store these and the tars' paths in it. ValueError
    where it holds answers made with other settings."""
    check_settings(make_folder(folder), settings)
    write_json(folder / SETTINGS, settings | {"tars": [str(Path(name).absolute()) for name in data]})


def check_settings(folder: Path, settings: dict) -> dict:
    """The stored settings of a folder of answers, {} without a file of them. ValueError where one is not as given."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of answers")
    stored = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if wrong := [f"{name} {stored[name]}, not {v}" for name, v in settings.items() if stored.get(name, v) != v]:
        raise ValueError(f"{folder} holds answers made with {'; '.join(wrong)}: name another folder")
    return stored


def compared_cases(folders: list[Path], data: list[str] | None) -> list[Case]:
    """The cases with an answer in all folders. data: tars; default: those that a folder's settings name. ValueError for
    folders that were made for different cases, or have none in common."""
    settings = {}
    for folder in folders:
        settings |= check_settings(folder, {name: settings[name] for name in ("task", "data") if name in settings})
    tars, names = data or settings.get("tars"), ", ".join(map(str, folders))
    if not tars:
        raise ValueError(f"{names}: --data is needed, they do not say which tars were asked about")
    # Whether only last steps were asked about is not stored; the digest tells.
    both = [read_cases(tars, settings.get("task", "text+image"), last)[0] for last in (False, True)]
    cases = next((cases for cases in both if settings.get("data") in (None, digest(cases))), [])
    common = [case for case in cases if all(file_of(folder, case.key, ".json").is_file() for folder in folders)]
    if not common:
        raise ValueError(f"{names}: no case of {', '.join(tars)} that all of them have answered")
    return common


def unanswered(cases: list[Case], folder: Path, batch_size: int) -> Iterable[list[Case]]:
    """The cases that have no answer yet, in batches."""
    remaining = [case for case in cases if not file_of(folder, case.key, ".json").is_file()]
    batches = [remaining[start : start + batch_size] for start in range(0, len(remaining), batch_size)]
    return tqdm(batches, desc="answers", unit=f" x {batch_size} cases", delay=2)


def generate(
    model: MiniGPT5, cases: list[Case], folder: Path, context: str, sampling: Sampling, seed: int, batch_size: int
) -> None:
    """Answer the cases that have no answer yet. The random numbers of an answer depend on seed and key alone."""
    room = room_wanted(model, sampling)
    for batch in unanswered(cases, folder, batch_size):
        requests = []
        for case in batch:
            try:
                requests.append((case.key, *prompt_of(case, model, context, room)))
            except Unusable as error:
                write_answer(folder, case.key, [], str(error))
        if requests:
            keys, prompts, pictures = zip(*requests, strict=True)
            generators = [generator_of(seed, key) for key in keys]
            answers = answer(model, prompts, pictures, sampling, generators, pad=False)
            for key, segments in zip(keys, answers, strict=True):
                write_answer(folder, key, segments)


def generator_of(seed: int, key: str) -> torch.Generator:
    entropy = np.random.SeedSequence([seed, zlib.crc32(key.encode())]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy) >> 1)
