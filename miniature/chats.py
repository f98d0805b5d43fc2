"""Chats as people type them: wishes, changes of the last picture in few words, small talk and questions at any time.

    hello                    hello, how nice to meet you.
    a house in the city      (a house that is big and red on the left in the city by day)
    make it blue             (a house that is big and blue on the left in the city by day)
    thanks, now at night     (a house that is big and blue on the left in the city at night)

The assistant's pictures are descriptions in parentheses, so that the next change starts from words. The pictures that
the human shows stay pictures. Words first is trained on these chats; tales.py has the dialogues for stage 2.
"""

from collections import Counter
from dataclasses import replace

import numpy as np

from common.texts import clean_prompt, words_in
from miniature import facts, words
from miniature.facts import Picture, Thing, chance, fits, held_out, pick, pick_other, pick_weighted, sample_thing
from miniature.phrases import CAPTIONS, ORDINARY, PHRASES, SENTENCES, SLOT, any_of, choices, fill, sentence, usual
from miniature.tales import questions, sample_distinct, talk_about
from miniature.typos import CHATTER, TYPOS, chatter, padded, typed
from miniature.wishes import fact_phrase, other_size, scene_words, thing_phrase, wish
from miniature.words import describe, facts_in, from_left, plural
from prompts import Turn

WORDS = 203  # purpose of the random streams
NO_WISH = "i draw small pictures. ask me for one."
NO_PICTURE = "there is no picture yet. what shall i draw?"


def change_thing(picture: Picture, i: int, **changes) -> Picture | None:
    """The picture with other facts of thing i, which now comes first: the description then begins with the thing that
    the human named, and a model knows whose the new facts are. None where the result does not fit or is held out."""
    thing = replace(picture.things[i], **changes)
    things = (thing, *picture.things[:i], *picture.things[i + 1 :])
    if not fits(things, picture.scene) or held_out(thing.kind, thing.colour, picture.scene):
        return None
    return replace(picture, things=things)


def choose_thing(rng: np.random.Generator, picture: Picture) -> tuple[int, str]:
    """The index of one of the things, and a name for it: mostly "it" if it is the only one."""
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
    name = fact_phrase(rng, "nouns", thing.kind) if chance(rng, 0.3) else thing.kind
    return i, f"the {thing.colour + ' ' if chance(rng, 0.15) else ''}{name}"


def order_text(rng: np.random.Generator, *sections: str, **slots: str) -> str:
    """The text of an order: a sentence of one of the sections, in half of the cases of one of their plain sections."""
    plain = [f"plain {section}" for section in sections if f"plain {section}" in SENTENCES]
    if plain and chance(rng, 0.5):
        return any_of(rng, PHRASES["orders"]).format(fill(sentence(rng, *plain), slots))
    return fill(sentence(rng, *sections), slots)


# ---- changes: each returns (what is typed, new picture); None or (text, None) where it cannot be made


def recolour(rng, picture):
    i, name = choose_thing(rng, picture)
    colour, old = pick_other(rng, facts.COLOURS, picture.things[i].colour), picture.things[i].colour
    section = "recolour alone" if len(picture.things) == 1 and chance(rng, 0.5) else "recolour"
    text = order_text(rng, section, it=name, colour=fact_phrase(rng, "colours", colour), old=old)
    return text, change_thing(picture, i, colour=colour)


def recolour_both(rng, picture):
    if len(picture.things) == 1:
        return None
    colour, (one, two) = pick(rng, facts.COLOURS), picture.things
    if any(held_out(thing.kind, colour, picture.scene) for thing in picture.things):
        return None
    nouns = f"the {plural(one.kind)}" if one.kind == two.kind else "both of them"
    text = order_text(rng, "recolour both", colour=fact_phrase(rng, "colours", colour), nouns=nouns)
    return text, replace(picture, things=(replace(one, colour=colour), replace(two, colour=colour)))


def resize_both(rng, picture):
    if len(picture.things) == 1:
        return None
    size = pick(rng, facts.SIZES)
    after = replace(picture, things=tuple(replace(thing, size=size) for thing in picture.things))
    bigger = any_of(rng, PHRASES["compared"][size])
    text = order_text(rng, "resize both", size=fact_phrase(rng, "sizes", size), bigger=bigger)
    return text, after if after != picture and fits(after.things, picture.scene) else None


