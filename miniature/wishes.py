"""What people type when they want a picture, and a picture with every fact that they leave open.

The captions of `words.py` are by a writer who sees the picture: they name most facts. Somebody who asks for a picture
names few, in words of their own: "BOAT, sea, night", "can you draw me a purpel fish?", "a house but no car". `wish`
samples a sentence and a picture that it can be about, and fills the sentence with some of the picture's facts.

A fact that a wish leaves open is sampled, so that one wish has many pictures. A thing whose size is open is mostly big,
as small ones are hard to recognise. Two things whose places are open stand on the left and on the right. One thing "in
the middle of the snow" stands in the middle.
"""

import re
from dataclasses import replace

import numpy as np

from common.texts import clean_prompt
from miniature import facts, words
from miniature.facts import COLOURS_FOR, KINDS, Picture, Thing, chance, fits, home, pick, pick_other, sample_picture
from miniature.phrases import CAPTIONS, PHRASES, SLOT, any_of, fill, sentence, usual, with_article
from miniature.typos import CHATTER, TYPOS, padded, typed
from miniature.words import caption, facts_in, plural

MIDDLE = re.compile(r"in the middle of (?!the (night|picture))")
SECTIONS = {"one": 0.55, "two": 0.38, "twins": 0.07}  # of sentences.txt: one thing, two kinds, two of one kind
PLAIN = 0.5  # share of the commonest sentences

# ---- the picture


def spread(rng: np.random.Generator, picture: Picture) -> Picture:
    """The picture with its two things on the left and on the right."""
    places = ("left", "right") if chance(rng, 0.5) else ("right", "left")
    return replace(picture, things=tuple(replace(t, place=p) for t, p in zip(picture.things, places, strict=True)))


def enlarged(rng: np.random.Generator, picture: Picture, named_facts: Picture) -> Picture:
    """The picture with most of the things big whose size the wish does not name."""
    pairs = zip(picture.things, named_facts.things, strict=True)
    things = tuple(replace(t, size="big") if n.size is None and chance(rng, 0.7) else t for t, n in pairs)
    return replace(picture, things=things) if fits(things, picture.scene) else picture


def other_size(size: str) -> str:
    return "small" if size == "big" else "big"


def picture_for(rng: np.random.Generator, split: str, section: str, slots: set[str]) -> Picture | None:
    """A picture that a sentence with these slots can be about; None where what was sampled does not fit it."""
    picture = sample_picture(rng, split, 2 if section == "two" else 1)
    one, other, scene = picture.things[0], picture.things[-1], picture.scene
    if section == "one":
        return picture
    if section == "two" and one.kind == other.kind:
        return None
    if "colour" in slots:
        other = replace(other, colour=one.colour)
    if section == "twins" and {"colour1", "colour2"} & slots:
        other = replace(other, colour=pick_other(rng, COLOURS_FOR[other.kind, scene], one.colour))
    if "size" in slots:
        other = replace(other, size=one.size)
    if {"bigger1", "bigger2"} & slots or (section == "twins" and {"size1", "size2"} & slots):
        other = replace(other, size=other_size(one.size))
    if split == "train" and facts.held_out(other.kind, other.colour, scene):
        return None
    picture = replace(picture, things=(one, other))
    return picture if section == "two" and {"place1", "place2"} <= slots else spread(rng, picture)


def choose_facts(rng: np.random.Generator, picture: Picture, slots: set[str]) -> tuple[Picture, list[Thing]]:
    """The facts that a sentence with these slots names, and for each thing those that stand right beside its noun."""
    with_colour, with_size, with_place = chance(rng, 0.7), chance(rng, 0.18), chance(rng, 0.14)
    alone, compared = len(picture.things) == 1, {"bigger1", "bigger2"} & slots
    placed = {"side", "other side"} & slots or (alone and with_place and {"rest", "list"} & slots)
    things, noun_facts = [], []
    for i, t in enumerate(picture.things):
        number = "" if alone else str(i + 1)
        slot = {fact: {fact, fact + number} & slots for fact in ("colour", "size", "place")}
        free = {"thing" + number, "list"} & slots
        colour = t.colour if free and not slot["colour"] and with_colour and chance(rng, 0.9) else None
        size = t.size if free and not (slot["size"] or compared) and chance(rng, 0.85 if with_size else 0.06) else None
        noun_facts.append(Thing(t.kind, colour, size))
        thing = Thing(
            t.kind,
            t.colour if slot["colour"] else colour,
            t.size if slot["size"] or compared else size,
            t.place if slot["place"] or placed else None,
        )
        things.append(thing)
    around = {"rest", "list"} & slots
    scene = picture.scene if {"scene", "in scene"} & slots or (around and chance(rng, 0.68)) else None
    time = picture.time if {"time", "at time", "clause"} & slots or (around and chance(rng, 0.3)) else None
    return Picture(scene, time, tuple(things)), noun_facts


# ---- phrases


