"""Texts about a picture: captions in many phrasings, and the reader that finds the facts in a text.

Captions are written as cleaned CC3M captions are: lower case, no full stops. Every caption names the scene and
all colours. It names the places of all things or of none (`PLACE_NAMED`), and likewise the sizes (`SIZE_NAMED`; but the
form "a boat that is small and red" always names them). It always names sunset and night, and day half of the time
(`DAY_NAMED`): where no time is named, it is day.
"""

import re
from dataclasses import replace
from itertools import permutations

import numpy as np

from miniature.facts import COLOURS, PLACES, SIZES, TIMES, Picture, Thing, home, pick_weighted
from miniature.phrases import CAPTIONS, choices, usual, with_article

PLACE_NAMED = 0.7
SIZE_NAMED = 0.85  # below 1, so that the models learn from captions without sizes, too ("a red boat at sea")
DAY_NAMED = 0.5
NOUNS, COLOUR_WORDS, SIZE_WORDS = CAPTIONS["nouns"], CAPTIONS["colours"], CAPTIONS["sizes"]
PLACE_PHRASES, SCENE_NOUNS = CAPTIONS["places"], CAPTIONS["scene nouns"]
TIME_PHRASES, TIME_CLAUSES = CAPTIONS["times"], CAPTIONS["clauses"]


# ---- words and phrases


def plural(noun: str) -> str:
    if noun.endswith("fish"):
        return noun
    if noun.endswith(("ch", "s")):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def adjectives(rng, thing: Thing, sized: bool) -> str:
    colour = usual(rng, COLOUR_WORDS[thing.colour])
    return f"{usual(rng, SIZE_WORDS[thing.size])} {colour}" if sized else colour


def noun_phrase(rng, thing: Thing, sized: bool = True) -> str:
    """ "a small red boat"; now and then "a boat that is small and red"."""
    noun = usual(rng, NOUNS[thing.kind])
    if rng.random() < 0.06:
        size, colour = usual(rng, SIZE_WORDS[thing.size]), usual(rng, COLOUR_WORDS[thing.colour])
        return f"{with_article(noun)} that is {size} and {colour}"
    return with_article(f"{adjectives(rng, thing, sized)} {noun}")


def home_level(picture: Picture) -> str:
    """The level that all things share, "land", "water" or "sky"; "" if they differ."""
    levels = {home(thing.kind, picture.scene) for thing in picture.things}
    return levels.pop() if len(levels) == 1 else ""


def scene_phrase(rng, picture: Picture) -> str:
    """ "on the sea", "above the meadow", by where the things are; a fish is in the water, not on it."""
    phrase = usual(rng, CAPTIONS["scenes"][f"{picture.scene} {home_level(picture)}".rstrip()])
    if picture.things and all(thing.kind == "fish" for thing in picture.things):
        phrase = re.sub(r"^on\b", "in", phrase)
    return phrase


def twins(picture: Picture) -> bool:
    return len({(t.kind, t.colour, t.size) for t in picture.things}) < len(picture.things)


def subject(rng, picture: Picture, placed: bool, sized: bool = True) -> tuple[str, str]:
    """The things of a picture as (phrase, trailing places): ("a red ball", "on the left"), ("a red ball and ...", "").

    Two things carry their places inside the phrase; twins are named once and placed one by one.
    """
    things = list(picture.things)
    places = [usual(rng, PLACE_PHRASES[thing.place]) for thing in things]
    if len(things) == 1:
        return noun_phrase(rng, things[0], sized), places[0] if placed else ""
    if twins(picture):
        phrase = f"two {adjectives(rng, things[0], sized)} {plural(usual(rng, NOUNS[things[0].kind]))}"
        return phrase, f"one {places[0]} and one {places[1]}" if placed else ""
    parts = [f"{noun_phrase(rng, t, sized)} {p * placed}".strip() for t, p in zip(things, places, strict=True)]
    if rng.random() < 0.4:
        parts.reverse()
    return usual(rng, "{} and {} | {} with {} | {} together with {} | {} beside {} | {} and also {}").format(*parts), ""


def tidy(text: str) -> str:
    return " ".join(text.split())


def description(picture: Picture, rng: np.random.Generator, placed: bool, dated: bool) -> str:
    """The plainest form of a caption: things, places, scene, time."""
    what, where = subject(rng, picture, placed)
    when = usual(rng, TIME_PHRASES[picture.time]) if dated or picture.time != "day" else ""
    return tidy(f"{what} {where} {scene_phrase(rng, picture)} {when}")


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """One description of the picture, in any of the phrasings."""
    placed, sized = rng.random() < PLACE_NAMED, rng.random() < SIZE_NAMED
    dated = picture.time != "day" or rng.random() < DAY_NAMED
    what, where = subject(rng, picture, placed, sized)
    scene = scene_phrase(rng, picture)
    when = usual(rng, TIME_PHRASES[picture.time]) if dated else ""
    alone, same = len(picture.things) == 1, twins(picture)
    verbs = CAPTIONS["verbs"][picture.things[0].kind]  # base, third person, participle
    sections = {
        "forms": True,
        "forms of one or twins": alone or same,
        "forms with a time": dated,
        "forms of one with a place": alone and placed,
        "forms of two with places": placed and not (alone or same),
    }
    forms = {form: float(w) for section, fit in sections.items() if fit for form, w in CAPTIONS[section].items()}
    first, second = picture.things[0], picture.things[-1]
    return tidy(
        pick_weighted(rng, forms).format(
            what=what,
            where=where,
            scene=scene,
            when=when,
            there="there are" if same else "there is",
            art=with_article(usual(rng, CAPTIONS["pictures"])),
            ground=usual(rng, SCENE_NOUNS[picture.scene]),
            does=usual(rng, verbs).split()[1 if alone else 0],
            doing=usual(rng, verbs).split()[2],
            clause=usual(rng, TIME_CLAUSES[picture.time]),
            inverse=f"{usual(rng, PLACE_PHRASES[first.place])} is {noun_phrase(rng, first, sized)} and "
            f"{usual(rng, PLACE_PHRASES[second.place])} is {noun_phrase(rng, second, sized)}",
        )
    )


