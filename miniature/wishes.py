"""What people type when they want a picture, and the description that decides what they leave open.

The captions of `words.py` are written by who sees the picture: they name most facts. Somebody who asks for a picture
names few, in words of their own: "BOAT, sea, night", "can you draw me a purpel fish?", "a house but no car". `wish`
samples a picture, and a text that names some of its facts in such a way.

A fact that a wish leaves open is sampled, so that one wish has many pictures, but what has no size is mostly big:
small things are hard to recognise. Two things whose places are open stand on the left and on the right, one thing "in
the middle of the snow" in the middle.
"""

import re
from dataclasses import replace

import numpy as np

from common.texts import plain_words
from miniature import facts, phrases, words
from miniature.facts import COLOURS_FOR, KINDS, Picture, Thing, chance, fits, home, pick, pick_other, sample_picture
from miniature.typos import CHATTER, TYPOS, padded, typed
from miniature.words import caption, choices, facts_in, one_of, plural, some, with_article

MIDDLE = re.compile(r"in the middle of (?!the (night|picture))")

# ---- words


def said(rng: np.random.Generator, common: str, more: str) -> str:
    """A word of `common`, the first one most often, or of people's own."""
    return some(rng, common) if rng.random() < 0.5 else one_of(rng, more)


# ---- facts: which are named, and what becomes of the others


def spread(rng: np.random.Generator, picture: Picture) -> Picture:
    """The picture with its two things on the left and on the right."""
    places = ("left", "right") if chance(rng, 0.5) else ("right", "left")
    return replace(picture, things=tuple(replace(t, place=p) for t, p in zip(picture.things, places, strict=True)))


def related(rng: np.random.Generator, split: str) -> Picture:
    """Two things of one kind: alike, or of other colours or sizes."""
    first = sample_picture(rng, split, 1)
    hero, what = first.things[0], rng.random()
    other = hero
    if what < 0.35:
        colour = pick(rng, COLOURS_FOR[hero.kind, first.scene])
        other = replace(hero, colour=colour, size=pick(rng, [hero.size, hero.size, "small"]))
    elif what < 0.5:
        other = replace(hero, size="small" if hero.size == "big" else "big")
    return spread(rng, replace(first, things=(hero, other)))


def enlarged(rng: np.random.Generator, picture: Picture, named: Picture) -> Picture:
    """The picture with most things big whose size is not named."""
    pairs = zip(picture.things, named.things, strict=True)
    things = tuple(replace(t, size="big") if n.size is None and chance(rng, 0.7) else t for t, n in pairs)
    return replace(picture, things=things) if fits(things, picture.scene) else picture


def wanted_picture(rng: np.random.Generator, split: str) -> Picture:
    """One thing in 55 %; of the others a quarter has two of one kind."""
    if chance(rng, 0.55):
        return sample_picture(rng, split, 1)
    return related(rng, split) if chance(rng, 0.06) else sample_picture(rng, split, 2)


# ---- phrases


def adjectives_of(rng: np.random.Generator, named: Thing) -> list[str]:
    adjectives = []
    if named.size:
        adjectives.append(said(rng, words.SIZE_WORDS[named.size], phrases.MORE_SIZES[named.size]))
    if named.colour:
        adjectives.append(said(rng, words.COLOUR_WORDS[named.colour], phrases.MORE_COLOURS[named.colour]))
    elif chance(rng, 0.04):
        adjectives.append(one_of(rng, phrases.STRANGE_COLOURS))
    if len(adjectives) == 2 and chance(rng, 0.12):
        adjectives.reverse()
    if chance(rng, 0.1):
        adjectives.insert(0, some(rng, phrases.FILLERS))
    return adjectives


def noun_of(rng: np.random.Generator, kind: str) -> str:
    return said(rng, words.NOUNS[kind], phrases.MORE_NOUNS[kind])


def verb(rng: np.random.Generator, kind: str, form: int) -> str:
    """Form 1 "sails", form 2 "sailing"."""
    return said(rng, words.VERBS[kind], phrases.MORE_VERBS[kind]).split()[form]


