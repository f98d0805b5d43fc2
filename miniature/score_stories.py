"""The part "stories" of `score.py`: whether a story goes on as it should, and what its history is good for.

A step of a held-out story is asked for as in stage 2's three tasks (`prompts.py`), each with no history, with its texts
and with its texts and pictures:

    image         the text is given: every fact of the picture that follows from it and from the history
    text          the picture is given: the text is true of it; it tells the change if not true of the picture before;
                  it goes on if, too, it tells nothing again that was there before (`tells_again`)
    text+image    nothing is given: the text is true of the picture, which keeps scene, hero and hero's colour

Then from its first sentence on, the model tells four steps by itself, reading its own pictures again: what is left of
scene, hero and colour. Where a text says that the hero takes another colour, that is the one to be kept.
"""

import re
from typing import NamedTuple

from evaluation.cases import CONTEXTS as HISTORIES
from miniature.exam import Exam, Figures, Said, ask, heard, look, means
from miniature.facts import Picture, random_stream
from miniature.judge import right_shares
from miniature.phrases import CAPTIONS, choices
from miniature.words import COLOUR_WORDS, NOUNS, agrees, facts_in
from miniature.world import sample_story
from prompts import STORY_REQUESTS, Turn, model_turn, pictures_of, story_example, story_source

CHOICE = 402  # purpose of the random streams
CONTEXTS = {"no history": HISTORIES["none"], "its texts": HISTORIES["texts"], "texts and pictures": HISTORIES["both"]}
OWN_STEPS = 4

PARTINGS = choices(CAPTIONS["parts"])
LEAVES = re.compile("|".join(phrase.replace("{}", r"(?:(?!the\b)\w+ ){0,3}?\w+") for phrase in PARTINGS))
COLOUR = "|".join(sorted((word for words in COLOUR_WORDS.values() for word in choices(words)), key=len, reverse=True))
RECOLOURED = re.compile(rf"\b(?:turns|becomes|is|makes (?:it|the(?: \w+)? \w+)) ({COLOUR})\b")


class Step(NamedTuple):
    before: list[Turn]  # the steps before, with their pictures
    turn: Turn
    last: Picture  # facts of the picture before
    wanted: Picture  # facts of its own picture


def story_steps(exam: Exam) -> list[Step]:
    """One step of each story, any but its first."""
    steps = []
    for i in range(exam.n):
        told, jitter = sample_story(exam.seed, i, "held-out")
        k = int(random_stream(exam.seed, i, CHOICE).integers(1, len(told)))
        *before, turn = heard(told[: k + 1], jitter)
        steps.append(Step(before, turn, *pictures_of(told[k - 1 : k + 1])))
    return steps


# ---- what a text tells


def true_of(text: str, picture: Picture) -> bool:
    """Whether a sentence says something of a picture and all of it is true. A thing that leaves must be gone."""
    text = text.lower()
    left = LEAVES.search(text)
    if left:
        gone = {thing.kind for thing in facts_in(left[0]).things}
        if gone & {thing.kind for thing in picture.things}:
            return False
        text = text.replace(left[0], "")
    told = facts_in(text)
    return bool(left or told.scene or told.time or told.things) and agrees(told, picture)


def tells_again(text: str, before: Picture) -> bool:
    """Whether a sentence tells what the story has told before: the scene, which no story leaves, the time where it
    is the same, or that there is "a boat" where there was one."""
    text = text.lower()
    told = facts_in(text)
    kinds = "|".join(noun for thing in before.things for noun in choices(NOUNS[thing.kind]))
    again = re.search(rf"\ban? (?:(?!the\b)\w+ )*?(?:{kinds})\b", text)
    return bool(told.scene or again) or (told.time is not None and told.time == before.time)


def hero_colour(text: str, colour: str) -> str:
    """The colour that the hero has after a sentence, before which it had `colour`."""
    change = RECOLOURED.search(text.lower())
    return facts_in(change[1]).things[0].colour if change else colour


def kept(seen: Picture, story: Picture, colour: str) -> dict[str, bool]:
    """What a picture keeps of a story: its scene, its hero (the first thing), which should have this colour."""
    kind = story.things[0].kind
    coloured = any((thing.kind, thing.colour) == (kind, colour) for thing in seen.things)
    there = {"scene": seen.scene == story.scene, "kind": any(thing.kind == kind for thing in seen.things)}
    return there | {"colour": coloured, "all": there["scene"] and coloured}


# ---- figures


def image_figures(exam: Exam, said: list[Said], steps: list[Step]) -> dict[str, float]:
    return right_shares(look(exam, [answer.picture for answer in said]), [step.wanted for step in steps])


def text_figures(exam: Exam, said: list[Said], steps: list[Step]) -> dict[str, float]:
    rows = []
    for answer, step in zip(said, steps, strict=True):
        true = true_of(answer.text, step.wanted)
        change = true and not true_of(answer.text, step.last)
        goes_on = change and not tells_again(answer.text, step.last)
        rows.append({"true": true, "tells the change": change, "goes on": goes_on})
    return means(rows)


def mixed_figures(exam: Exam, said: list[Said], steps: list[Step]) -> dict[str, float]:
    rows = []
    for answer, step, seen in zip(said, steps, look(exam, [answer.picture for answer in said]), strict=True):
        true = true_of(answer.text, seen)
        keeps = kept(seen, step.last, hero_colour(answer.text, step.last.things[0].colour))["all"]
        rows.append({"text true": true, "picture keeps": keeps, "both": true and keeps})
    return means(rows)


FIGURES = {"image": image_figures, "text+image": mixed_figures, "text": text_figures}


def own_story_figures(exam: Exam) -> Figures:
    """Told as `sample.py --turns` does: a picture for the first sentence, then step after step."""
    firsts = [sample_story(exam.seed, i, "held-out")[0][0] for i in range(exam.n)]
    colours = [first.pictures[0].things[0].colour for first in firsts]
    tales, figures = [[] for _ in firsts], {}
    for step in range(1, OWN_STEPS + 1):
        request = STORY_REQUESTS["image" if step == 1 else "text+image"][0]  # of which the second has no {}
        requests = [request.format(first.text) for first in firsts]
        sources = [story_source(*told, exam.system) for told in zip(tales, requests, strict=True)]
        said = ask(exam, sources, [pictures_of(tale) for tale in tales])
        seen, rows = look(exam, [answer.picture for answer in said]), []
        for i, (first, tale, answer) in enumerate(zip(firsts, tales, said, strict=True)):
            text = first.text if step == 1 else answer.text
            tale.append(model_turn(exam.model.tokenizer, text, (answer.picture,) if answer.picture else ()))
            colours[i] = hero_colour(text, colours[i])
            rows.append({"drawn": answer.picture is not None} | kept(seen[i], first.pictures[0], colours[i]))
        figures[f"own story, step {step}, kept"] = means(rows)
    return figures


def stories(exam: Exam) -> Figures:
    steps, figures = story_steps(exam), {}
    for task, figures_of in FIGURES.items():
        for context, history in CONTEXTS.items():
            rows = [story_example(history(step.before), step.turn, task, 0, "", exam.system) for step in steps]
            said = ask(exam, [row.source for row in rows], [row.inputs for row in rows])
            figures[f"{task}, {context}"] = figures_of(exam, said, steps)
    return figures | own_story_figures(exam)