# ---- the reader


def build_lexicon() -> dict[str, tuple]:
    """Word or phrase -> the (fact, value) that it names; a noun -> ("kind", kind, number of things)."""
    lexicon = {}
    for name, words in CAPTIONS["signs"].items():
        lexicon |= dict.fromkeys(choices(words), ("time" if name in TIMES else "scene", name))
    for kind, nouns in NOUNS.items():
        for noun in choices(nouns):
            lexicon |= {plural(noun): ("kind", kind, 2), noun: ("kind", kind, 1)}
    lexicon |= {word: ("size", size) for size in SIZES for word in choices(SIZE_WORDS[size])}
    lexicon |= {word: ("colour", colour) for colour in COLOURS for word in (*choices(COLOUR_WORDS[colour]), colour)}
    lexicon |= {word: ("place", place) for place in PLACES for word in (place, *choices(PLACE_PHRASES[place]))}
    lexicon |= dict.fromkeys(("centre", "center"), ("place", "middle"))
    return lexicon | {"that is": ("after", True), "two": ("two", True)}


LEXICON = build_lexicon()
READER = re.compile(r"\b(" + "|".join(re.escape(w) for w in sorted(LEXICON, key=len, reverse=True)) + r")\b")


def facts_in(text: str) -> Picture:
    """The facts that a text names, in its order; None for what it leaves out.

    A place belongs to the thing before it, unless that has one already: then to the next ("on the left is ...").
    Adjectives belong to the thing after them, or to the last one if none follows. In a text without any thing ("it
    drifts to the right") place and adjectives make a thing of kind None.
    """
    scene = time = None
    things: list[dict] = []
    current: list[dict] = []  # the things named last: two for a plural
    pending: dict = {}
    after = False  # "... that is": adjectives now belong to the thing before them
    for match in READER.finditer(text.lower()):
        fact, value, *count = LEXICON[match[0]]
        if fact == "scene":
            scene = scene or value
        elif fact == "time":
            time = time or value
        elif fact == "after":
            after = True
        elif fact == "kind":
            number = 2 if pending.pop("two", False) else count[0]
            current = [{"kind": value, **pending} for _ in range(number)]
            things, pending, after = things + current, {}, False
        elif fact == "place":
            free = next((thing for thing in current if "place" not in thing), None)
            (pending if free is None else free).setdefault("place", value)
        elif after and current and fact not in current[-1]:
            current[-1][fact] = value
        else:
            pending.setdefault(fact, value)
    pending.pop("two", None)
    if pending and not things:
        things = [{"kind": None, **pending}]
    elif pending:  # "the cat is red"
        current[-1] = pending | current[-1]
        things[-1] = current[-1]
    return Picture(scene, time, tuple(Thing(**thing) for thing in things))


def agrees(named: Picture, picture: Picture) -> bool:
    """Whether all facts that a text names (`facts_in`) are true of the picture, each named thing of another thing."""
    orders = permutations(picture.things, len(named.things))  # empty if the text names more things than there are
    right = named.scene in (None, picture.scene) and named.time in (None, picture.time)
    return right and any(all(map(Thing.is_true_of, named.things, things)) for things in orders)


# ---- words first


def describe(picture: Picture) -> str:
    """The one form in which the language model puts a picture into words before it draws, with every fact: "a boat that
    is small and red on the left and a star that is big and white on the right at sea by day".

    The things stand in the order in which they were named, so that the model can copy a wish word after word.
    The kind comes before its size and colour, so that the model knows whose colour it writes after "make the star
    blue".
    """
    parts = [f"a {t.kind} that is {t.size} and {t.colour} {choices(PLACE_PHRASES[t.place])[0]}" for t in picture.things]
    scene = "at sea" if picture.scene == "sea" else f"in the {picture.scene}"
    return f"{' and '.join(parts)} {scene} {'by' if picture.time == 'day' else 'at'} {picture.time}"


def as_named(picture: Picture, text: str) -> Picture:
    """The picture with its things in the order in which a caption names them."""
    named, swapped = facts_in(text).things, replace(picture, things=picture.things[::-1])
    fitting = [p for p in (picture, swapped) if len(named) == 2 and all(map(Thing.is_true_of, named, p.things))]
    return fitting[0] if fitting else picture


def from_left(picture: Picture) -> Picture:
    """The picture with its things from left to right, the order for a picture that somebody shows."""
    return replace(picture, things=tuple(sorted(picture.things, key=lambda thing: PLACES.index(thing.place))))
