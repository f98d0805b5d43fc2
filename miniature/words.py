"""What is said about a picture: captions in many phrasings, and the reader that gets the facts back out of a text.

Captions are written as cleaned CC3M captions are: lower case, no full stops. Every caption names the scene and
all colours. It names the places of all things or of none (`PLACE_NAMED`), and so the sizes (`SIZE_NAMED`; "a boat that
is small and red" always does). It names sunset and night always, and day half of the time (`DAY_NAMED`): where no time
is named, it is day.

Synonyms stand in one text, "boat | sailboat | ship", the commonest first.
"""

import re
from dataclasses import replace
from itertools import permutations

import numpy as np

from miniature.facts import COLOURS, PLACES, SIZES, TIMES, Picture, Thing, home, pick, pick_weighted

PLACE_NAMED = 0.7
SIZE_NAMED = 0.85  # not always, so that a prompt without a size ("a red boat at sea") is nothing new to the models
DAY_NAMED = 0.5


NOUNS = {
    "ball": "ball | beach ball | toy ball | bouncy ball",
    "house": "house | cottage | hut",
    "tree": "tree | round tree | leafy tree",
    "boat": "boat | sailboat | sailing boat | ship",
    "fish": "fish",
    "car": "car | automobile | motor car",
    "star": "star | smiling star | twinkling star",
    "flower": "flower | blossom | daisy",
    "cat": "cat | kitty | pussycat",
    "bird": "bird | songbird | birdie",
    "balloon": "balloon | toy balloon | party balloon",
    "kite": "kite | paper kite",
}
SIZE_WORDS = {"small": "small | little | tiny", "big": "big | large | huge | giant | enormous"}
COLOUR_WORDS = {
    "red": "red | bright red | scarlet | crimson",
    "orange": "orange | bright orange | tangerine",
    "yellow": "yellow | bright yellow | golden | lemon yellow",
    "green": "green | bright green | emerald",
    "blue": "blue | bright blue | royal blue",
    "purple": "purple | violet | deep purple",
    "pink": "pink | rosy pink | pale pink",
    "white": "white | snow white | pure white",
}
PLACE_PHRASES = {
    "left": "on the left | on the left side | at the left | to the left | on the left hand side | at left",
    "middle": "in the middle | in the centre | in the center | at the centre | right in the middle",
    "right": "on the right | on the right side | at the right | to the right | on the right hand side | at right",
}
SCENE_NOUNS = {
    "sea": "the sea | the ocean | the open sea | the wide ocean | the waves",
    "meadow": "the meadow | a grassy meadow | the field | a grassy field | the pasture",
    "snow": "the snow | a snowy field | the winter snow | a snowy land | a frozen land",
    "city": "the city | the town | the busy city | a busy town | the tall buildings",
    "desert": "the desert | the sandy desert | the sand dunes | a dry desert | the pyramids",
    "mountains": "the mountains | the high mountains | a mountain valley | the alps | the mountain peaks",
}
SCENE_PHRASES = {  # by the scene, and by where the things are if all are at one level
    "sea water": "on the sea | on the ocean | at sea | on the waves | on the open sea | on a calm sea",
    "sea sky": "above the sea | over the sea | over the ocean | high above the waves | in the sky over the sea",
    "sea": "at sea | at the sea | by the ocean | at the seaside",
    "meadow land": "in the meadow | on the grass | in the field | in a grassy field | on a meadow | in the pasture",
    "meadow sky": "above the meadow | over the meadow | over the grass | high above the field | "
    "in the sky over the meadow",
    "meadow": "in the meadow | at the meadow | in the field | in a grassy land",
    "snow land": "in the snow | on the snow | in a snowy field | in the deep snow | in the winter snow | "
    "on the ice and snow",
    "snow sky": "above the snow | over the snow | over a snowy field | high above the snow | in the winter sky",
    "snow": "in the snow | in winter | in a snowy land | in a frosty land",
    "city land": "in the city | in the town | on the street | in front of the tall buildings | on a city street",
    "city water": "on the river in the city | on the city river | on the river | on the river in town",
    "city sky": "above the city | over the city | over the town | high above the buildings | in the sky over town",
    "city": "in the city | in the town | in town | downtown",
    "desert land": "in the desert | on the sand | among the dunes | on the sand dunes | in the sandy desert | "
    "by the pyramids",
    "desert sky": "above the desert | over the desert | over the dunes | high above the sand | over the pyramids",
    "desert": "in the desert | in the sandy desert | at the pyramids",
    "mountains land": "in the mountains | at the foot of the mountains | below the peaks | by the lake | "
    "by the mountain lake | in the valley",
    "mountains water": "on the lake in the mountains | on the mountain lake | on the lake | "
    "on the lake below the peaks",
    "mountains sky": "above the mountains | over the mountains | over the peaks | high above the lake | "
    "in the mountain sky",
    "mountains": "in the mountains | in the alps | at the mountain lake",
}
TIME_PHRASES = {
    "day": "by day | during the day | in the daytime | in the sunshine | on a sunny day | in the morning | at noon | "
    "in broad daylight",
    "sunset": "at sunset | at dusk | in the evening | at twilight | as the sun sets | as the sun goes down | "
    "in the evening light | at sundown",
    "night": "at night | in the dark | under the stars | by moonlight | under the moon | on a starry night | "
    "at midnight | after dark | on a dark night",
}
TIME_CLAUSES = {
    "day": "it is day | the sun is shining | it is a sunny day | it is morning",
    "sunset": "it is evening | the sun is setting | the sun is going down | it is sunset",
    "night": "it is night | the moon is out | the stars are out | it is dark",
}
VERBS = {  # base, third person, participle
    "ball": "lie lies lying | rest rests resting",
    "house": "stand stands standing",
    "tree": "stand stands standing | grow grows growing",
    "boat": "sail sails sailing | float floats floating | drift drifts drifting",
    "fish": "swim swims swimming | splash splashes splashing",
    "car": "stand stands standing | wait waits waiting",
    "star": "shine shines shining | glow glows glowing | hang hangs hanging",
    "flower": "bloom blooms blooming | grow grows growing",
    "cat": "sit sits sitting | rest rests resting | wait waits waiting",
    "bird": "fly flies flying | glide glides gliding",
    "balloon": "float floats floating | hover hovers hovering",
    "kite": "fly flies flying | dance dances dancing",
}
PICTURES = (
    "picture of | drawing of | painting of | illustration of | cartoon of | sketch of | picture book page with | "
    "view of"
)
SIGNS = {  # words that give scene and time away, also in texts that the grammar did not write
    "sea": "sea | ocean | oceans | wave | waves | seaside",
    "meadow": "meadow | meadows | grass | grassy | field | fields | pasture",
    "snow": "snow | snowy | winter | ice | icy | frosty | frozen | snowy field",
    "city": "city | town | street | streets | river | buildings | downtown | towers",
    "desert": "desert | sand | sandy | dunes | pyramids",
    "mountains": "mountain | mountains | peaks | alps | lake | valley",
    "day": "day | daytime | sunshine | sunny | morning | noon | daylight | sun is shining | sun rises",
    "sunset": "sunset | dusk | evening | twilight | sundown | sun sets | sun is setting | sun goes down | "
    "sun is going down",
    "night": "night | dark | moonlight | moon | starry | midnight | the stars",
}


