"""What a picture of the miniature world holds: the facts, which of them fit together, and how they are sampled.

A picture is a scene at a time of day with one or two things in it. A thing has a kind, a colour, a size and a place.
Nothing else about a picture is a fact: the shape of the hills, the side a cat looks to and a pixel or two of shift
come from the jitter seed that `paint.draw` takes. The time changes the background alone: things keep their colour.
"""

from dataclasses import asdict, astuple, dataclass
from itertools import product

import numpy as np

SCENES = {  # the levels that a scene has
    "sea": ("water", "sky"),
    "meadow": ("land", "sky"),
    "snow": ("land", "sky"),
    "city": ("land", "water", "sky"),  # a river in front of the street
    "desert": ("land", "sky"),
    "mountains": ("land", "water", "sky"),  # a lake in front of the shore
}
TIMES = ("day", "sunset", "night")
KINDS = {  # the levels of a kind; it is drawn at the first of them that the scene has
    "ball": ("land", "water"),
    "house": ("land",),
    "tree": ("land",),
    "boat": ("water",),
    "fish": ("water",),
    "car": ("land",),
    "star": ("sky",),
    "flower": ("land",),
    "cat": ("land",),
    "bird": ("sky",),
    "balloon": ("sky",),
    "kite": ("sky",),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "big")
PLACES = ("left", "middle", "right")
SPLITS = ("train", "held-out")


@dataclass(frozen=True)
class Thing:
    """One thing in a picture. Where it holds the facts that a text names, None is a fact that the text leaves out."""

    kind: str | None
    colour: str | None = None
    size: str | None = None
    place: str | None = None

    def is_true_of(self, other: "Thing") -> bool:
        """Whether every fact that is not None is a fact of the other thing, too."""
        return all(fact in (None, other_fact) for fact, other_fact in zip(astuple(self), astuple(other), strict=True))


@dataclass(frozen=True)
class Picture:
    scene: str | None
    time: str | None
    things: tuple[Thing, ...]

    def label(self) -> dict:
        """The facts as JSON holds them: {"scene", "time", "things": [{"kind", "colour", "size", "place"}, ...]}."""
        return {"scene": self.scene, "time": self.time, "things": [asdict(thing) for thing in self.things]}

    @classmethod
    def from_label(cls, label: dict) -> "Picture":
        return cls(label["scene"], label["time"], tuple(Thing(**thing) for thing in label["things"]))


def home(kind: str, scene: str) -> str | None:
    """The level of `kind` in `scene`: "land", "water" or "sky"; None where the kind does not belong in the scene."""
    return next((level for level in KINDS[kind] if level in SCENES[scene]), None)


def held_out(kind: str, colour: str, scene: str) -> bool:
    """Whether this combination is kept out of training: (kind + 3 colour + 7 scene) mod 10 == 0, by position in the
    tables above. All three factors are coprime to ten, so that about a tenth of all combinations is held out, and
    each kind is still trained in each of its colours and in each of its scenes."""
    return (list(KINDS).index(kind) + 3 * COLOURS.index(colour) + 7 * list(SCENES).index(scene)) % 10 == 0


def fits(things: tuple[Thing, ...], scene: str) -> bool:
    """Whether the things can be drawn together: each belongs in the scene, and none covers another."""
    if any(home(thing.kind, scene) is None for thing in things):
        return False
    if len(things) == 1:
        return True
    one, two = things
    columns = abs(PLACES.index(one.place) - PLACES.index(two.place))
    apart_in_height = (home(one.kind, scene) == "sky") != (home(two.kind, scene) == "sky")
    return columns == 2 or (columns == 1 and (apart_in_height or "small" in (one.size, two.size)))


HELD_OUT = [(k, c, s) for k, c, s in product(KINDS, COLOURS, SCENES) if home(k, s) and held_out(k, c, s)]
COLOURS_FOR = {(k, s): [c for c in COLOURS if not held_out(k, c, s)] for k, s in product(KINDS, SCENES)}
KINDS_IN = {scene: [kind for kind in KINDS if home(kind, scene)] for scene in SCENES}


def random_stream(seed: int, index: int, purpose: int = 0) -> np.random.Generator:
    """The generator (PCG64) of sample `index`, which depends on these numbers alone. Seeds are 0 or more."""
    return np.random.default_rng([seed, index, purpose])


def pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def pick_other(rng: np.random.Generator, options, *taken):
    """One of the options that are not taken."""
    return pick(rng, [option for option in options if option not in taken])


def chance(rng: np.random.Generator, share: float) -> bool:
    return rng.random() < share


def pick_weighted(rng: np.random.Generator, weights: dict):
    """One of the keys, each as often as its share of all weights."""
    shares = np.array(list(weights.values()))
    return list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]


def sample_thing(rng: np.random.Generator, scene: str) -> Thing:
    """A thing that training may see in this scene."""
    kind = pick(rng, KINDS_IN[scene])
    return Thing(kind, pick(rng, COLOURS_FOR[kind, scene]), pick(rng, SIZES), pick(rng, PLACES))


def sample_picture(rng: np.random.Generator, split: str = "train", count: int | None = None) -> Picture:
    """One picture of `count` things; None: one in 60 %, two in 40 %, of which an eighth are twins ("two red balls").

    "train" never holds a held-out combination; in "held-out" the first thing (a twin: both) always is one.
    """
    if split == "held-out":
        kind, colour, scene = pick(rng, HELD_OUT)
        hero = Thing(kind, colour, pick(rng, SIZES), pick(rng, PLACES))
    elif split == "train":
        scene = pick(rng, list(SCENES))
        hero = sample_thing(rng, scene)
    else:
        raise ValueError(f"no split {split!r}: expected one of {', '.join(SPLITS)}")
    time = pick(rng, TIMES)
    if (count or (1 if rng.random() < 0.6 else 2)) == 1:
        return Picture(scene, time, (hero,))
    twins = rng.random() < 0.125
    while True:  # most samples fit
        other = sample_thing(rng, scene)
        if twins:
            hero = Thing(hero.kind, hero.colour, pick(rng, SIZES), hero.place)
            other = Thing(hero.kind, hero.colour, hero.size, other.place)
        if fits((hero, other), scene):
            return Picture(scene, time, (hero, other))
