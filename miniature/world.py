"""The miniature world: a picture book in which every fact of every picture is known, in as many samples as wanted.

    python miniature/world.py --sheet --out sheet.png            # look at it
    python miniature/world.py pairs --n 100000 --seed 1 --out pairs.tar
    python miniature/world.py stories --n 20000 --seed 1 --out stories.tar
    python miniature/world.py dialogues --n 20000 --seed 1 --out dialogues.tar --split held-out

It stands in for CC3M, VIST and MMDialog when the miniature is trained. Parts: `facts.py` what can be in a picture and
what is held out of training, `paint.py` and `backdrop.py` the drawing, `words.py` captions and their reader,
`tales.py` stories and dialogues; here the tars, in the formats of the real data sets, and the contact sheet.

Sample i of a seed is always the same, whatever n: its generator is PCG64 seeded with (seed, i, purpose). The members
of a tar carry no dates or owners, so that equal arguments give equal files.

| file      | members of sample KEY                                                                    |
| --------- | ---------------------------------------------------------------------------------------- |
| pairs     | KEY.png; KEY.txt: the caption; KEY.json: {"caption", "label", "jitter"}                  |
| stories   | KEY.json: {"kind": "story", "jitter", "turns": [{"text", "image", "label"}]}; KEY.0.png, ... |
| dialogues | the same with "kind": "dialog"; "image" and "label" are null where a turn has no picture |
"""

import argparse
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator
from itertools import count, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.files import written_whole
from miniature.facts import (
    COLOURS,
    KINDS,
    PLACES,
    SCENES,
    SIZES,
    SPLITS,
    TIMES,
    Picture,
    Thing,
    fits,
    held_out,
    home,
    random_stream,
    sample_picture,
)
from miniature.paint import draw
from miniature.tales import Turn, dialogue, story
from miniature.words import agrees, caption, facts_in

__all__ = [
    "COLOURS",
    "KINDS",
    "PLACES",
    "SCENES",
    "SIZES",
    "SPLITS",
    "TIMES",
    "Picture",
    "Thing",
    "Turn",
    "agrees",
    "caption",
    "dialogue",
    "draw",
    "facts_in",
    "fits",
    "held_out",
    "home",
    "random_stream",
    "sample_dialogue",
    "sample_pair",
    "sample_picture",
    "sample_story",
    "sheet",
    "story",
    "write_dialogues",
    "write_pairs",
    "write_stories",
]
PAIRS, STORIES, DIALOGUES, SHEET = range(4)  # purposes of the random streams


def new_jitter(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 31))


def sample_pair(seed: int, index: int, split: str = "train", things: int | None = None) -> tuple[Picture, str, int]:
    """Sample `index`: (picture, caption, jitter seed for `draw`)."""
    rng = random_stream(seed, index, PAIRS)
    picture = sample_picture(rng, split, things)
    return picture, caption(picture, rng), new_jitter(rng)


def sample_story(seed: int, index: int, split: str = "train") -> tuple[list[Turn], int]:
    rng = random_stream(seed, index, STORIES)
    return story(rng, split), new_jitter(rng)


def sample_dialogue(seed: int, index: int, split: str = "train") -> tuple[list[Turn], int]:
    rng = random_stream(seed, index, DIALOGUES)
    return dialogue(rng, split), new_jitter(rng)


# ---- tars


