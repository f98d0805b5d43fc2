"""The miniature world: a picture book in which every fact of every picture is known, in as many samples as wanted.

    python miniature/world.py pairs --n 100000 --seed 1 --out pairs.tar
    python miniature/world.py stories --n 20000 --seed 1 --out stories.tar
    python miniature/world.py dialogues --n 20000 --seed 1 --out dialogues.tar --split held-out

It stands in for CC3M, VIST and MMDialog when the miniature is trained. Parts: `facts.py` what can be in a picture and
what is held out of training, `paint.py` and `backdrop.py` the drawing, `words.py` captions and their reader,
`tales.py` stories and dialogues; here the tars, in the formats of the real data sets.

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
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import read_arguments, run
from common.files import written_whole
from miniature.facts import SPLITS, Picture, random_stream, sample_picture
from miniature.paint import draw
from miniature.tales import Turn, dialogue, story
from miniature.words import caption

PAIRS, STORIES, DIALOGUES = range(3)  # purposes of the random streams


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


WRITERS = {"pairs": write_pairs, "stories": write_stories, "dialogues": write_dialogues}


# ---- command line


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw samples of the miniature world into a tar.")
    parser.add_argument("what", choices=WRITERS, help="samples to write")
    parser.add_argument("--n", type=int, default=1000, help="samples")
    parser.add_argument("--seed", type=int, default=0, help="0 or more")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--size", type=int, default=64, help="pixels a side, 16 to 1024")
    parser.add_argument("--out", type=Path, help="file to write; default: WHAT.tar")
    args = read_arguments(parser, argv)
    if args.n < 1 or not 16 <= args.size <= 1024:
        parser.error("--n is at least 1, --size from 16 to 1024")
    args.out = args.out or Path(f"{args.what}.tar")
    if args.out.is_dir():
        parser.error(f"--out: {args.out} is a folder")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    WRITERS[args.what](args.out, args.n, args.seed, args.split, args.size)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
