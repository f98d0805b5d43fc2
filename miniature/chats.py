"""Chats as people type them: wishes, changes of the last picture in few words, small talk and questions at any time.

    hello                    hello, how nice to meet you.
    a house in the city      (a house that is big and red on the left in the city by day)
    make it blue             (a house that is big and blue on the left in the city by day)
    thanks, now at night     (a house that is big and blue on the left in the city at night)

Every picture of the assistant stands as its description in parentheses; so the next change starts from words. A picture
that somebody shows is read as such.
"""

from dataclasses import replace

import numpy as np

from common.texts import plain_words, words_in
from miniature import chat_phrases, facts, phrases, words
from miniature.facts import Picture, Thing, chance, fits, held_out, pick, pick_other, pick_weighted, sample_thing
from miniature.tales import LIKES, SEES, SHOWS, TALK, TOWARDS, cast, questions, talk_about
from miniature.typos import CHATTER, OPENERS, ORDINARY, TYPOS, chatter, padded, typed
from miniature.wishes import noun_of, place_words, said, scene_words, thing_phrase, time_words, wish
from miniature.words import choices, describe, facts_in, from_left, one_of, plural, some
from prompts import Turn

WORDS = 203  # purpose of the random streams


def changed_thing(picture: Picture, i: int, **changes) -> Picture | None:
    """The picture with other facts of thing i, which now comes first: who describes it begins with the thing that was
    named, and knows whose the new facts are. None where that does not fit or is held out."""
    thing = replace(picture.things[i], **changes)
    things = (thing, *picture.things[:i], *picture.things[i + 1 :])
    if not fits(things, picture.scene) or held_out(thing.kind, thing.colour, picture.scene):
        return None
    return replace(picture, things=things)


def target(rng: np.random.Generator, picture: Picture) -> tuple[int, str]:
    """One of the things and what it is called: "it" if it is the only one."""
    i = int(rng.integers(len(picture.things)))
    thing, alone = picture.things[i], len(picture.things) == 1
    if alone and chance(rng, 0.7):
        return i, pick(rng, ["it", "it", "it", "this", "that one"])
    if not alone and picture.things[0].kind == picture.things[1].kind:
        if chance(rng, 0.3):
            return i, "one of them"
        other = picture.things[1 - i]
        fact = pick(rng, [name for name in ("colour", "size", "place") if getattr(thing, name) != getattr(other, name)])
        return i, f"the {getattr(thing, fact)} {pick(rng, ['one', thing.kind])}"
    if not alone and thing.colour != picture.things[1 - i].colour and chance(rng, 0.1):
        return i, f"the {thing.colour} one"
    name = noun_of(rng, thing.kind) if chance(rng, 0.3) else thing.kind
    return i, f"the {thing.colour + ' ' if chance(rng, 0.15) else ''}{name}"


def wished(rng: np.random.Generator, order: str) -> str:
    return one_of(rng, chat_phrases.ORDERS).format(order)


# ---- changes: each takes (rng, picture) to (what is typed, the new picture), or to None where that cannot be


def recolour(rng, picture):
    i, name = target(rng, picture)
    colour = pick_other(rng, facts.COLOURS, picture.things[i].colour)
    word = said(rng, words.COLOUR_WORDS[colour], phrases.MORE_COLOURS[colour])
    after = changed_thing(picture, i, colour=colour)
    alone = len(picture.things) == 1
    orders = [f"make {name} {word}"] * 3 + [f"paint {name} {word}", f"colour {name} {word}", f"turn {name} {word}"]
    orders += [f"change the colour of {name} to {word}", f"change {name} to {word}", f"let {name} be {word}"]
    text = wished(rng, pick(rng, orders))
    if alone and chance(rng, 0.4):
        text = one_of(rng, chat_phrases.RECOLOURS).format(word, picture.things[i].colour)
    elif chance(rng, 0.15):
        text = pick(rng, [f"{name} should be {word}", f"i want {name} to be {word}", f"can {name} be {word}?"])
    return text, after


def recolour_both(rng, picture):
    if len(picture.things) == 1:
        return None
    colour, (one, two) = pick(rng, facts.COLOURS), picture.things
    word = said(rng, words.COLOUR_WORDS[colour], phrases.MORE_COLOURS[colour])
    text = one_of(rng, chat_phrases.BOTH_RECOLOURED).format(word)
    if one.kind == two.kind and chance(rng, 0.3):
        text = f"make the {plural(one.kind)} {word}"
    after = replace(picture, things=(replace(one, colour=colour), replace(two, colour=colour)))
    if any(held_out(thing.kind, colour, picture.scene) for thing in after.things):
        return None
    return wished(rng, text), after