def thing_phrase(rng: np.random.Generator, named: Thing) -> str:
    """ "a red boat", "one big cat", "a boat that is red"; now and then without an article."""
    noun, adjectives = noun_of(rng, named.kind), adjectives_of(rng, named)
    if adjectives and chance(rng, 0.1):
        tail = (" and " if chance(rng, 0.7) else ", ").join(adjectives)
        phrase = f"{noun} {one_of(rng, phrases.SIZED if named.size else phrases.COLOURED)} {tail}"
    else:
        phrase = " ".join([*adjectives, noun])
    if chance(rng, 0.12):
        return f"{one_of(rng, phrases.ARTICLES)} {phrase}".strip()
    return with_article(phrase)


def scene_words(rng: np.random.Generator, picture: Picture) -> str:
    if chance(rng, 0.45):
        return some(rng, words.SCENE_PHRASES[f"{picture.scene} {words.home_level(picture)}".strip()])
    if chance(rng, 0.55):
        return one_of(rng, phrases.MORE_SCENES[picture.scene])
    sky = all(home(thing.kind, picture.scene) == "sky" for thing in picture.things)
    before = ["over", "above", "in", "high over"] if sky else ["in", "on", "at", "by", "in the middle of"]
    place = one_of(rng, phrases.SETTINGS[picture.scene])
    return f"{pick(rng, before)} {'' if place in ('downtown', 'egypt', 'winter') else 'the '}{place}"


def time_words(rng: np.random.Generator, time: str) -> str:
    return said(rng, words.TIME_PHRASES[time], phrases.MORE_TIMES[time])


def place_words(rng: np.random.Generator, place: str) -> str:
    return said(rng, words.PLACE_PHRASES[place], phrases.MORE_PLACES[place])


# ---- one wish


def wish(rng: np.random.Generator, split: str = "train", typos: float = TYPOS) -> tuple[str, Picture]:
    """What somebody types, as the language model reads it (`texts.plain_words`), and a picture that it wishes for.
    `typos`: the share of texts with typos."""
    if chance(rng, 0.2):  # a caption: names most, in the words of captions
        picture = sample_picture(rng, split)
        text = caption(picture, rng)
        if len(picture.things) == 2 and not any(thing.place for thing in facts_in(text).things):
            picture = spread(rng, picture)
        picture = words.as_named(picture, text)
    else:
        picture = wanted_picture(rng, split)
        text, picture = asked_for(rng, picture)
    text = padded(rng, text) if chance(rng, CHATTER) else text
    return plain_words(typed(rng, text, typos)), picture


