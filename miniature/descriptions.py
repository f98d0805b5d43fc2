"""A picture in words, in one way only and with every fact: what the language model says before it draws.

    "a boat that is small and red on the left and a star that is big and white on the right at sea by day"

The things stand in the order in which they were named, so that who reads a wish can put it down word after word. The
kind comes before its size and colour: who is told "make the star blue" and writes the colour then knows whose it is.
"""

from dataclasses import replace

from miniature.facts import PLACES, Picture, Thing
from miniature.words import PLACE_PHRASES, choices, facts_in

SCENE_PLACES = {
    "sea": "at sea",
    "meadow": "in the meadow",
    "snow": "in the snow",
    "city": "in the city",
    "desert": "in the desert",
    "mountains": "in the mountains",
}
TIMES_OF_DAY = {"day": "by day", "sunset": "at sunset", "night": "at night"}


def describe(picture: Picture) -> str:
    """Every fact of the picture, its things in their order: "a boat that is small and red ... at sea by day"."""
    named = [f"a {t.kind} that is {t.size} and {t.colour} {choices(PLACE_PHRASES[t.place])[0]}" for t in picture.things]
    return f"{' and '.join(named)} {SCENE_PLACES[picture.scene]} {TIMES_OF_DAY[picture.time]}"


def as_named(picture: Picture, text: str) -> Picture:
    """The picture with its things in the order in which a caption names them."""
    named, turned = facts_in(text).things, replace(picture, things=picture.things[::-1])
    is_turned = len(named) == 2 and not fits_names(named, picture.things) and fits_names(named, turned.things)
    return turned if is_turned else picture


def fits_names(named: tuple[Thing, ...], things: tuple[Thing, ...]) -> bool:
    """Whether the facts that are named, thing by thing, are those of `things`."""
    pairs = [(vars(a), vars(b)) for a, b in zip(named, things, strict=True)]
    return all(a[fact] in (None, b[fact]) for a, b in pairs for fact in a)


def from_left(picture: Picture) -> Picture:
    """The picture with its things from left to right: the order in which they are seen."""
    return replace(picture, things=tuple(sorted(picture.things, key=lambda thing: PLACES.index(thing.place))))