# ---- words and phrases


def choices(phrases: str) -> list[str]:
    """ "a | b" -> ["a", "b"]."""
    return phrases.split(" | ")


def some(rng: np.random.Generator, phrases: str) -> str:
    """One of "a | b | c": in four cases of ten the first one, otherwise any."""
    options = choices(phrases)
    return options[0] if rng.random() < 0.4 else pick(rng, options)


def one_of(rng: np.random.Generator, phrases: str) -> str:
    """Any of "a | b | c"."""
    return pick(rng, choices(phrases))


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def plural(noun: str) -> str:
    if noun.endswith("fish"):
        return noun
    if noun.endswith(("ch", "s")):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def verb(rng, kind: str, form: int) -> str:
    """A verb for what this kind does: form 0 "sail", 1 "sails", 2 "sailing"."""
    return some(rng, VERBS[kind]).split()[form]


def adjectives(rng, thing: Thing, sized: bool) -> str:
    colour = some(rng, COLOUR_WORDS[thing.colour])
    return f"{some(rng, SIZE_WORDS[thing.size])} {colour}" if sized else colour


def noun_phrase(rng, thing: Thing, sized: bool = True) -> str:
    """ "a small red boat"; now and then "a boat that is small and red"."""
    noun = some(rng, NOUNS[thing.kind])
    if rng.random() < 0.06:
        size, colour = some(rng, SIZE_WORDS[thing.size]), some(rng, COLOUR_WORDS[thing.colour])
        return f"{with_article(noun)} that is {size} and {colour}"
    return with_article(f"{adjectives(rng, thing, sized)} {noun}")


def home_level(picture: Picture) -> str:
    """Where all things are, "land", "water" or "sky"; "" if they are not all at one level."""
    levels = {home(thing.kind, picture.scene) for thing in picture.things}
    return levels.pop() if len(levels) == 1 else ""