def asked_for(rng: np.random.Generator, picture: Picture) -> tuple[str, Picture]:
    """A text in people's words; the picture, with two things side by side where the text says no places."""
    colour, size, place = chance(rng, 0.7), chance(rng, 0.18), chance(rng, 0.14)
    things = []
    for t in picture.things:
        told_colour = t.colour if colour and chance(rng, 0.9) else None
        told_size = t.size if chance(rng, 0.85 if size else 0.06) else None
        things.append(Thing(t.kind, told_colour, told_size, t.place if place else None))
    if len(things) == 2 and things[0].kind == things[1].kind and chance(rng, 0.75):
        place, things = False, [replace(thing, place=None) for thing in things]
    scene = picture.scene if chance(rng, 0.68) else None
    named = Picture(scene, picture.time if chance(rng, 0.3) else None, tuple(things))
    picture = enlarged(rng, picture, named)
    if len(things) == 1:
        text = one_thing(rng, picture, named)
        if not place and MIDDLE.search(text):
            picture = replace(picture, things=(replace(picture.things[0], place="middle"),))
    else:
        relation = None if place else pick(rng, [None, None, None, "left", "right"])
        if not place:
            picture = spread(rng, picture)
            if relation and picture.things[0].place != relation:  # the first thing stands on that side
                one, two = picture.things
                picture = replace(picture, things=(replace(one, place=two.place), replace(two, place=one.place)))
        text = two_things(rng, picture, named, relation)
    if chance(rng, 0.08):
        absent = pick_other(rng, KINDS, *(thing.kind for thing in picture.things))
        without = one_of(rng, phrases.ABSENT).format(absent, plural(absent))
        if len(things) == 1 and chance(rng, 0.5):  # right after the thing: "a house without a tree in the city"
            around = [end for end in ends(rng, picture, named) if not MIDDLE.search(end)]
            text = " ".join([thing_phrase(rng, things[0]), without, *around])
        elif chance(rng, 0.35):
            absent = pick(rng, [absent, one_of(rng, phrases.STRANGERS)])
            without = one_of(rng, phrases.ABSENT_FIRST).format(absent, plural(absent))
            text = f"{without}{one_of(rng, ', just | , only | , but | , please only | . draw | ,')} {text}"
        else:
            text = f"{text} {without}"
    elif chance(rng, 0.06):
        stranger = one_of(rng, phrases.STRANGERS)
        stranger, does = pick(rng, [with_article(stranger), f"my {stranger}"]), one_of(rng, phrases.STRANGER_DOES)
        text = f"{text} {does} {stranger}" if chance(rng, 0.4) else f"{stranger} {does} {text}"
    elif len(things) == 1 and things[0].colour and chance(rng, 0.04):
        other = some(rng, words.COLOUR_WORDS[pick_other(rng, facts.COLOURS, things[0].colour)])
        other = pick(rng, [other, f"{with_article(other)} one"])
        text = f"{text} {pick(rng, ['not', 'and not', ', not', 'but not'])} {other}"
    elif len(things) == 1 and chance(rng, 0.08):  # said twice: "boats! i love boats. a blue boat"
        noun = noun_of(rng, things[0].kind)
        again = pick(rng, [*adjectives_of(rng, things[0]), noun, f"a {noun}", thing_phrase(rng, things[0])])
        forms = "i love {0}. {2} | {1}, {2} | {2}, {1} | {0}! {2} | do you do {0}? {2}"
        text = one_of(rng, forms).format(plural(noun), again, text)
    if chance(rng, 0.3):
        text = one_of(rng, phrases.REQUESTS).format(text)
    return text, picture


def ends(rng: np.random.Generator, picture: Picture, named: Picture) -> list[str]:
    """Phrases for the named scene and time, and for the place of a single thing, mostly in this order."""
    both, place = phrases.SCENE_TIMES.get(f"{named.scene} {named.time}"), named.things[0].place
    if both and chance(rng, 0.12):
        parts = [one_of(rng, both)]
    else:
        parts = [scene_words(rng, picture)] if named.scene else []
        parts += [time_words(rng, named.time)] if named.time else []
    if place and len(named.things) == 1:
        parts.insert(int(rng.integers(len(parts) + 1)), place_words(rng, place))
    if len(parts) > 1 and chance(rng, 0.25):
        parts.reverse()
    return parts


def bare_list(rng: np.random.Generator, named: Picture) -> str:
    """ "red boat, sea, night", "boat red sea", "cat snow"."""
    comma = chance(rng, 0.6)
    groups = []
    for thing in named.things:
        parts = [*adjectives_of(rng, thing), noun_of(rng, thing.kind)]
        if len(named.things) == 1 and chance(rng, 0.3):
            parts = [parts[i] for i in rng.permutation(len(parts))]
        elif chance(rng, 0.2):  # "house white, tree orange"
            parts = [parts[-1], *parts[:-1]]
        elif comma and chance(rng, 0.4):
            parts[0] = with_article(parts[0])
        if thing.place:
            parts.append(place_words(rng, thing.place))
        groups.append(" ".join(parts))
    around = [some(rng, phrases.SETTINGS[named.scene])] if named.scene else []
    around += [one_of(rng, phrases.TIME_NOUNS[named.time])] if named.time else []
    if comma and len(named.things) == 1 and chance(rng, 0.25):  # "night, city, star, small"
        return ", ".join(rng.permutation([*parts, *around]))
    groups = [*around, *groups] if chance(rng, 0.25) else [*groups, *around]
    return (", " if comma else " ").join(groups)