def resize_both(rng, picture):
    if len(picture.things) == 1:
        return None
    size = pick(rng, facts.SIZES)
    after = replace(picture, things=tuple(replace(thing, size=size) for thing in picture.things))
    word = said(rng, words.SIZE_WORDS[size], f"{phrases.MORE_SIZES[size]} | {phrases.COMPARATIVES[size]}")
    text = one_of(rng, chat_phrases.BOTH_RESIZED).format(word)
    return wished(rng, text), after if after != picture and fits(after.things, picture.scene) else None


def resize(rng, picture):
    i, name = target(rng, picture)
    before = picture.things[i].size
    # "make it big" may be said of what is big already
    size = before if chance(rng, 0.15) else "small" if before == "big" else "big"
    called = [said(rng, words.SIZE_WORDS[size], phrases.MORE_SIZES[size]), one_of(rng, phrases.COMPARATIVES[size])]
    word = pick(rng, called if size != before else called[:1])
    after = changed_thing(picture, i, size=size)
    text = wished(rng, pick(rng, [f"make {name} {word}"] * 3 + [f"draw {name} {word}", f"let {name} be {word}"]))
    if len(picture.things) == 1 and chance(rng, 0.4):
        text = one_of(rng, chat_phrases.RESIZES).format(word)
    if size != before and chance(rng, 0.12):
        text = f"{name} is too {before}"
    return text, after


def move(rng, picture):
    i, name = target(rng, picture)
    place = pick_other(rng, facts.PLACES, picture.things[i].place)
    after = changed_thing(picture, i, place=place)
    if after is None and len(picture.things) == 2 and place != "middle":  # the other thing makes room
        other = replace(picture.things[1 - i], place="right" if place == "left" else "left")
        after = changed_thing(replace(picture, things=(picture.things[i], other)), 0, place=place)
    where = place_words(rng, place) if chance(rng, 0.6) else some(rng, TOWARDS[place])
    text = wished(rng, f"{pick(rng, ['put', 'put', 'move', 'place', 'draw', 'shift', 'bring'])} {name} {where}")
    if len(picture.things) == 1 and chance(rng, 0.3):
        text = one_of(rng, chat_phrases.MOVES_IT).format(where)
        if {place, picture.things[0].place} == {"left", "right"} and chance(rng, 0.6):
            text = one_of(rng, chat_phrases.OTHER_SIDE)
    return text, after


def swap(rng, picture):
    if len(picture.things) == 1:
        return None
    one, two = picture.things
    if one.colour != two.colour and chance(rng, 0.4):
        after = replace(picture, things=(replace(one, colour=two.colour), replace(two, colour=one.colour)))
        if any(held_out(thing.kind, thing.colour, picture.scene) for thing in after.things):
            return None
        return one_of(rng, chat_phrases.COLOURS_SWAPPED), after
    after = replace(picture, things=(replace(one, place=two.place), replace(two, place=one.place)))
    return one_of(rng, chat_phrases.SWAPPED), after if fits(after.things, picture.scene) else None


def change_time(rng, picture):
    time = pick_other(rng, facts.TIMES, picture.time)
    when = time_words(rng, time)
    word = pick(rng, {"day": ["day", "daytime", "morning"], "sunset": ["evening", "sunset"], "night": ["night"]}[time])
    text = one_of(rng, chat_phrases.RETIMES).format(when, word, picture.time)
    return text, replace(picture, time=time)


def change_scene(rng, picture):
    scene = pick_other(rng, facts.SCENES, picture.scene)
    after = replace(picture, scene=scene)
    if not fits(after.things, scene) or any(held_out(t.kind, t.colour, scene) for t in after.things):
        return None
    where = scene_words(rng, after)
    it = "it" if len(picture.things) == 1 else pick(rng, ["them", "it all", "everything"])
    text = one_of(rng, chat_phrases.RESCENES).format(where, it, some(rng, words.SCENE_NOUNS[scene]))
    return text, after


