"""Stories and dialogues of the miniature world: turns of text, some with a picture, which stands there as its facts.

A story has four or five steps, each with its picture, all on one background. The first sentence names everything; later
ones tell what changes and often no more ("it drifts to the right."), so that only a reader who remembers can draw
the pictures. In a dialogue, human and assistant take turns: pictures are asked for, changed, shown and asked about, and
some talk calls for no picture.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from miniature import facts, words
from miniature.facts import KINDS, Picture, Thing, fits, pick, pick_other, pick_weighted, sample_picture, sample_thing
from miniature.phrases import CAPTIONS, choices, usual
from miniature.words import description, noun_phrase, plural
from prompts import Turn, pictures_of

NEXT_TIME = {"day": "sunset", "sunset": "night", "night": "day"}


# ---- changes: each takes (rng, picture) to (sentence without full stop, new picture), or None where it cannot be made


def hero_name(rng, picture: Picture, *fact_names: str) -> str:
    """The hero by its kind, with none, some or all of these facts before it; or, for the only thing, often "it"."""
    hero = picture.things[0]
    if len(picture.things) == 1 and rng.random() < 0.5:
        return "it"
    adjectives = [getattr(hero, name) for name in fact_names if rng.random() < 0.35]
    return " ".join(["the", *adjectives, hero.kind])


def change_hero(rng, picture: Picture, fact: str) -> tuple[str, Picture | None]:
    """Another value of one of the hero's facts, and the picture with it; None where that does not fit."""
    hero = picture.things[0]
    colours = facts.COLOURS_FOR[hero.kind, picture.scene]
    value = pick_other(rng, {"place": facts.PLACES, "size": facts.SIZES, "colour": colours}[fact], getattr(hero, fact))
    things = (replace(hero, **{fact: value}), *picture.things[1:])
    return value, replace(picture, things=things) if fits(things, picture.scene) else None


def move(rng, picture):
    kind, (place, after) = picture.things[0].kind, change_hero(rng, picture, "place")
    if kind not in CAPTIONS["moves"] or after is None:
        return None
    who, how = hero_name(rng, picture, "size", "colour"), usual(rng, CAPTIONS["moves"][kind])
    return f"{who} {how} {usual(rng, CAPTIONS['towards'][place])}", after


def resize(rng, picture):
    size, after = change_hero(rng, picture, "size")
    if after is None:
        return None
    form = usual(rng, CAPTIONS["resizes"][size])
    return form.format(hero_name(rng, picture, "colour"), usual(rng, words.SIZE_WORDS[size])), after


def recolour(rng, picture):
    colour, after = change_hero(rng, picture, "colour")
    form = usual(rng, CAPTIONS["turns colour"])
    return form.format(hero_name(rng, picture, "size"), usual(rng, words.COLOUR_WORDS[colour])), after


def newcomer(rng, picture) -> Thing | None:
    """Another kind of thing that fits in."""
    for _ in range(20):
        other = sample_thing(rng, picture.scene)
        if other.kind != picture.things[0].kind and fits((picture.things[0], other), picture.scene):
            return other
    return None


def meet(rng, picture):
    other = newcomer(rng, picture) if len(picture.things) == 1 else None
    if other is None:
        return None
    sentence = usual(rng, CAPTIONS["meets"]).format(
        hero=hero_name(rng, picture, "size", "colour"),
        other=noun_phrase(rng, other),
        place=usual(rng, words.PLACE_PHRASES[other.place]),
    )
    return sentence, replace(picture, things=(*picture.things, other))


def part(rng, picture):
    if len(picture.things) == 1:
        return None
    sentence = usual(rng, CAPTIONS["parts"]).format(picture.things[1].kind)
    if rng.random() < 0.4:
        sentence += f" and the {picture.things[0].kind} is alone again"
    return sentence, replace(picture, things=picture.things[:1])


def pass_time(rng, picture):
    time = NEXT_TIME[picture.time]
    after, sentence = replace(picture, time=time), usual(rng, CAPTIONS["dawns"][time])
    moved = move(rng, after) if rng.random() < 0.3 else None
    return (f"{sentence} and {moved[0]}", moved[1]) if moved else (sentence, after)


CHANGES = {move: 0.3, resize: 0.14, recolour: 0.16, meet: 0.16, part: 0.1, pass_time: 0.14}


def sample_distinct(rng: np.random.Generator, split: str) -> Picture:
    """A picture of one thing, or of two of different kinds: "the boat" is then clear."""
    while True:
        picture = sample_picture(rng, split, 1 if rng.random() < 0.75 else 2)
        if len({thing.kind for thing in picture.things}) == len(picture.things):
            return picture


def story(rng: np.random.Generator, split: str = "train") -> list[Turn]:
    """Four or five steps; each after the first makes one change. A picture's first thing is the hero."""
    picture = sample_distinct(rng, split)
    opening = usual(rng, "{} | once upon a time there was {} | this is the story of {} | one fine time there was {}")
    turns = [Turn(opening.format(description(picture, rng, True, True)) + ".", (picture,))]
    last, length = None, 4 + int(rng.integers(2))
    while len(turns) < length:
        change = pick_weighted(rng, CHANGES)
        result = change(rng, picture) if change is not last or change is move else None
        if result is not None:
            last, (sentence, picture) = change, result
            turns.append(Turn(sentence + ".", (picture,)))
    return turns


# ---- dialogues

SMALL_TALK = {*CAPTIONS["talk"]}
SMALL_TALK |= {form.format(plural(kind)) for form in choices(CAPTIONS["asks about"]) for kind in KINDS}