def setting_first(rng: np.random.Generator, scene: str, time: str | None) -> str:
    """ "a snowy landscape at night", "desert at night", "the sea at night"."""
    place = one_of(rng, phrases.SETTINGS[scene])
    place = pick(rng, [place, f"the {place}", with_article(place)])
    return f"{place} {time_words(rng, time)}" if time else place


def one_thing(rng: np.random.Generator, picture: Picture, named: Picture) -> str:
    (thing,), scene, time = named.things, named.scene, named.time
    kind, form = thing.kind, rng.random()
    tail = ends(rng, picture, named)
    sky = home(kind, picture.scene) == "sky"
    if thing.size and chance(rng, 0.06):  # "a red boat, a small one"
        size = said(rng, words.SIZE_WORDS[thing.size], phrases.MORE_SIZES[thing.size])
        return f"{thing_phrase(rng, replace(thing, size=None))}, {with_article(size)} one {' '.join(tail)}"
    if sky and chance(rng, 0.12):
        tail.insert(0, one_of(rng, phrases.SKY))
    end = " ".join(tail)
    if form < 0.38:
        return f"{thing_phrase(rng, thing)} {end}"
    if form < 0.52:
        return bare_list(rng, named)
    if form < 0.6 and scene:
        link = pick(rng, ["with", "with", "and", ",", "where there is", "and in it", "with just", ":"])
        up = f" {one_of(rng, phrases.SKY)}" if sky and chance(rng, 0.4) else ""
        place = f" {place_words(rng, thing.place)}" if thing.place else ""
        return f"{setting_first(rng, scene, time)} {link} {thing_phrase(rng, thing)}{up}{place}"
    if form < 0.68:
        doing = verb(rng, kind, int(1 + rng.integers(2)))
        return f"{thing_phrase(rng, thing)} {doing} {end}"
    if form < 0.76:
        return f"{one_of(rng, phrases.THERE)} {thing_phrase(rng, thing)} {end}"
    if form < 0.84 and tail:
        first, rest = tail[0], " ".join(tail[1:])
        if chance(rng, 0.35):  # "in the middle of the snow stands a red house"
            return f"{first} {verb(rng, kind, 1)} {thing_phrase(rng, thing)} {rest}"
        first = f"{verb(rng, kind, 2)} {first}" if chance(rng, 0.15) else first
        return f"{first}{pick(rng, ['', '', ',', ':', ', i want'])} {thing_phrase(rng, thing)} {rest}"
    if form < 0.88 and time:
        clauses = [f"{clause} and" for clause in choices(words.TIME_CLAUSES[time])]
        start = pick(rng, choices(phrases.TIME_STARTS[time]) + clauses)
        place = " ".join(ends(rng, picture, replace(named, time=None)))
        if scene and chance(rng, 0.4):
            start = f"{start.removesuffix(' and')} {scene_words(rng, picture)} and"
            does = f"{thing_phrase(rng, thing)} {verb(rng, kind, 1)}"
            return f"{start} {does} {place_words(rng, thing.place) if thing.place else ''}"
        return f"{start} {thing_phrase(rng, thing)} {verb(rng, kind, 1)} {place}"
    noun = noun_of(rng, kind)
    which = pick(rng, ["the", "the", "my", "a", "this", "our", ""])
    facts = adjectives_of(rng, thing)
    if not facts:
        return f"{which} {noun} {pick(rng, ['is', verb(rng, kind, 1)])} {end}"
    if form < 0.93:  # sentences: "the ball is blue. the ball is big. it is in the desert."
        it = [f"{which} {noun}"] + [pick(rng, ["it", f"the {noun}"]) for _ in range(4)]
        lines = [f"{who} is {fact}" for who, fact in zip(it, [*facts, *tail], strict=False)]
        if chance(rng, 0.5):
            start = f"{one_of(rng, phrases.THERE)} {with_article(noun)}"
            lines = [start, *(f"it is {fact}" for fact in [*facts, *tail])]
        return pick(rng, [". ", ". ", ", ", " and ", "; "]).join(lines) + "."
    if form < 0.97:  # "my house is yellow and stands in a meadow"
        be = pick(rng, ["is", "is", "should be", "must be", "has to be"])
        return f"{which} {noun} {be} {' and '.join(facts)}{' and ' + verb(rng, kind, 1) + ' ' + end if tail else ''}"
    *several, last = [*facts, *tail]
    return f"a {noun} that is {', '.join(several)}{' and ' * bool(several)}{last}"


