"""Texts of the outside world: cleaned as captions are, and spelled right."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from common.files import read_json

SIGNS = str.maketrans("\u2018\u2019\u00b4`", "''''") | {ord("&"): " and ", ord("+"): " and "}


def clean_caption(text: str) -> str:
    """The released code's cleaning: lower case, .!"()*#:;~ to spaces, white space to single spaces."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split())


def clean_prompt(text: str) -> str:
    """What somebody typed, as the miniature reads it: `clean_caption`, with straight apostrophes, "and" for & and +, no
    other signs than commas and question marks."""
    return clean_caption(re.sub(r"[^\w\s,?']|_", " ", text.translate(SIGNS)))


# What an ordinary word may end in: "wants", "asked", "gladly".
ENDINGS = "s", "es", "d", "ed", "r", "er", "ing", "ly", "n't", "'s", "'d", "'ll", "'re", "'ve", "'m"
WORD = r"[^\W\d_]+(?:'[^\W\d_]+)?"


def words_in(text: str) -> list[str]:
    return re.findall(WORD, text)


class Words:
    """The words by which typos are corrected: a word that looks like one of `known` becomes it. `unknown`: common words
    for things that the model cannot draw; where there are none, it knows other words than these, too. `ordinary`: words
    that say nothing of a picture, or only look like a known one. Neither is taken for a typo."""

    def __init__(self, known: Iterable[str] = (), unknown: Iterable[str] = (), ordinary: Iterable[str] = ()):
        self.known, self.unknown, self.ordinary = [*known], {*unknown}, {*ordinary}

    @classmethod
    def of(cls, weights: Path) -> "Words":
        """Those of minigpt5/words.json in a folder of weights; no words where it has no such list."""
        path = weights / "minigpt5" / "words.json"
        return cls(**read_json(path)) if path.is_file() else cls()

    def correction(self, word: str) -> str | None:
        """The known word that is written like this, perhaps with a typo; an ordinary word itself; else None."""
        stems = {word, *(word.removesuffix(ending) + last for ending in ENDINGS for last in ("", "e"))}
        if word in self.known or not 2 <= len(word) <= 40 or stems & self.ordinary:
            return word
        swaps = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
        near = swaps.intersection(self.known) or get_close_matches(word, self.known, 3, 0.75)
        return None if word in self.unknown else max(near, key=lambda other: other[0] == word[0], default=None)

    def read(self, text: str) -> tuple[str, list[str]]:
        """What somebody typed, cleaned by `clean_prompt`, with known words in the place of their typos; and its words
        that are not known, an empty list for a model that knows other words, too."""
        prompt = clean_prompt(text)
        corrections = {word: self.correction(word) for word in words_in(prompt)}
        unknown = [word for word, correction in corrections.items() if self.unknown and correction is None]
        return re.sub(WORD, lambda match: corrections[match[0]] or match[0], prompt) or text, unknown