def add(rng, picture):
    """A second thing; what is open about it and where it stands is chosen so that it fits."""
    if len(picture.things) == 2:
        return None
    first = picture.things[0]
    other = sample_thing(rng, picture.scene)
    if chance(rng, 0.1):
        other = replace(other, kind=first.kind, colour=first.colour, size=first.size)
    if first.place == "middle" and not fits((first, other), picture.scene):
        first = replace(first, place=pick(rng, ["left", "right"]))  # makes room
    named_place = chance(rng, 0.2)
    places = [replace(other, place=place) for place in ([other.place] if named_place else facts.PLACES)]
    fitting = [placed for placed in places if fits((first, placed), picture.scene)]
    other = pick(rng, fitting) if fitting else None
    if other is None or held_out(other.kind, other.colour, picture.scene):
        return None
    named = Thing(other.kind, other.colour if chance(rng, 0.65) else None, other.size if chance(rng, 0.2) else None)
    phrase = thing_phrase(rng, named)
    if (other.kind, other.colour) == (first.kind, first.colour) and chance(rng, 0.8):
        phrase = one_of(rng, "another one | another {0} | one more | a second one | one more {0}").format(other.kind)
        twin = replace(other, size=first.size)
        other = twin if fits((first, twin), picture.scene) else other
    order = one_of(rng, chat_phrases.ADDS).format(phrase)
    if named_place:
        order = f"{pick(rng, ['add', 'put', 'draw', 'place'])} {phrase} {place_words(rng, other.place)}"
    text = wished(rng, order)
    if not named_place and chance(rng, 0.3):
        text = one_of(rng, chat_phrases.ADDS_TOO).format(phrase)
    return text, replace(picture, things=(first, other))


def remove(rng, picture):
    if len(picture.things) == 1:
        return None
    i, name = target(rng, picture)
    if picture.things[0].kind != picture.things[1].kind and chance(rng, 0.1):
        name = picture.things[i].kind
        text = pick(rng, [f"no {name}", f"without {name}", f"only the {picture.things[1 - i].kind}"])
    else:
        text = wished(rng, one_of(rng, chat_phrases.LESS).format(name))
    return text, replace(picture, things=(picture.things[1 - i],))


def exchange(rng, picture):
    """Another kind in the place of a thing."""
    i, name = target(rng, picture)
    other = sample_thing(rng, picture.scene)
    if any(other.kind == thing.kind for thing in picture.things):
        return None
    colour = chance(rng, 0.4)
    after = changed_thing(picture, i, kind=other.kind, **({"colour": other.colour} if colour else {}))
    if after is not None:  # what stays comes first: what is left of the old facts then belongs to the new thing
        after = replace(after, things=after.things[::-1])
    phrase = thing_phrase(rng, Thing(other.kind, other.colour if colour else None))
    text = one_of(rng, chat_phrases.EXCHANGES).format(phrase, name, picture.things[i].kind)
    if len(picture.things) == 1 and chance(rng, 0.3):
        text = pick(rng, [f"{phrase} instead", f"the same with {phrase}", f"no, {phrase}", f"make it {phrase}"])
    return text, after


def two_changes(rng, picture):
    text, after = pick(rng, [recolour, resize, move])(rng, picture)
    second = after and pick(rng, [change_time, change_scene, add, add])(rng, after)
    if second is None:
        return None
    where = pick(rng, ["and", "and", ","])
    return f"{text.removesuffix('?').removesuffix(' please')} {where} {second[0].removeprefix('and ')}", second[1]


def again(rng, picture):
    return one_of(rng, chat_phrases.AGAIN), picture


CHANGES = {
    recolour: 0.2, recolour_both: 0.06, resize: 0.12, resize_both: 0.04, move: 0.14, change_time: 0.12,
    change_scene: 0.11, add: 0.18, remove: 0.13, exchange: 0.1, two_changes: 0.06, swap: 0.06, again: 0.02,
}  # fmt: skip


def change(rng: np.random.Generator, picture: Picture) -> tuple[str, Picture]:
    made = None
    while made is None or made[1] is None:
        made = pick_weighted(rng, CHANGES)(rng, picture)
    praise = f"{one_of(rng, chat_phrases.PRAISE)}{pick(rng, [', ', '! ', '. '])}" if chance(rng, 0.12) else ""
    return praise + made[0], made[1]


# ---- questions and small talk, answered in words


