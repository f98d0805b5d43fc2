"""The phrases and sentences that captions, tales and people's wishes and chats are made of.

`captions.txt` (captions and tales) and `phrases.txt` (what people type) have in each section either alternatives,
"a | b", the commonest first, or a table of them, "sea = at sea | by the sea". "_" is an empty alternative. The forms of
captions have weights, "{what} {scene} = 2".

`sentences.txt` has in each section whole sentences with slots, "a {noun} that is {colour}", which `wishes.py` and
`chats.py` fill; "3x " before a sentence makes it three times as frequent. The sections "plain ..." have the commonest
ways of saying something, the others what many different people would say.
"""

import re
from pathlib import Path

import numpy as np

from miniature.facts import pick


def read_sections(name: str) -> dict[str, list[str]]:
    """{section: its lines} of a file beside this one. A line "[section]" opens a section, or continues one."""
    sections, lines = {}, []
    for line in Path(__file__).with_name(name).read_text("utf-8").splitlines():
        count, _, sentence = line.partition("x ")
        if line.startswith("["):
            lines = sections.setdefault(line.strip("[]"), [])
        elif line:
            lines += [sentence] * int(count) if count.isdigit() else [line]
    return sections


def alternatives(lines: list[str]) -> str | dict[str, str]:
    if " = " in lines[0]:
        return dict(line.split(" = ") for line in lines)
    return " | ".join(lines).replace("_", "")


CAPTIONS, PHRASES = (
    {section: alternatives(lines) for section, lines in read_sections(name).items()}
    for name in ("captions.txt", "phrases.txt")
)
SENTENCES = read_sections("sentences.txt")
ORDINARY = Path(__file__).with_name("ordinary.txt").read_text("utf-8").split()  # everyday words without a picture
SLOT = re.compile(r"\{(.+?)\}")


def choices(phrases: str) -> list[str]:
    """ "a | b" -> ["a", "b"]."""
    return phrases.split(" | ")


def usual(rng: np.random.Generator, phrases: str) -> str:
    """One of "a | b | c": the first, the usual one, with a chance of 0.4, otherwise any of them, it included."""
    options = choices(phrases)
    return options[0] if rng.random() < 0.4 else pick(rng, options)


def any_of(rng: np.random.Generator, phrases: str) -> str:
    """Any of "a | b | c"."""
    return pick(rng, choices(phrases))


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def sentence(rng: np.random.Generator, *sections: str) -> str:
    """One sentence of one of the sections."""
    return pick(rng, SENTENCES[pick(rng, sections)])


def fill(sentence: str, slots: dict[str, str]) -> str:
    """The sentence with its slots filled: "a {noun}" becomes "an oak", "the {scene}" the sea."""
    sentence = re.sub(r"\b[Aa]n? " + SLOT.pattern, lambda slot: with_article(slots[slot[1]]), sentence)
    sentence = SLOT.sub(lambda slot: slots[slot[1]], sentence)
    return re.sub(r"\b(an?|the|my|our|this) (an?|the) ", r"\1 ", sentence)