def resize(rng, picture):
    i, name = choose_thing(rng, picture)
    old = picture.things[i].size
    if chance(rng, 0.1):  # "make it big", though it is big already
        return f"make {name} {fact_phrase(rng, 'sizes', old)}", change_thing(picture, i)
    size, alone = other_size(old), len(picture.things) == 1 and chance(rng, 0.5)
    slots = {"it": name, "size": fact_phrase(rng, "sizes", size), "bigger": any_of(rng, PHRASES["compared"][size])}
    return order_text(rng, "resize alone" if alone else "resize", old=old, **slots), change_thing(picture, i, size=size)


def move(rng, picture):
    i, name = choose_thing(rng, picture)
    place, old = pick_other(rng, facts.PLACES, picture.things[i].place), picture.things[i].place
    after = change_thing(picture, i, place=place)
    if after is None and len(picture.things) == 2 and place != "middle":  # the other thing makes room
        other = replace(picture.things[1 - i], place="right" if place == "left" else "left")
        after = change_thing(replace(picture, things=(picture.things[i], other)), 0, place=place)
    where = fact_phrase(rng, "places", place) if chance(rng, 0.6) else usual(rng, CAPTIONS["towards"][place])
    alone = len(picture.things) == 1 and chance(rng, 0.5)
    if alone and {place, old} == {"left", "right"} and chance(rng, 0.3):
        return order_text(rng, "other side"), after
    return order_text(rng, "move alone" if alone else "move", it=name, place=where), after


def swap(rng, picture):
    if len(picture.things) == 1:
        return None
    one, two = picture.things
    if one.colour != two.colour and chance(rng, 0.4):
        after = replace(picture, things=(replace(one, colour=two.colour), replace(two, colour=one.colour)))
        if any(held_out(thing.kind, thing.colour, picture.scene) for thing in after.things):
            return None
        return order_text(rng, "swap colours"), after
    after = replace(picture, things=(replace(one, place=two.place), replace(two, place=one.place)))
    return order_text(rng, "swap places"), after if fits(after.things, picture.scene) else None


def change_time(rng, picture):
    time = pick_other(rng, facts.TIMES, picture.time)
    nouns = {"day": "day | daytime | morning", "sunset": "evening | sunset", "night": "night"}
    slots = {"time": any_of(rng, nouns[time]), "old": any_of(rng, nouns[picture.time])}
    return order_text(rng, "time", **{"at time": fact_phrase(rng, "times", time)}, **slots), replace(picture, time=time)


def change_scene(rng, picture):
    scene = pick_other(rng, facts.SCENES, picture.scene)
    after = replace(picture, scene=scene)
    if not fits(after.things, scene) or any(held_out(t.kind, t.colour, scene) for t in after.things):
        return None
    it = "it" if len(picture.things) == 1 else pick(rng, ["them", "it all", "everything"])
    nouns = CAPTIONS["scene nouns"]
    slots = {"scene": usual(rng, nouns[scene]), "old": usual(rng, nouns[picture.scene])}
    return order_text(rng, "scene", it=it, **{"in scene": scene_words(rng, after)}, **slots), after


def add(rng, picture):
    """A second thing, with a place where it fits. Its text names some of its facts."""
    if len(picture.things) == 2:
        return None
    first = picture.things[0]
    other = sample_thing(rng, picture.scene)
    if chance(rng, 0.1):
        other = replace(other, kind=first.kind, colour=first.colour, size=first.size)
    if first.place == "middle" and not fits((first, other), picture.scene):
        first = replace(first, place=pick(rng, ["left", "right"]))  # makes room
    names_place = chance(rng, 0.2)
    placed = [replace(other, place=place) for place in ([other.place] if names_place else facts.PLACES)]
    fitting = [thing for thing in placed if fits((first, thing), picture.scene)]
    other = pick(rng, fitting) if fitting else None
    if other is None or held_out(other.kind, other.colour, picture.scene):
        return None
    subset = Thing(other.kind, other.colour if chance(rng, 0.65) else None, other.size if chance(rng, 0.2) else None)
    phrase = thing_phrase(rng, subset)
    if names_place:
        phrase = f"{phrase} {fact_phrase(rng, 'places', other.place)}"
    text = order_text(rng, "add", thing=phrase)
    if (other.kind, other.colour) == (first.kind, first.colour) and not names_place and chance(rng, 0.8):
        text = order_text(rng, "add twin", noun=other.kind)
        twin = replace(other, size=first.size)
        other = twin if fits((first, twin), picture.scene) else other
    return text, replace(picture, things=(first, other))


