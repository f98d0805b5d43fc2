"""Wishes in wider English for SmolLM2's LoRA: the world's facts by other names, comparisons and descriptions.

The LoRA learns to use what SmolLM2 knows of such words. None of them is a word that a prompt of `knowledge.jsonl` needs
(tests/test_knowledge.py), and a wish that holds one by a typo is sampled again (`EXAM`).
"""

import re
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np

from common.files import read_json
from common.texts import words_in
from miniature.facts import Picture, chance, pick, sample_picture
from miniature.score import read_lines
from miniature.typos import typed
from miniature.wishes import enlarged, picture_for
from miniature.words import plural

VOCABULARY = read_json(Path(__file__).with_suffix(".json"))
KINDS = VOCABULARY["kinds"]  # names without an article; after "*" a description
COLOURS = VOCABULARY["colours"]  # what has such a colour
COLOUR_NAMES, SIZES, PLACES, SCENES, TIMES = (
    VOCABULARY[facts] for facts in ("colour_names", "sizes", "places", "scenes", "times")
)

NEEDED = read_lines(Path(__file__).with_name("knowledge.jsonl"), itemgetter("needs"))
EXAM = {word for words in NEEDED for word in words}  # no text for training may hold them
TYPOS = 0.25  # share of wishes with typos

SOUNDS = """ph>f ck>k ie>ei ei>ie ou>oo ff>f f>ff mm>m pp>p g>dg ee>e e>ee si>cy c>s o>e u>o c>k k>c ee>ea ea>ee tt>t
    ll>l nn>n rr>r ss>s l>ll s>ss n>nn t>tt a>e e>a i>y y>i er>or or>er gh> th>t sh>ch oo>u s>z z>s o>u qu>kw
    x>ks"""  # how a word sounds may also be written
LIKE = [  # behind a thing: what it has the colour of
    " the colour of {}", " the colour of {}", ", the colour of {}", ", colour of {}", ", coloured like {}",
    ", coloured like {}", " that looks like {}", " as {1} as {0}", " in the colour of {}", " with the colour of {}",
    ", same colour as {}", ". It has the colour of {}.", " in the shade of {}", " painted like {}",
]  # fmt: skip


def article(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' and not word.startswith('one') else 'a'} {word}"


def named(rng: np.random.Generator, kind: str, colour: str | None, size: str | None) -> str:
    """A thing in other words, with its colour and size, where they are given."""
    name, compared = pick(rng, KINDS[kind]), pick(rng, COLOURS[colour]) if colour else ""
    if name.startswith("*"):
        name = name[1:]
        joined = (", and it is" if name.startswith("it ") else ",") if colour or size else ""
        large = {"big": " huge", "small": " tiny", None: ""}[size]
        shade = f" {pick(rng, ('the colour of', 'coloured like'))} {compared}" if colour else ""
        return f"{name}{joined}{large}{' and' if large and shade else ''}{shade}"
    large = f"{pick(rng, SIZES[size])} " if size else ""
    how = rng.random() if colour else 1.0
    if how < 0.2:
        name = f"{colour if how < 0.12 else pick(rng, COLOUR_NAMES[colour])} {name}"
    elif how < 0.3:
        name = f"{re.sub('^(an?|the) ', '', compared)} {pick(rng, ('coloured', 'colored', 'coloured'))} {name}"
    thing = large + name if rng.random() < 0.1 else article(large + name)
    if not colour or how < 0.3:
        return thing
    return thing + pick(rng, LIKE).format(compared, colour)


def of_one_kind(rng: np.random.Generator, picture: Picture) -> str:
    """Two things of one kind in other words: alike in colour, which may be named, or each with its own."""
    kind, (first, second) = picture.things[0].kind, (thing.colour for thing in picture.things)
    name = plural(pick(rng, [name for name in KINDS[kind] if not name.startswith("*")]))
    pair = f"{pick(rng, ('two', 'a pair of', '2'))} "
    if first == second:
        return pair + (name if rng.random() < 0.5 else f"{pick(rng, COLOUR_NAMES[first])} {name}")
    first, second = (f"one the colour of {pick(rng, COLOURS[colour])}" for colour in (first, second))
    return f"{pair}{name}, {first} and {second}"


def misspelt(rng: np.random.Generator, text: str) -> str:
    """The text with about half of its longer words written as they sound."""
    words = text.split()
    for i in [i for i, word in enumerate(words) if len(word) > 4 and rng.random() < 0.5]:
        fitting = [pair for pair in (sound.split(">") for sound in SOUNDS.split()) if pair[0] in words[i][1:]]
        if fitting:
            old, new = pick(rng, fitting)
            words[i] = words[i][0] + words[i][1:].replace(old, new, 1)
    return " ".join(words)


def wide_wish(rng: np.random.Generator, split: str) -> tuple[str, Picture, Picture]:
    """A wish for one thing, or in a quarter for two; about a third of the facts beside the kinds are named. Returns the
    text, a picture, and the same picture with None for the facts that the text leaves open."""
    picture = sample_picture(rng, split, 2 if rng.random() < 0.25 else 1)
    if len(picture.things) == 2 and rng.random() < 0.25:  # two of one kind: alike, or of other colours or sizes
        differing, picture = pick(rng, ["", "", "colour1", "size1"]), None
        while picture is None:
            picture = picture_for(rng, split, "twins", {differing})
    told = [
        replace(t, colour=t.colour if chance(rng, 0.65) else None, size=t.size if chance(rng, 0.2) else None)
        for t in picture.things
    ]
    picture, things = enlarged(rng, picture, replace(picture, things=told)), []
    for i, thing in enumerate(told):
        text, told[i] = named(rng, thing.kind, thing.colour, thing.size), replace(thing, place=None)
        if rng.random() < 0.15:
            text, told[i] = f"{text} {pick(rng, PLACES[thing.place])}", thing
        things.append(text)
    if len({thing.kind for thing in picture.things}) < len(picture.things):
        things, told = [of_one_kind(rng, picture)], picture.things
    parts = [pick(rng, (" and ", " beside ", " next to ", ", ", " above ", " with ")).join(things)]
    scene, time = picture.scene if rng.random() < 0.5 else None, picture.time if rng.random() < 0.35 else None
    around = [pick(rng, SCENES[scene])] if scene else []
    around += [pick(rng, TIMES[time])] if time else []
    parts = around + parts if rng.random() < 0.15 else parts + around
    text = pick(rng, (" ", " ", ", ")).join(parts)
    before = pick(rng, ("", "", "", "", "draw ", "i would like ", "please paint ", "show me "))
    text = before + text
    text = typed(rng, misspelt(rng, text) if rng.random() < 0.25 else text, TYPOS)
    if EXAM & {*words_in(text.lower())}:
        return wide_wish(rng, split)
    return text, picture, Picture(scene, time, tuple(told))