def scene_phrase(rng, picture: Picture) -> str:
    """ "on the sea", "above the meadow", by where the things are; a fish is in the water, not on it."""
    phrase = some(rng, SCENE_PHRASES[f"{picture.scene} {home_level(picture)}".rstrip()])
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
    places = [some(rng, PLACE_PHRASES[thing.place]) for thing in things]
    if len(things) == 1:
        return noun_phrase(rng, things[0], sized), places[0] if placed else ""
    if twins(picture):
        phrase = f"two {adjectives(rng, things[0], sized)} {plural(some(rng, NOUNS[things[0].kind]))}"
        return phrase, f"one {places[0]} and one {places[1]}" if placed else ""
    parts = [f"{noun_phrase(rng, t, sized)} {p * placed}".strip() for t, p in zip(things, places, strict=True)]
    if rng.random() < 0.4:
        parts.reverse()
    return some(rng, "{} and {} | {} with {} | {} together with {} | {} beside {} | {} and also {}").format(*parts), ""


def tidy(text: str) -> str:
    return " ".join(text.split())


def description(picture: Picture, rng: np.random.Generator, placed: bool, dated: bool) -> str:
    """The plainest form of a caption: things, places, scene, time."""
    what, where = subject(rng, picture, placed)
    when = some(rng, TIME_PHRASES[picture.time]) if dated or picture.time != "day" else ""
    return tidy(f"{what} {where} {scene_phrase(rng, picture)} {when}")


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """One description of the picture, in any of the phrasings."""
    placed, sized = rng.random() < PLACE_NAMED, rng.random() < SIZE_NAMED
    dated = picture.time != "day" or rng.random() < DAY_NAMED
    what, where = subject(rng, picture, placed, sized)
    scene = scene_phrase(rng, picture)
    when = some(rng, TIME_PHRASES[picture.time]) if dated else ""
    alone, same = len(picture.things) == 1, twins(picture)
    kind = picture.things[0].kind
    forms = {
        "{what} {where} {scene} {when}": 5,
        "{what} {scene} {where} {when}": 2,
        "{when} {what} {scene} {where}": 1.5,
        "{there} {what} {where} {scene} {when}": 1.5,
        "{scene} {when} {there} {what} {where}": 1,
        "{art} {what} {where} {scene} {when}": 1.5,
        "{ground} {when} with {what} {where}": 1,
    }
    if alone or same:
        forms |= {"{what} {does} {scene} {where} {when}": 1.5, "{what} {doing} {where} {scene} {when}": 1}
    if dated:
        forms["{clause} and {there} {what} {where} {scene}"] = 0.7
    if alone and placed:
        forms["{where} {does} {what} {scene} {when}"] = 0.7
    if placed and not alone and not same:
        forms["{inverse} {scene} {when}"] = 2
    first, second = picture.things[0], picture.things[-1]
    return tidy(
        pick_weighted(rng, forms).format(
            what=what,
            where=where,
            scene=scene,
            when=when,
            there="there are" if same else "there is",
            art=with_article(some(rng, PICTURES)),
            ground=some(rng, SCENE_NOUNS[picture.scene]),
            does=verb(rng, kind, 1 if alone else 0),
            doing=verb(rng, kind, 2),
            clause=some(rng, TIME_CLAUSES[picture.time]),
            inverse=f"{some(rng, PLACE_PHRASES[first.place])} is {noun_phrase(rng, first, sized)} and "
            f"{some(rng, PLACE_PHRASES[second.place])} is {noun_phrase(rng, second, sized)}",
        )
    )


# ---- the reader


def build_lexicon() -> dict[str, tuple]:
    """Every word or phrase that names a fact -> (fact, value); kinds: (fact, value, how many)."""
    lexicon = {}
    for name, words in SIGNS.items():
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
    Adjectives belong to the thing after them, or to the last one. Without any thing ("it drifts to the right") they
    make one of kind None.
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
    """Whether everything that a text names (`facts_in`) is true of the picture; every named thing is another one."""
    orders = permutations(picture.things, len(named.things))  # none where more things are named than there are
    right = named.scene in (None, picture.scene) and named.time in (None, picture.time)
    return right and any(all(map(Thing.is_true_of, named.things, reals)) for reals in orders)


# ---- words first


def describe(picture: Picture) -> str:
    """The one form in which the language model puts a picture into words before it draws, with every fact: "a boat that
    is small and red on the left and a star that is big and white on the right at sea by day".

    The things stand in the order in which they were named, so that who reads a wish can put it down word after word.
    The kind comes before its size and colour, so that the model knows whose colour it writes after "make the star
    blue".
    """
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