def remove(rng, picture):
    if len(picture.things) == 1:
        return None
    i, name = choose_thing(rng, picture)
    kind, other = picture.things[i].kind, picture.things[1 - i].kind
    if kind != other and chance(rng, 0.1):
        text = order_text(rng, "leave out", kind=kind, other=other)
    else:
        text = order_text(rng, "remove", it=name)
    return text, replace(picture, things=(picture.things[1 - i],))


def exchange(rng, picture):
    """A thing of another kind in the place of one that is there."""
    i, name = choose_thing(rng, picture)
    other = sample_thing(rng, picture.scene)
    if any(other.kind == thing.kind for thing in picture.things):
        return None
    new_colour = chance(rng, 0.4)
    after = change_thing(picture, i, kind=other.kind, **({"colour": other.colour} if new_colour else {}))
    if after is not None:  # the thing that stays comes first: the old facts behind it then belong to the new thing
        after = replace(after, things=after.things[::-1])
    phrase = thing_phrase(rng, Thing(other.kind, other.colour if new_colour else None))
    section = "exchange alone" if len(picture.things) == 1 and chance(rng, 0.3) else "exchange"
    return order_text(rng, section, thing=phrase, it=name, kind=picture.things[i].kind), after


def two_changes(rng, picture):
    text, after = pick(rng, [recolour, resize, move])(rng, picture)
    second = after and pick(rng, [change_time, change_scene, add, add])(rng, after)
    if second is None:
        return None
    parts = [part.removesuffix("?").removesuffix(" please").removeprefix("and ") for part in (text, second[0])]
    return order_text(rng, "two changes", change1=parts[0], change2=parts[1]), second[1]


def again(rng, picture):
    return order_text(rng, "again"), picture


CHANGES = {
    recolour: 0.2, recolour_both: 0.06, resize: 0.12, resize_both: 0.04, move: 0.14, change_time: 0.12,
    change_scene: 0.11, add: 0.18, remove: 0.13, exchange: 0.1, two_changes: 0.06, swap: 0.06, again: 0.02,
}  # fmt: skip


def change(rng: np.random.Generator, picture: Picture) -> tuple[str, Picture]:
    result = None
    while result is None or result[1] is None:
        result = pick_weighted(rng, CHANGES)(rng, picture)
    praise = f"{any_of(rng, PHRASES['praise'])}{pick(rng, [', ', '! ', '. '])}" if chance(rng, 0.12) else ""
    return praise + result[0], result[1]


# ---- questions and small talk, answered in words


def question(rng: np.random.Generator, picture: Picture) -> tuple[str, str]:
    i = int(rng.integers(len(picture.things)))
    thing, kinds = picture.things[i], [thing.kind for thing in picture.things]
    if len(set(kinds)) < len(kinds) or chance(rng, 0.25):
        forms = (
            "what do you see? | what is in the picture? | describe it | describe the picture | what is this? | "
            "what did you draw? | tell me what you see"
        )
        return any_of(rng, forms), f"i see {describe(picture)}."
    noun, absent = fact_phrase(rng, "nouns", thing.kind), pick_other(rng, facts.KINDS, *kinds)
    *others, (form, yes) = questions(picture, thing, noun, absent, lambda phrases: choices(phrases)[0])
    others.append((f"is there a {noun}? | {form}", yes))
    return pick(rng, [(form, answer) for forms, answer in others for form in choices(forms)])