def fact_phrase(rng: np.random.Generator, section: str, name: str) -> str:
    """A phrase of the captions, most often the first, or of people's own: `fact_phrase(rng, "colours", "red")`."""
    return usual(rng, CAPTIONS[section][name]) if rng.random() < 0.5 else any_of(rng, PHRASES[section][name])


def scene_noun(rng: np.random.Generator, scene: str) -> str:
    """ "a snowy landscape", "desert", "the sea"."""
    if chance(rng, 0.3):
        return usual(rng, CAPTIONS["scene nouns"][scene])
    noun = any_of(rng, PHRASES["settings"][scene])
    return noun if noun in ("downtown", "egypt", "winter") else pick(rng, [noun, f"the {noun}", with_article(noun)])


def scene_words(rng: np.random.Generator, picture: Picture) -> str:
    """ "in the snow", "high over the town"."""
    if chance(rng, 0.45):
        return usual(rng, CAPTIONS["scenes"][f"{picture.scene} {words.home_level(picture)}".strip()])
    if chance(rng, 0.55):
        return any_of(rng, PHRASES["scenes"][picture.scene])
    sky = all(home(thing.kind, picture.scene) == "sky" for thing in picture.things)
    before = ["over", "above", "in", "high over"] if sky else ["in", "on", "at", "by", "in the middle of"]
    place = any_of(rng, PHRASES["settings"][picture.scene])
    return f"{pick(rng, before)} {'' if place in ('downtown', 'egypt', 'winter') else 'the '}{place}"


def adjectives_of(rng: np.random.Generator, thing: Thing) -> list[str]:
    adjectives = [fact_phrase(rng, "sizes", thing.size)] if thing.size else []
    if thing.colour:
        adjectives.append(fact_phrase(rng, "colours", thing.colour))
    elif chance(rng, 0.04):
        adjectives.append(any_of(rng, PHRASES["strange colours"]))
    if len(adjectives) == 2 and chance(rng, 0.12):
        adjectives.reverse()
    if chance(rng, 0.1):
        adjectives.insert(0, usual(rng, PHRASES["fillers"]))
    return adjectives


def thing_phrase(rng: np.random.Generator, thing: Thing, noun: str | None = None) -> str:
    """ "a red boat", "one big cat", "a boat that is red"; now and then without an article."""
    noun, adjectives = noun or fact_phrase(rng, "nouns", thing.kind), adjectives_of(rng, thing)
    if adjectives and chance(rng, 0.1):
        tail = (" and " if chance(rng, 0.7) else ", ").join(adjectives)
        phrase = f"{noun} {any_of(rng, PHRASES['sized' if thing.size else 'coloured'])} {tail}"
    else:
        phrase = " ".join([*adjectives, noun])
    if chance(rng, 0.12):
        return f"{any_of(rng, PHRASES['articles'])} {phrase}".strip()
    return with_article(phrase)


def bare_list(rng: np.random.Generator, named_facts: Picture) -> str:
    """ "red boat, sea, night", "boat red sea", "cat snow"."""
    comma, groups = chance(rng, 0.6), []
    for thing in named_facts.things:
        parts = [*adjectives_of(rng, thing), fact_phrase(rng, "nouns", thing.kind)]
        if len(named_facts.things) == 1 and chance(rng, 0.3):
            parts = [parts[i] for i in rng.permutation(len(parts))]
        elif chance(rng, 0.2):  # "house white, tree orange"
            parts = [parts[-1], *parts[:-1]]
        elif comma and chance(rng, 0.4):
            parts[0] = with_article(parts[0])
        parts += [fact_phrase(rng, "places", thing.place)] if thing.place else []
        groups.append(" ".join(parts))
    around = [usual(rng, PHRASES["settings"][named_facts.scene])] if named_facts.scene else []
    around += [any_of(rng, PHRASES["time nouns"][named_facts.time])] if named_facts.time else []
    if comma and len(named_facts.things) == 1 and chance(rng, 0.25):  # "night, city, star, small"
        return ", ".join(rng.permutation([*parts, *around]))
    groups = [*around, *groups] if chance(rng, 0.25) else [*groups, *around]
    return (", " if comma else " ").join(groups)


def rest_of(rng: np.random.Generator, picture: Picture, named_facts: Picture) -> str:
    """Phrases for the named scene and time, and for the place of a single thing, mostly in this order."""
    both, thing = PHRASES["scene times"].get(f"{named_facts.scene} {named_facts.time}"), named_facts.things[0]
    if both and chance(rng, 0.12):
        parts = [any_of(rng, both)]
    else:
        parts = [scene_words(rng, picture)] if named_facts.scene else []
        parts += [fact_phrase(rng, "times", named_facts.time)] if named_facts.time else []
    if thing.place and len(named_facts.things) == 1:
        parts.insert(int(rng.integers(len(parts) + 1)), fact_phrase(rng, "places", thing.place))
    if len(parts) > 1 and chance(rng, 0.25):
        parts.reverse()
    return " ".join(parts)