def two_things(rng: np.random.Generator, picture: Picture, named: Picture, relation: str | None) -> str:
    end, things = " ".join(ends(rng, picture, named)), named.things
    first, second = (thing_phrase(rng, thing) for thing in things)
    unsized = not (relation or things[0].place or things[0].size or things[1].size)
    if unsized and picture.things[0].size != picture.things[1].size and chance(rng, 0.25):
        more, less = (one_of(rng, phrases.COMPARATIVES[thing.size]) for thing in picture.things)
        if things[0].kind == things[1].kind and things[0].colour == things[1].colour:
            return f"{first} and a {less.removeprefix('a ')} one {end}"
        return f"{first} {pick(rng, ['that is', 'is', 'which is', ''])} {more} than {second} {end}"
    if things[0].kind == things[1].kind and not relation and chance(rng, 0.75):
        return f"{same_kind(rng, *things)} {end}"
    homes = [home(thing.kind, picture.scene) for thing in picture.things]
    if relation:
        side = one_of(rng, phrases.SIDES).format(relation)
        plain = f"{first} {pick(rng, ['', 'is', 'stands'])} {side} {second} {end}"
        inverse = f"{side} {second} {pick(rng, ['there is', 'is', 'stands'])} {first} {end}"
        its = f"{second} {end} {one_of(rng, 'and to | with, on | , somewhere to')} its {relation} {first}"
        return pick(rng, [inverse, its, plain, plain, plain, plain])
    if things[0].place:
        places = [place_words(rng, thing.place) for thing in things]
        if things[0].kind == things[1].kind and all(thing.colour for thing in things):
            ones = [f"the {t.place} one {' and '.join(adjectives_of(rng, t))}" for t in things]
            return f"two {plural(noun_of(rng, things[0].kind))} {end}, {ones[0]}{pick(rng, [', ', ' and '])}{ones[1]}"
        if chance(rng, 0.2):
            return f"{places[0]} {first} and {places[1]} {second} {end}"
        if chance(rng, 0.1):
            return bare_list(rng, named)
        return f"{first} {places[0]} {pick(rng, ['and', ',', 'with'])} {second} {places[1]} {end}"
    form = rng.random()
    if form < 0.13 and homes[0] == "sky" != homes[1]:
        doing = pick(rng, ["", verb(rng, things[0].kind, 2), verb(rng, things[0].kind, 1)])
        return f"{first} {doing} {pick(rng, ['above', 'over', 'high above', 'high over'])} {second} {end}"
    if form < 0.2 and homes[1] == "sky" != homes[0]:
        return f"{first} {pick(rng, ['below', 'under', 'beneath', 'underneath'])} {second} {end}"
    if form < 0.24:
        return bare_list(rng, named)
    if form < 0.3 and all(thing.colour for thing in things):
        the, nouns = pick(rng, ["the ", "my ", ""]), [noun_of(rng, thing.kind) for thing in things]
        facts = [f"{the}{n} is {' and '.join(adjectives_of(rng, t))}" for n, t in zip(nouns, things, strict=True)]
        start = f"{one_of(rng, phrases.THERE)} a {nouns[0]} {pick(rng, ['and', 'with'])} a {nouns[1]}"
        looks = f"{the}{nouns[0]} {some(rng, phrases.LOOKS)} {the}{nouns[1]}"
        start = pick(rng, ["", f"{start} {end}. ", f"{start}. ", f"{looks}. "])
        return f"{start}{facts[0]}{pick(rng, [' and ', ', ', '. ', ' '])}{facts[1]} {'' if start else end}"
    if form < 0.38:
        if chance(rng, 0.5):  # "beside the old oak stands a white house"
            beside = pick(rng, ["beside", "next to", "near", "close to", "in front of", "behind"])
            return f"{beside} {second} {verb(rng, things[0].kind, 1)} {first} {end}"
        return f"{first} {some(rng, phrases.LOOKS)} {second} {end}"
    if form < 0.6 and things[0].colour == things[1].colour is not None and unsized:
        shade, nouns = adjectives_of(rng, Thing(None, things[0].colour))[-1], [noun_of(rng, t.kind) for t in things]
        both = " and ".join(pick(rng, [nouns, map(with_article, nouns)]))
        if chance(rng, 0.3):
            return f"{first} and {with_article(nouns[1])} {pick(rng, ['of', 'in'])} the same colour {end}"
        return f"{both}{pick(rng, [', both', ', both', ' both', ', all', ', both in'])} {shade} {end}"
    if form < 0.42 and named.scene:
        link = pick(rng, ["with", "and", ",", "where there are"])
        return f"{setting_first(rng, named.scene, named.time)} {link} {first} and {second}"
    if form < 0.5 and homes[1] == "sky":
        return f"{first} {end} {pick(rng, ['with', 'and'])} {second} {one_of(rng, phrases.SKY)}"
    if form < 0.57 and end:
        return f"{end} {pick(rng, ['', 'there are', 'there is', 'we see', 'are'])} {first} and {second}"
    if form < 0.6:
        return f"{pick(rng, ['there is', 'there are', 'i see'])} {first} and {second} {end}"
    if form < 0.66 and end:
        return f"{first} {end} {pick(rng, ['with', 'and', 'next to', 'beside'])} {second}"
    return f"{first} {one_of(rng, phrases.JOINS)} {second}{', both' if end and chance(rng, 0.1) else ''} {end}"