def request(rng, split, picture):
    """The human asks for a new picture and gets it."""
    picture = sample_distinct(rng, split)
    wish = description(picture, rng, rng.random() < 0.7, rng.random() < 0.5)
    echo = noun_phrase(rng, picture.things[0]) if len(picture.things) == 1 else "your picture"
    return Turn(usual(rng, CAPTIONS["asks"]).format(wish)), Turn(usual(rng, CAPTIONS["gives"]).format(echo), (picture,))


def show(rng, split, picture):
    """The human shows a picture, and the assistant describes it."""
    picture = sample_distinct(rng, split)
    content = description(picture, rng, rng.random() < 0.7, rng.random() < 0.5)
    return Turn(usual(rng, CAPTIONS["shows"]), (picture,)), Turn(usual(rng, CAPTIONS["sees"]).format(content))


def alter(rng, split, picture):
    """The human asks for the picture with one change."""
    result = None
    while result is None or result[1] is None:
        result = pick(rng, (wish_move, wish_size, wish_colour, wish_time, wish_more, wish_less))(rng, picture)
    form = usual(rng, "{} please. | please {}. | can you {}? | now {}. | could you {}?")
    return Turn(form.format(result[0])), Turn(usual(rng, CAPTIONS["more"]), (result[1],))


def it_or_name(picture) -> str:
    return "it" if len(picture.things) == 1 else f"the {picture.things[0].kind}"


def wish_move(rng, picture):
    place, after = change_hero(rng, picture, "place")
    return f"move {it_or_name(picture)} {usual(rng, CAPTIONS['towards'][place])}", after


def wish_size(rng, picture):
    size, after = change_hero(rng, picture, "size")
    word = usual(rng, f"{words.SIZE_WORDS[size]} | {'bigger' if size == 'big' else 'smaller'}")
    return f"make {it_or_name(picture)} {word}", after


def wish_colour(rng, picture):
    colour, after = change_hero(rng, picture, "colour")
    form = usual(rng, "make {} {} | paint {} {} | colour {} {}")
    return form.format(it_or_name(picture), usual(rng, words.COLOUR_WORDS[colour])), after


def wish_time(rng, picture):
    time = pick_other(rng, NEXT_TIME, picture.time)
    word = {"day": "day", "sunset": "evening", "night": "night"}[time]
    return usual(rng, "make it {} | turn it into {} | let it be {}").format(word), replace(picture, time=time)


def wish_more(rng, picture):
    other = newcomer(rng, picture) if len(picture.things) == 1 else None
    if other is None:
        return None
    wish = f"add {noun_phrase(rng, other)} {usual(rng, words.PLACE_PHRASES[other.place])}"
    return wish, replace(picture, things=(*picture.things, other))


def wish_less(rng, picture):
    if len(picture.things) == 1:
        return None
    return f"take the {picture.things[1].kind} away", replace(picture, things=picture.things[:1])


def questions(picture: Picture, thing: Thing, noun: str, absent: str, phrase: Callable[[str], str]) -> list[tuple]:
    """Pairs of a question, in one or two forms, and its answer. `noun` names `thing`; `phrase` picks one of "a | b"."""
    kinds = [thing.kind for thing in picture.things]
    count = "there is one thing, the" if len(kinds) == 1 else "there are two things, the"
    return [
        (f"what colour is the {noun}? | which colour has the {noun}?", f"it is {thing.colour}."),
        (f"where is the {noun}?", f"it is {phrase(words.PLACE_PHRASES[thing.place])}."),
        (f"is the {noun} big or small? | how big is the {noun}?", f"it is {thing.size}."),
        ("what time is it there? | is it day or night?", f"{phrase(words.TIME_CLAUSES[picture.time])}."),
        ("which place is this? | where is this?", f"this is {phrase(words.SCENE_NOUNS[picture.scene])}."),
        ("how many things are there?", f"{count} {' and the '.join(kinds)}."),
        (f"is there a {absent} too?", f"no, there is no {absent}."),
        (f"do you see the {noun}?", f"yes, it is {phrase(words.PLACE_PHRASES[thing.place])}."),
    ]


def question(rng, split, picture):
    """A question about the picture, answered in words."""
    thing, kinds = pick(rng, picture.things), [thing.kind for thing in picture.things]
    noun, absent = usual(rng, words.NOUNS[thing.kind]), pick_other(rng, KINDS, *kinds)
    forms, answer = pick(rng, questions(picture, thing, noun, absent, partial(usual, rng)))
    return Turn(choices(forms)[0]), Turn(answer)


def praise(rng, split, picture):
    return tuple(map(Turn, pick(rng, list(CAPTIONS["likes"].items()))))


def talk(rng, split, picture):
    """Plain words: small talk, or something about a kind of thing."""
    return tuple(map(Turn, pick(rng, list(CAPTIONS["talk"].items())) if rng.random() < 0.5 else talk_about(rng)))


def talk_about(rng) -> tuple[str, str]:
    kind = pick(rng, list(KINDS))
    return usual(rng, CAPTIONS["asks about"]).format(plural(kind)), usual(rng, CAPTIONS["about"][kind])


OPENINGS = {request: 0.5, show: 0.2, talk: 0.3}
SEQUELS = {alter: 0.4, question: 0.22, praise: 0.18, request: 0.1, talk: 0.1}  # once there is a picture


def dialogue(rng: np.random.Generator, split: str = "train") -> list[Turn]:
    """Two to four exchanges: human at even places, assistant at odd ones."""
    turns: list[Turn] = []
    picture = None
    for _ in range(2 + int(rng.integers(3))):
        exchange = pick_weighted(rng, OPENINGS if picture is None else SEQUELS)(rng, split, picture)
        turns += exchange
        picture = next(iter(pictures_of(exchange)), picture)
    return turns