def png(picture: Picture, jitter: int, size: int) -> bytes:
    buffer = io.BytesIO()
    draw(picture, jitter, size).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with written_whole(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_json(content: dict) -> bytes:
    return json.dumps(content).encode()


def write_pairs(path: Path, n: int, seed: int, split: str = "train", size: int = 64) -> None:
    """`n` captioned pictures as CC3M's webdataset tars hold them."""

    def members():
        for i in range(n):
            picture, text, jitter = sample_pair(seed, i, split)
            yield f"{i:09d}.png", png(picture, jitter, size)
            yield f"{i:09d}.txt", text.encode()
            yield f"{i:09d}.json", as_json({"caption": text, "label": picture.label(), "jitter": jitter})

    write_tar(path, members())


def interleaved(sample, kind: str, n: int, seed: int, split: str, size: int) -> Iterator[tuple[str, bytes]]:
    for i in range(n):
        turns, jitter = sample(seed, i, split)
        names = [f"{i:09d}.{k}.png" if turn.picture else None for k, turn in enumerate(turns)]
        told = [
            {"text": turn.text, "image": name, "label": turn.picture.label() if turn.picture else None}
            for turn, name in zip(turns, names, strict=True)
        ]
        yield f"{i:09d}.json", as_json({"kind": kind, "jitter": jitter, "turns": told})
        yield from ((name, png(turn.picture, jitter, size)) for turn, name in zip(turns, names, strict=True) if name)


def write_stories(path: Path, n: int, seed: int, split: str = "train", size: int = 64) -> None:
    """`n` stories as an interleaved tar: every turn has a text and a picture."""
    write_tar(path, interleaved(sample_story, "story", n, seed, split, size))


def write_dialogues(path: Path, n: int, seed: int, split: str = "train", size: int = 64) -> None:
    """`n` dialogues as an interleaved tar: even turns are the human's, odd ones the assistant's."""
    write_tar(path, interleaved(sample_dialogue, "dialog", n, seed, split, size))


# ---- the contact sheet


def text_lines(text: str, font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return lines


def sheet(seed: int = 0) -> Image.Image:
    """All scenes by day, at sunset and at night with captions, a story, then all kinds in all colours."""
    font, side, gap, text = ImageFont.load_default(11), 136, 12, 72
    cell, tiny, margin = side + gap, 64 + 5, 60
    top = gap + 4 * (side + text) + 14
    page = Image.new("RGB", (6 * cell + gap, top + len(COLOURS) * tiny + gap), (252, 250, 245))
    pen = ImageDraw.Draw(page)

    def show(row, column, picture, words, jitter):
        x, y = gap + column * cell, gap + row * (side + text)
        page.paste(draw(picture, jitter, side), (x, y))
        for i, line in enumerate(text_lines(words, font, side)):
            pen.text((x, y + side + 2 + 13 * i), line, "black", font)

    for (column, scene), (row, time) in product(enumerate(SCENES), enumerate(TIMES)):
        rng = random_stream(seed, len(TIMES) * column + row, SHEET)
        drawn = (sample_picture(rng) for _ in count())
        picture = next(picture for picture in drawn if (picture.scene, picture.time) == (scene, time))
        show(row, column, picture, caption(picture, rng), new_jitter(rng))
    turns, jitter = sample_story(seed, 3)
    for column, turn in enumerate(turns):
        show(3, column, turn.picture, turn.text, jitter)

    for (j, kind), (i, colour) in product(enumerate(KINDS), enumerate(COLOURS)):
        x, y = margin + j * tiny, top + i * tiny
        scenes = [scene for scene in SCENES if home(kind, scene)]
        thing = Thing(kind, colour, SIZES[(i + j) % 2], PLACES[(i + 2 * j) % 3])
        picture = Picture(scenes[(i + j) % len(scenes)], TIMES[(2 * j + i) % 3], (thing,))
        page.paste(draw(picture, 31 * i + j, 64), (x, y))
        if i == 0:
            pen.text((x, y - 14), kind, "black", font)
        if j == 0:
            pen.text((gap, y + 26), colour, "black", font)
    return page


# ---- command line


def arguments(argv: list[str] | None) -> argparse.Namespace:
    def number(least: int, most: int | None = None):
        def read(text: str) -> int:
            value = int(text)
            if value < least or (most is not None and value > most):
                raise argparse.ArgumentTypeError(f"{value} is not from {least} to {most or 'any number'}")
            return value

        read.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"
        return read

    parser = argparse.ArgumentParser(description="Draw the miniature world: a contact sheet, or tars of samples.")
    parser.add_argument("what", nargs="?", choices=("pairs", "stories", "dialogues"), help="samples to write as a tar")
    parser.add_argument("--sheet", action="store_true", help="draw a contact sheet instead (PNG)")
    parser.add_argument("--n", type=number(1), default=1000, help="samples (default %(default)s)")
    parser.add_argument("--seed", type=number(0), default=0, help="0 or more (default %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default %(default)s")
    parser.add_argument("--size", type=number(16, 1024), default=64, help="pixels a side (default %(default)s)")
    parser.add_argument("--out", type=Path, help="file to write (default sheet.png, or WHAT.tar)")
    args = parser.parse_args(argv)
    if args.sheet == bool(args.what):
        parser.error("say one of pairs, stories, dialogues, or --sheet")
    args.out = args.out or Path("sheet.png" if args.sheet else f"{args.what}.tar")
    if not args.out.parent.is_dir():
        parser.error(f"--out: no such folder {args.out.parent}")
    if os.path.isdir(args.out):  # unlike Path.is_dir, false for a name that cannot be
        parser.error(f"--out: {args.out} is a folder")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        if args.sheet:
            with written_whole(args.out) as temporary:
                sheet(args.seed).save(temporary, "PNG")
        else:
            write = {"pairs": write_pairs, "stories": write_stories, "dialogues": write_dialogues}[args.what]
            write(args.out, args.n, args.seed, args.split, args.size)
    except OSError as error:
        sys.exit(f"{args.out}: not written ({error})")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