def small_talk(rng: np.random.Generator) -> tuple[str, str]:
    what = rng.random()
    if what < 0.06:
        return talk_about(rng)
    if what < 0.15:
        start = any_of(rng, f"i | you | what | why |  | my {any_of(rng, PHRASES['strangers'])} | {PHRASES['openers']}")
        return f"{start} {chatter(rng)} {chatter(rng)}", NO_WISH
    if what < 0.3:
        forms, blanks, answer = sentence(rng, "talk forms").split(" = ")
        return any_of(rng, forms).format(any_of(rng, blanks)), answer
    if what < 0.8:
        return tuple(choices(sentence(rng, "talk")))
    return pick(rng, list(CAPTIONS["talk" if what < 0.93 else "likes"].items()))


# ---- a chat


def bracketed(picture: Picture) -> str:
    return f"({describe(picture)})"


def chat(rng: np.random.Generator, split: str = "train", typos: float = TYPOS) -> list[Turn]:
    """One to five exchanges. Only human turns hold pictures; the assistant's are descriptions in parentheses."""
    turns, picture = [], None
    for _ in range(1 + int(rng.integers(5))):
        what, pictures = rng.random(), ()
        if what < (0.25 if picture is None else 0.16):
            request, answer = small_talk(rng)
        elif picture is None and what < 0.32:
            request, answer = change(rng, sample_distinct(rng, split))[0], NO_PICTURE
            if not request.startswith(("make", "put", "move", "remove", "paint")):
                continue
        elif what < (0.45 if picture is None else 0.2):
            picture = from_left(sample_distinct(rng, split))
            pictures, request = (picture,), usual(rng, CAPTIONS["shows"])
            answer = usual(rng, CAPTIONS["sees"]).format(describe(picture))
        elif picture is not None and what < 0.32:
            request, answer = question(rng, picture)
        elif picture is not None and what < 0.78:
            request, picture = change(rng, picture)
            request, answer = padded(rng, request) if chance(rng, CHATTER / 2) else request, bracketed(picture)
        else:
            wants_two, picture = chance(rng, 0.4), None
            while picture is None or (wants_two and len(picture.things) == 1):
                request, picture = wish(rng, split, typos)
            if turns and facts_in(request).scene and chance(rng, 0.3):
                request = fill(sentence(rng, "anew"), {"wish": request})
            answer = bracketed(picture)
        turns += [Turn(clean_prompt(typed(rng, request, typos)), pictures), Turn(answer)]
    return turns or chat(rng, split, typos)


# ---- the words of this world


def noun_words() -> set[str]:
    """Every name of a thing, and its plural. Most of them are rare in the texts of this world."""
    nouns = [noun for kind in words.NOUNS for noun in choices(f"{words.NOUNS[kind]} | {PHRASES['nouns'][kind]}")]
    return {word for noun in nouns for word in words_in(f"{noun} {plural(noun)}")}


def known_words(texts: int = 32_000) -> list[str]:
    """The words of `texts` wishes and chats, without `unknown_words` and `ordinary_words`."""
    vocabulary = noun_words()
    for i in range(texts):
        rng = facts.random_stream(0, i, WORDS)
        lines = [turn.text for turn in chat(rng, typos=0.0)[::2]] if i % 2 else [wish(rng, typos=0.0)[0]]
        vocabulary.update(word for line in lines for word in words_in(line))
    return sorted(vocabulary - {*unknown_words(), *ordinary_words()})


def unknown_words() -> list[str]:
    """Names of things and numbers that this world does not have."""
    things = choices(PHRASES["strangers"])
    return sorted({*things, *map(plural, things), *choices(PHRASES["too many"]), *choices(PHRASES["strange colours"])})


def ordinary_words(rare: int = 4) -> list[str]:
    """Everyday words that say nothing of a picture: those of ordinary.txt, and those that occur in fewer than `rare`
    sentences, if no phrase and no plain sentence has them."""
    phrases = [text for table in PHRASES.values() for text in (table.values() if isinstance(table, dict) else [table])]
    common, others = noun_words() | {word for text in phrases for word in words_in(text)}, Counter()
    for section, lines in SENTENCES.items():
        for line in lines:
            sentence_words = {*words_in(clean_prompt(SLOT.sub(" ", line)))}
            if section.startswith("plain"):
                common |= sentence_words
            else:
                others.update(sentence_words)
    return sorted({*ORDINARY, *(word for word, count in others.items() if count < rare and word not in common)})
