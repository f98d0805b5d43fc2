"""A picture in words, in one way only and with every fact: what the language model says before it draws.

    "a boat that is small and red on the left and a star that is big and white on the right at sea by day"

The things stand in the order in which they were named, so that who reads a wish can put it down word after word. The
kind comes before its size and colour: who is told "make the star blue" and writes the colour then knows whose it is.
"""

from dataclasses import replace

from miniature.facts import PLACES, Picture, Thing
from miniature.words import PLACE_PHRASES, choices, facts_in


def describe(picture: Picture) -> str:
    named = [f"a {t.kind} that is {t.size} and {t.colour} {choices(PLACE_PHRASES[t.place])[0]}" for t in picture.things]
    scene = "at sea" if picture.scene == "sea" else f"in the {picture.scene}"
    return f"{' and '.join(named)} {scene} {'by' if picture.time == 'day' else 'at'} {picture.time}"


def as_named(picture: Picture, text: str) -> Picture:
    """The picture with its things in the order in which a caption names them."""
    named, turned = facts_in(text).things, replace(picture, things=picture.things[::-1])
    fitting = [p for p in (picture, turned) if len(named) == 2 and all(map(Thing.is_true_of, named, p.things))]
    return fitting[0] if fitting else picture


def from_left(picture: Picture) -> Picture:
    """The picture with its things from left to right: the order in which they are seen."""
    return replace(picture, things=tuple(sorted(picture.things, key=lambda thing: PLACES.index(thing.place))))
