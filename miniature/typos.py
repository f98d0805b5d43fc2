"""What people's typing adds to what they ask for: typos, words that sound alike, and words that mean nothing here."""

from pathlib import Path
from string import ascii_lowercase

import numpy as np

from miniature.facts import chance, pick
from miniature.words import one_of, tidy

TYPOS, SOUND_ALIKE = 0.2, 0.05  # shares of texts with typos, and with words that sound like those meant
CHATTER = 0.3  # share of texts with words around them that say nothing of a picture
# Words of everyday English that say nothing of a picture: who reads them has to pass over them.
ORDINARY = Path(__file__).with_name("ordinary.txt").read_text("utf-8").split()
OPENERS = (
    "hello there, | dear friend, | dear machine, | ok so | so basically | well, | hmm | hey you, | i wonder, | "
    "listen, | to be honest, | my teacher said | for my homework: | my mother asked me for this: | i am 6 years old "
    "and | good evening. | good morning to you. | sorry to bother you but | if it is not too much trouble, | for "
    "once, | ok hear me out, | i am no artist but | you know what? | mommy says | quick, | omg | wow so | come on, "
    "| i have been thinking all day, | we are decorating the room, | it is for a present. | my friends told me "
    "about you. | as a child i had it in my book: | you are so good at this. | i hope you can do this: | first of "
    "all | finally"
)
CLOSERS = (
    ", please and thank you | , nothing else | , nothing fancy | , thank you so much | , obviously | , if you can | "
    ", for the wall of my room | , because i love it | , that is all i want | , i guess | , you know | , haha | , "
    "or so | , as always | , if that is all right with you | , just like in my book | , no hurry | , it makes me "
    "happy | , my favourite of all | , i think | , thank you very much sir | , take your time | , be careful | , "
    "surprise me | , as nice as you can | . it would mean a lot to me. | . my wife will love it. | . i need it for "
    "school. | . amen"
)
SOUNDS_LIKE = {  # typos that are words themselves
    "sea": "see",
    "blue": "blew",
    "red": "read",
    "flower": "flour",
    "kite": "kit",
    "night": "knight",
    "boat": "boot",
    "car": "care",
    "house": "hose",
    "bird": "birth",
    "star": "stare",
    "cat": "cut",
    "ball": "bald",
    "fish": "fist",
    "pink": "pint",
    "white": "wide",
    "city": "cite",
    "desert": "dessert",
    "left": "lift",
    "right": "write",
}


def chatter(rng: np.random.Generator) -> str:
    """One to six words that say nothing of a picture."""
    return " ".join(pick(rng, ORDINARY) for _ in range(1 + int(rng.integers(6))))


def padded(rng: np.random.Generator, text: str) -> str:
    """The text after an opening, before a closing, or with ordinary words before it, behind it and in it."""
    if chance(rng, 0.5):
        opener, closer = pick(rng, [(True, False), (True, False), (False, True), (True, True)])
        return f"{one_of(rng, OPENERS) if opener else ''} {text}{one_of(rng, CLOSERS) if closer else ''}"
    parts = text.split()
    for _ in range(1 + int(rng.integers(2))):
        at = pick(rng, [0, len(parts), int(rng.integers(len(parts) + 1))])
        parts.insert(at, chatter(rng))
    return " ".join(parts)


def typo(rng: np.random.Generator, word: str) -> str:
    """A letter swapped with the next, doubled, left out, or another one. The first letter mostly stays."""
    i = int(rng.integers(1 if chance(rng, 0.85) else 0, len(word)))
    how = rng.random()
    if how < 0.3 and i + 1 < len(word):
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if how < 0.55:
        return word[:i] + word[i + 1 :]
    if how < 0.75:
        return word[:i] + word[i] + word[i:]
    return word[:i] + pick(rng, ascii_lowercase) + word[i + (how < 0.92) :]


def typed(rng: np.random.Generator, text: str, typos: float = TYPOS) -> str:
    """The text with one or two typos or with words that sound like its own, in most cases as it is."""
    parts = text.split()
    if chance(rng, min(typos, SOUND_ALIKE)):
        parts = [SOUNDS_LIKE.get(part, part) for part in parts]
    if chance(rng, typos):
        for _ in range(1 + int(rng.integers(2))):
            i = int(rng.integers(len(parts)))
            if len(parts[i]) > 2 and parts[i].isalpha():
                parts[i] = typo(rng, parts[i])
    return tidy(" ".join(parts))