def question(rng: np.random.Generator, picture: Picture) -> tuple[str, str]:
    i = int(rng.integers(len(picture.things)))
    thing, kinds = picture.things[i], [thing.kind for thing in picture.things]
    if len(set(kinds)) < len(kinds) or chance(rng, 0.25):
        asked = (
            "what do you see? | what is in the picture? | describe it | describe the picture | what is this? | "
            "what did you draw? | tell me what you see"
        )
        return one_of(rng, asked), f"i see {describe(picture)}."
    noun, absent = noun_of(rng, thing.kind), pick_other(rng, facts.KINDS, *kinds)
    *others, (seen, yes) = questions(picture, thing, noun, absent, lambda phrases: choices(phrases)[0])
    others.append((f"is there a {noun}? | {seen}", yes))
    return pick(rng, [(form, answer) for forms, answer in others for form in choices(forms)])


def small_talk(rng: np.random.Generator) -> tuple[str, str]:
    what = rng.random()
    if what < 0.1:
        return talk_about(rng)
    if what < 0.25:
        start = one_of(rng, f"{OPENERS} | i | you | my {one_of(rng, phrases.STRANGERS)} | what | why | it |  | ")
        return f"{start} {chatter(rng)} {chatter(rng)}", chat_phrases.NO_WISH
    if what < 0.45:
        forms, blanks, answer = pick(rng, chat_phrases.TALK_FORMS)
        return one_of(rng, forms).format(one_of(rng, blanks)), answer
    return tuple(choices(pick(rng, chat_phrases.MORE_TALK if what < 0.7 else TALK if what < 0.88 else LIKES)))


# ---- a chat


def bracketed(picture: Picture) -> str:
    return f"({describe(picture)})"


def chat(rng: np.random.Generator, split: str = "train", typos: float = TYPOS) -> list[Turn]:
    """One to five exchanges. A picture is given with the human's turn alone; the assistant's are in parentheses."""
    turns, picture = [], None
    for _ in range(1 + int(rng.integers(5))):
        what, shown = rng.random(), None
        if what < (0.25 if picture is None else 0.16):
            asked, answer = small_talk(rng)
        elif picture is None and what < 0.32:
            asked, answer = change(rng, cast(rng, split))[0], chat_phrases.NO_PICTURE
            if not asked.startswith(("make", "put", "move", "remove", "paint")):
                continue
        elif what < (0.45 if picture is None else 0.2):
            shown = picture = from_left(cast(rng, split))
            asked, answer = some(rng, SHOWS), some(rng, SEES).format(describe(picture))
        elif picture is not None and what < 0.32:
            asked, answer = question(rng, picture)
        elif picture is not None and what < 0.78:
            asked, picture = change(rng, picture)
            asked, answer = padded(rng, asked) if chance(rng, CHATTER / 2) else asked, bracketed(picture)
        else:
            pairs, picture = chance(rng, 0.4), None
            while picture is None or (pairs and len(picture.things) == 1):
                asked, picture = wish(rng, split, typos)
            if turns and facts_in(asked).scene and chance(rng, 0.3):
                asked = one_of(rng, chat_phrases.STARTS_ANEW).format(asked)
            answer = bracketed(picture)
        turns += [Turn(plain_words(typed(rng, asked, typos)), (shown,) if shown else ()), Turn(answer)]
    return turns or chat(rng, split, typos)


# ---- the words of this world


def known_words(texts: int = 32_000) -> list[str]:
    """Every word that wishes and chats are made of, but for the names of what this world does not have and the words
    that say nothing of a picture."""
    nouns = [noun for kind in words.NOUNS for noun in choices(f"{words.NOUNS[kind]} | {phrases.MORE_NOUNS[kind]}")]
    found = {word for noun in nouns for word in words_in(f"{noun} {plural(noun)}")}  # plurals are rare in texts
    for i in range(texts):
        rng = facts.random_stream(0, i, WORDS)
        lines = [turn.text for turn in chat(rng, typos=0.0)[::2]] if i % 2 else [wish(rng, typos=0.0)[0]]
        found.update(word for line in lines for word in words_in(line))
    return sorted(found - {*unknown_words(), *ORDINARY})


def unknown_words() -> list[str]:
    """Names of things and numbers that this world does not have."""
    things = choices(phrases.STRANGERS)
    return sorted({*things, *map(plural, things), *choices(phrases.TOO_MANY), *choices(phrases.STRANGE_COLOURS)})
