"""What typing does to a request: typos, words that sound alike, and words that say nothing of a picture."""

from string import ascii_lowercase

import numpy as np

from miniature.facts import chance, pick
from miniature.phrases import ORDINARY, PHRASES, any_of
from miniature.words import tidy

TYPOS, SOUND_ALIKE = 0.2, 0.05  # shares of texts with typos, and with words that sound like those meant
CHATTER = 0.3  # share of texts with words around them that say nothing of a picture


def chatter(rng: np.random.Generator) -> str:
    """One to six words that say nothing of a picture."""
    return " ".join(pick(rng, ORDINARY) for _ in range(1 + int(rng.integers(6))))


def padded(rng: np.random.Generator, text: str) -> str:
    """The text after an opening, before a closing, or with ordinary words before it, behind it and in it."""
    if chance(rng, 0.5):
        opener, closer = pick(rng, [(True, False), (True, False), (False, True), (True, True)])
        before = any_of(rng, PHRASES["openers"]) if opener else ""
        return f"{before} {text}{any_of(rng, PHRASES['closers']) if closer else ''}"
    parts = text.split()
    for _ in range(1 + int(rng.integers(2))):
        at = pick(rng, [0, len(parts), int(rng.integers(len(parts) + 1))])
        parts.insert(at, chatter(rng))
    return " ".join(parts)


def typo(rng: np.random.Generator, word: str) -> str:
    """The word with one letter swapped with the next, left out, doubled, replaced or added. The first mostly stays."""
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
    """The text with one or two typos, or with words that sound like its own; in most cases unchanged."""
    parts = text.split()
    if chance(rng, min(typos, SOUND_ALIKE)):
        parts = [PHRASES["sounds like"].get(part, part) for part in parts]
    if chance(rng, typos):
        for _ in range(1 + int(rng.integers(2))):
            i = int(rng.integers(len(parts)))
            if len(parts[i]) > 2 and parts[i].isalpha():
                parts[i] = typo(rng, parts[i])
    return tidy(" ".join(parts))