def same_kind(rng: np.random.Generator, one: Thing, two: Thing) -> str:
    """ "two red balls", "one red and one white flower", "a big and a small star"."""
    noun = noun_of(rng, one.kind)
    if (one.colour, one.size) == (two.colour, two.size):
        adjectives = " ".join(adjectives_of(rng, one))
        if chance(rng, 0.15):
            return f"{with_article(f'{adjectives} {noun}'.strip())} and another {pick(rng, ['', adjectives])} {noun}"
        apart = f", {one_of(rng, phrases.APART)}" if chance(rng, 0.2) else ""
        count = one_of(rng, phrases.TOO_MANY if chance(rng, 0.15) and not apart else phrases.COUNTED)
        return f"{count} {adjectives} {plural(noun)}{apart}"
    facts = [" ".join(adjectives_of(rng, thing)) for thing in (one, two)]
    if not all(facts):
        return f"{with_article(f'{facts[0]} {noun}'.strip())} and {with_article(f'{facts[1]} {noun}'.strip())}"
    form = rng.random()
    if form < 0.25:
        return f"one {facts[0]} and one {facts[1]} {noun}"
    if form < 0.35:
        return f"{plural(noun)}{pick(rng, [': ', ', '])}one {facts[0]}{pick(rng, [', ', ' and '])}one {facts[1]}"
    if form < 0.65:
        return f"{with_article(facts[0])} and {with_article(facts[1])} {noun}"
    if form < 0.75:
        return f"two {plural(noun)}, one {facts[0]} and one {facts[1]}"
    if form < 0.9:
        ones = f"one is {facts[0]}{pick(rng, ['. ', ' and ', ', '])}the other {pick(rng, ['', 'one '])}is {facts[1]}"
        return f"{one_of(rng, phrases.THERE)} two {plural(noun)}. {ones}"
    return f"{with_article(facts[0])} {noun} and {with_article(facts[1])} one"
