"""The miniature world: a drawn world of which any number of samples can be made, with every fact of their pictures.

    python miniature/world.py pairs --n 100000 --seed 1 --out pairs.tar
    python miniature/world.py stories --n 20000 --seed 1 --out stories.tar
    python miniature/world.py dialogues --n 20000 --seed 1 --out dialogues.tar --split held-out

It stands in for CC3M, VIST and MMDialog when the miniature is trained; the tars have the formats of these data sets.

Sample i of a seed is always the same, whatever n: its generator is PCG64 seeded with (seed, i, purpose). The members
of a tar carry no dates or owners, so that equal arguments give equal files.

| file      | members of sample KEY                                                                    |
| --------- | ---------------------------------------------------------------------------------------- |
| pairs     | KEY.png; KEY.txt: the caption; KEY.json: {"caption", "label", "jitter"}                  |
| stories   | KEY.json: {"kind": "story", "jitter", "turns": [{"text", "image", "label"}]}; KEY.0.png, ... |
| dialogues | the same with "kind": "dialog"; "image" and "label" are null where a turn has no picture |
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import FROM_1, number, read_arguments, run
from common.page import png_bytes
from miniature.facts import SPLITS, Picture, random_stream, sample_picture
from miniature.paint import draw
from miniature.tales import dialogue, story
from miniature.words import caption, describe
from prompts import Turn
from tars.writer import Sample, write_samples

PAIRS, STORIES, DIALOGUES, DESCRIBED = range(4)  # purposes of the random streams


def sample_pair(seed: int, index: int, split: str = "train", things: int | None = None) -> tuple[Picture, str, int]:
    """Sample `index`: (picture, caption, jitter seed for `draw`)."""
    rng = random_stream(seed, index, PAIRS)
    picture = sample_picture(rng, split, things)
    return picture, caption(picture, rng), int(rng.integers(1 << 31))


def sample_story(seed: int, index: int, split: str = "train") -> tuple[list[Turn], int]:
    rng = random_stream(seed, index, STORIES)
    return story(rng, split), int(rng.integers(1 << 31))


def sample_dialogue(seed: int, index: int, split: str = "train") -> tuple[list[Turn], int]:
    rng = random_stream(seed, index, DIALOGUES)
    return dialogue(rng, split), int(rng.integers(1 << 31))


# ---- tars


def png(picture: Picture, jitter: int, size: int) -> bytes:
    return png_bytes(draw(picture, jitter, size), compress_level=1)


def pair_members(key: str, seed: int, i: int, split: str, size: int) -> Iterator[tuple[str, bytes]]:
    """Half of the texts are captions as people write them, half are whole descriptions (`words.describe`)."""
    picture, text, jitter = sample_pair(seed, i, split)
    text = describe(picture) if random_stream(seed, i, DESCRIBED).random() < 0.5 else text
    yield f"{key}.png", png(picture, jitter, size)
    yield f"{key}.txt", text.encode()
    yield f"{key}.json", json.dumps({"caption": text, "label": picture.label(), "jitter": jitter}).encode()


def turn_members(kind: str, key: str, seed: int, i: int, split: str, size: int) -> Iterator[tuple[str, bytes]]:
    turns, jitter = (sample_story if kind == "story" else sample_dialogue)(seed, i, split)
    names = [f"{key}.{k}.png" if turn.pictures else None for k, turn in enumerate(turns)]
    labels = [turn.pictures[0].label() if turn.pictures else None for turn in turns]
    entries = [{"text": t.text, "image": n, "label": label} for t, n, label in zip(turns, names, labels, strict=True)]
    yield f"{key}.json", json.dumps({"kind": kind, "jitter": jitter, "turns": entries}).encode()
    yield from ((name, png(t.pictures[0], jitter, size)) for t, name in zip(turns, names, strict=True) if name)


def write(members: Callable, path: Path, n: int, seed: int, split: str = "train", size: int = 64) -> None:
    """Write `n` samples into the tar `path`; `members` gives the (name, bytes) of one sample's files."""
    keys = (f"{i:09d}" for i in range(n))
    samples = (Sample([*members(key, seed, i, split, size)], {"samples": 1}) for i, key in enumerate(keys))
    write_samples(samples, path, n)


write_pairs = partial(write, pair_members)
write_stories = partial(write, partial(turn_members, "story"))
write_dialogues = partial(write, partial(turn_members, "dialog"))


WRITERS = {"pairs": write_pairs, "stories": write_stories, "dialogues": write_dialogues}


# ---- command line


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw samples of the miniature world into a tar.")
    parser.add_argument("what", choices=WRITERS, help="samples to write")
    parser.add_argument("--n", type=FROM_1, default=1000, help="samples")
    parser.add_argument("--seed", type=int, default=0, help="0 or more")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--size", type=number(16, 1024), default=64, help="pixels a side, 16 to 1024")
    parser.add_argument("--out", type=Path, help="file to write; default: WHAT.tar")
    args = read_arguments(parser, argv)
    out = args.out or Path(f"{args.what}.tar")
    WRITERS[args.what](out, args.n, args.seed, args.split, args.size)
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