def slot_words(
    rng: np.random.Generator, slot: str, picture: Picture, named_facts: Picture, thing: Thing, noun: str
) -> str:
    """What fills a slot. `thing` and `noun` belong to its number, or to the first thing where it has no number."""
    scene, time = picture.scene, picture.time
    kinds, sky = [t.kind for t in picture.things], [home(t.kind, scene) == "sky" for t in picture.things]
    relation = {(True, False): "above | over | high above", (False, True): "below | under"}.get(tuple(sky))
    fillers = {
        "noun": lambda: noun,
        "nouns": lambda: plural(noun),
        "colour": lambda: fact_phrase(rng, "colours", thing.colour),
        "size": lambda: fact_phrase(rng, "sizes", thing.size),
        "place": lambda: fact_phrase(rng, "places", thing.place),
        "does": lambda: fact_phrase(rng, "verbs", thing.kind).split()[1],
        "doing": lambda: fact_phrase(rng, "verbs", thing.kind).split()[2],
        "bigger": lambda: any_of(rng, PHRASES["compared"][thing.size]),
        "side": lambda: picture.things[0].place,
        "other side": lambda: picture.things[1].place,
        "scene": lambda: scene_noun(rng, scene),
        "in scene": lambda: scene_words(rng, picture),
        "time": lambda: any_of(rng, PHRASES["time nouns"][time]),
        "at time": lambda: fact_phrase(rng, "times", time),
        "clause": lambda: usual(rng, CAPTIONS["clauses"][time]),
        "rest": lambda: rest_of(rng, picture, named_facts),
        "list": lambda: bare_list(rng, named_facts),
        "up": lambda: any_of(rng, PHRASES["up"]) if home(thing.kind, scene) == "sky" else "",
        "join": lambda: any_of(rng, relation if relation and chance(rng, 0.4) else PHRASES["joins"]),
        "absent": lambda: pick_other(rng, KINDS, *kinds),
        "absents": lambda: plural(pick_other(rng, KINDS, *kinds)),
        "stranger": lambda: any_of(rng, PHRASES["strangers"]),
        "too many": lambda: any_of(rng, PHRASES["too many"]),
        "other colour": lambda: usual(rng, CAPTIONS["colours"][pick_other(rng, facts.COLOURS, thing.colour)]),
        "other size": lambda: fact_phrase(rng, "sizes", other_size(thing.size)),
        "other place": lambda: fact_phrase(rng, "places", pick_other(rng, facts.PLACES, thing.place)),
        "other scene": lambda: scene_noun(rng, pick_other(rng, facts.SCENES, scene)),
        "other time": lambda: any_of(rng, PHRASES["time nouns"][pick_other(rng, facts.TIMES, time)]),
    }
    return fillers[slot.rstrip("12")]()


# ---- one wish


def wish(rng: np.random.Generator, split: str = "train", typos: float = TYPOS) -> tuple[str, Picture]:
    """What somebody types, cleaned (`texts.clean_prompt`), and a picture for it. `typos`: share of texts with typos."""
    if chance(rng, 0.2):  # a caption, which names most of the facts
        picture = sample_picture(rng, split)
        text = caption(picture, rng)
        if len(picture.things) == 2 and not any(thing.place for thing in facts_in(text).things):
            picture = spread(rng, picture)
        picture = words.as_named(picture, text)
    else:
        text, picture, _ = wish_from_sentence(rng, split)
    text = padded(rng, text) if chance(rng, CHATTER) else text
    return clean_prompt(typed(rng, text, typos)), picture


def wish_from_sentence(rng: np.random.Generator, split: str) -> tuple[str, Picture, Picture]:
    """A sentence of sentences.txt with its slots filled, its picture, and the picture's facts that the text names."""
    section, plain = facts.pick_weighted(rng, SECTIONS), chance(rng, PLAIN)
    text, picture = sentence(rng, f"plain {section}" if plain else section), None
    slots = dict.fromkeys(SLOT.findall(text))
    while picture is None:
        picture = picture_for(rng, split, section, set(slots))
    named_facts, noun_facts = choose_facts(rng, picture, set(slots))
    picture = enlarged(rng, picture, named_facts)
    nouns = [fact_phrase(rng, "nouns", picture.things[0].kind)]
    nouns.append(nouns[0] if section == "twins" else fact_phrase(rng, "nouns", picture.things[-1].kind))
    for slot in slots:
        i = 1 if slot.endswith("2") else 0
        if slot.rstrip("12") == "thing":
            slots[slot] = thing_phrase(rng, noun_facts[i], nouns[i])
        else:
            slots[slot] = slot_words(rng, slot, picture, named_facts, picture.things[i], nouns[i])
    first = next((slot for slot in slots if slot[-1] in "12"), "")
    if first.endswith("2"):  # a description begins with the thing that is named first
        picture, named_facts = (replace(p, things=p.things[::-1]) for p in (picture, named_facts))
    text = fill(text, slots)
    if section == "one" and not named_facts.things[0].place and MIDDLE.search(text):
        picture, named_facts = (
            replace(p, things=(replace(p.things[0], place="middle"),)) for p in (picture, named_facts)
        )
    if plain and chance(rng, 0.3):
        text = any_of(rng, PHRASES["requests"]).format(text)
    return text, picture, named_facts
