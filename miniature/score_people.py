"""The part "people" of `score.py`: prompts and chats as people write them, with the facts that a right picture has.

    prompts  {"prompt", "scene", "time", "things": [{"kind", "colour", "size", "place"}, ...]} a line
    chats    {"turns": [{"say", "picture": true, "scene", "time", "things"} or {"say", "picture": false}, ...]} a line

A fact that is null is left open: anything is right. The number of things is never open. Other fields of a line are
ignored. A turn that calls for words is right if no picture comes. Everything is asked as `sample.py` would with its
defaults, once with each seed; a chat goes on from what the model said and drew itself.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import suited_options
from generation import Sampling
from miniature.exam import Exam, Figures, Said, ask, draw_prompts, look
from miniature.facts import Picture
from miniature.judge import right, share
from prompts import chat_history, dialog_source, model_turn, pictures_of, user_turn

FOLDER = Path(__file__).parent / "people"
PROMPTS, CHATS = FOLDER / "prompts.jsonl", FOLDER / "chats.jsonl"


class Wish(NamedTuple):
    """What is typed, and what a right picture shows; None: words are called for."""

    text: str
    wanted: Picture | None


def read_lines(path: Path, read: Callable[[dict], Any]) -> list:
    """`read` of each object of a JSONL file. ValueError that names the line where it finds something else."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found += [read(json.loads(line))] if line.strip() else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not in the form of {FOLDER} ({error!r})") from None
    return found


def wish_of(entry: dict, text_name: str = "say") -> Wish:
    return Wish(str(entry[text_name]), Picture.from_label(entry) if entry.get("picture", True) else None)


def read_prompts(path: Path) -> list[Wish]:
    return read_lines(path, partial(wish_of, text_name="prompt"))


def read_chats(path: Path) -> list[list[Wish]]:
    return read_lines(path, lambda entry: [wish_of(turn) for turn in entry["turns"]])


def sampling_of_sample(weights: Path) -> Sampling:
    """The defaults of sample.py with these weights."""
    return Sampling.of(suited_options(weights, "sample"))


# ---- answers


def hold_chats(exam: Exam, chats: list[list[Wish]]) -> list[list[Said]]:
    """All chats side by side, turn after turn."""
    tokenizer, words_first = exam.model.tokenizer, exam.sampling.words_first
    turns, answers = [[] for _ in chats], [[] for _ in chats]
    for number in range(max(map(len, chats), default=0)):
        active = [i for i, chat in enumerate(chats) if number < len(chat)]
        for i in active:
            turns[i].append(user_turn(tokenizer, chats[i][number].text, exam.words))
        k = 2 * number + 1
        heard = [chat_history(turns[i], k, words_first) for i in active]
        sources = [dialog_source(before, k, exam.system) for before in heard]
        for i, said in zip(active, ask(exam, sources, [pictures_of(before) for before in heard]), strict=True):
            turns[i].append(model_turn(tokenizer, said.text, (said.picture,) if said.picture else ()))
            answers[i].append(said)
    return answers


# ---- figures


def verdicts(exam: Exam, wishes: list[Wish], said: list[Said]) -> list[bool]:
    """Whether each answer is all right; what is wrong is printed."""
    found = []
    for wish, answer, seen in zip(wishes, said, look(exam, [answer.picture for answer in said]), strict=True):
        if wish.wanted is None:
            fine, seen_text = answer.picture is None, "a picture came"
        else:
            facts = right(seen, wish.wanted)
            fine = facts["all"] and answer.picture is not None
            seen_text = "wrong " + ", ".join(name for name, value in facts.items() if not value and name != "all")
        found.append(fine)
        if not fine:
            told = answer.picture.info.get("description", "") if answer.picture else f"no picture: {answer.text}"
            print(f"  seed {exam.seed}: {wish.text!r}: {seen_text} ({told})")
    return found


def people(exam: Exam, prompts: Path, chats: Path, seeds: list[int]) -> Figures:
    """Shares that are all right, and of how many. A chat's turn counts like any other, whatever came before it."""
    exam = replace(exam, sampling=sampling_of_sample(exam.weights))
    wishes, talks, drawn, turns = read_prompts(prompts), read_chats(chats), [], []
    flat = [wish for chat in talks for wish in chat]
    for seed in seeds:
        exam = replace(exam, seed=seed)
        said = draw_prompts(exam, [wish.text for wish in wishes])
        drawn += zip(wishes, verdicts(exam, wishes, said), strict=True)
        exam.sheet(f"people {seed}", [wish.text for wish in wishes], [answer.picture for answer in said])
        answers = [answer for chat in hold_chats(exam, talks) for answer in chat]
        turns += zip(flat, verdicts(exam, flat, answers), strict=True)
    rows = {"prompts": [fine for _, fine in drawn]}
    for name, count in (("one thing", 1), ("two things", 2)):
        rows[name] = [fine for wish, fine in drawn if wish.wanted and len(wish.wanted.things) == count]
    rows["chat turns"] = [fine for _, fine in turns]
    rows["of them pictures"] = [fine for wish, fine in turns if wish.wanted]
    return {f"{name}, {len(values)}": {"all right": share(values)} for name, values in rows.items() if values}
