"""The part "stories" of `score.py`: whether a story goes on as it should, and what its history is good for.

The model gives a step of a held-out story in each of stage 2's three tasks (`prompts.py`), with no history, with the
history's texts, and with its texts and pictures:

    image         the text is given: each fact of the picture must be right, as text and history together tell it
    text          the picture is given: the text is "true" of it; it "tells the change" if it is also untrue of the
                  picture before; it "goes on" if it also repeats nothing that was there before (`tells_again`)
    text+image    nothing is given: the text is true of the picture, which keeps scene, hero and hero's colour

Then the model tells four steps by itself from the first sentence on, and reads its own pictures: the figures say how
often scene, hero and colour are kept. Where a text gives the hero another colour, that colour is to be kept.
"""

import re
from typing import NamedTuple

from evaluation.cases import CONTEXTS as HISTORIES
from miniature.exam import Answer, Exam, Figures, ask, draw_turns, means, picture_facts
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
    expected: Picture  # facts of its own picture


def story_steps(exam: Exam) -> list[Step]:
    """One step of each story, any but its first."""
    steps = []
    for i in range(exam.n):
        story, jitter = sample_story(exam.seed, i, "held-out")
        k = int(random_stream(exam.seed, i, CHOICE).integers(1, len(story)))
        *before, turn = draw_turns(story[: k + 1], jitter)
        steps.append(Step(before, turn, *pictures_of(story[k - 1 : k + 1])))
    return steps


# ---- what a text tells


def true_of(text: str, picture: Picture) -> bool:
    """Whether a sentence says something of a picture and all of it is true. A thing that leaves must be gone."""
    text = text.lower()
    departure = LEAVES.search(text)
    if departure:
        absent = {thing.kind for thing in facts_in(departure[0]).things}
        if absent & {thing.kind for thing in picture.things}:
            return False
        text = text.replace(departure[0], "")
    facts = facts_in(text)
    return bool(departure or facts.scene or facts.time or facts.things) and agrees(facts, picture)


def tells_again(text: str, before: Picture) -> bool:
    """Whether a sentence tells what the story has told before: the scene, which no story leaves, the time where it
    is the same, or that there is "a boat" where there was one."""
    text = text.lower()
    facts = facts_in(text)
    kinds = "|".join(noun for thing in before.things for noun in choices(NOUNS[thing.kind]))
    again = re.search(rf"\ban? (?:(?!the\b)\w+ )*?(?:{kinds})\b", text)
    return bool(facts.scene or again) or (facts.time is not None and facts.time == before.time)


def hero_colour(text: str, colour: str) -> str:
    """The colour of the hero after a sentence; `colour` is the one before it."""
    change = RECOLOURED.search(text.lower())
    return facts_in(change[1]).things[0].colour if change else colour


def kept_facts(picture: Picture, story: Picture, colour: str) -> dict[str, bool]:
    """Whether a picture keeps scene and hero (the first thing) of a story's picture; the hero should have `colour`."""
    kind = story.things[0].kind
    coloured = any((thing.kind, thing.colour) == (kind, colour) for thing in picture.things)
    facts = {"scene": picture.scene == story.scene, "kind": any(thing.kind == kind for thing in picture.things)}
    return facts | {"colour": coloured, "all": facts["scene"] and coloured}


# ---- figures


def image_figures(exam: Exam, answers: list[Answer], steps: list[Step]) -> dict[str, float]:
    return right_shares(picture_facts(exam, [a.picture for a in answers]), [step.expected for step in steps])


def text_figures(exam: Exam, answers: list[Answer], steps: list[Step]) -> dict[str, float]:
    rows = []
    for answer, step in zip(answers, steps, strict=True):
        true = true_of(answer.text, step.expected)
        change = true and not true_of(answer.text, step.last)
        goes_on = change and not tells_again(answer.text, step.last)
        rows.append({"true": true, "tells the change": change, "goes on": goes_on})
    return means(rows)


def mixed_figures(exam: Exam, answers: list[Answer], steps: list[Step]) -> dict[str, float]:
    rows, pictures = [], picture_facts(exam, [answer.picture for answer in answers])
    for answer, step, picture in zip(answers, steps, pictures, strict=True):
        true = true_of(answer.text, picture)
        keeps = kept_facts(picture, step.last, hero_colour(answer.text, step.last.things[0].colour))["all"]
        rows.append({"text true": true, "picture keeps": keeps, "both": true and keeps})
    return means(rows)


FIGURES = {"image": image_figures, "text+image": mixed_figures, "text": text_figures}


def own_story_figures(exam: Exam) -> Figures:
    """Stories as `sample.py --turns` tells them: a picture for the first sentence, then step after step."""
    firsts = [sample_story(exam.seed, i, "held-out")[0][0] for i in range(exam.n)]
    colours = [first.pictures[0].things[0].colour for first in firsts]
    tales, figures = [[] for _ in firsts], {}
    for step in range(1, OWN_STEPS + 1):
        request = STORY_REQUESTS["image" if step == 1 else "text+image"][0]  # the second has no {} to fill
        requests = [request.format(first.text) for first in firsts]
        sources = [story_source(tale, text, exam.system) for tale, text in zip(tales, requests, strict=True)]
        answers = ask(exam, sources, [pictures_of(tale) for tale in tales])
        facts, rows = picture_facts(exam, [answer.picture for answer in answers]), []
        for i, (first, tale, answer) in enumerate(zip(firsts, tales, answers, strict=True)):
            text = first.text if step == 1 else answer.text
            tale.append(model_turn(exam.model.tokenizer, text, (answer.picture,) if answer.picture else ()))
            colours[i] = hero_colour(text, colours[i])
            rows.append({"drawn": answer.picture is not None} | kept_facts(facts[i], first.pictures[0], colours[i]))
        figures[f"own story, step {step}, kept"] = means(rows)
    return figures


def stories(exam: Exam) -> Figures:
    steps, figures = story_steps(exam), {}
    for task, figures_of in FIGURES.items():
        for context, history in CONTEXTS.items():
            examples = [story_example(history(step.before), step.turn, task, 0, "", exam.system) for step in steps]
            answers = ask(exam, [example.source for example in examples], [example.inputs for example in examples])
            figures[f"{task}, {context}"] = figures_of(exam, answers, steps)
    return figures | own_story_figures(exam)
