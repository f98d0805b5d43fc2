"""Divter, MMDialog's baseline: a dialogue model describes a picture in words, a text-to-image model draws it.

    python baselines/divter.py dialogues.tar --out described.tar              # pictures as words: "picture: a red boat"
    python train_mls.py --data described.tar --no-uas --no-ldm --out runs/divter
    python -m evaluation --data described-test.tar --checkpoint runs/divter --out divter.json       # what it says
    python baselines/stable_diffusion.py --data dialogues-test.tar --words divter-answers --answers drawn
    python -m evaluation --data dialogues-test.tar --answers drawn --out drawn.json                 # with the pictures

In Divter (Sun et al. 2022) a captioner describes the pictures of the training dialogues. In the drawn world the facts
of each are known, and a caption of them takes its place; a picture without known facts is an error.

    {"text": "here it is", "image": "KEY.1.png"}  ->  {"text": "here it is picture: a red boat at sea", "image": null}
"""

import argparse
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run
from miniature.facts import Picture, random_stream
from miniature.words import caption
from miniature.world import as_json, write_tar
from tars.batches import read_member
from tars.index import Member, Unusable, read_index
from tars.stories import read_turns

MARK = "picture:"
DESCRIBED = 501  # purpose of the random streams


def split_description(said: str) -> tuple[str, str | None]:
    """ "here it is picture: a red boat" -> ("here it is", "a red boat"); None where no picture is described."""
    words, mark, description = said.partition(MARK)
    return words.strip(), (description.partition(MARK)[0].strip() or None) if mark else None


def in_words(turns: list[dict], key: str) -> list[dict]:
    """Turns of a dialogue's JSON with the captions of their pictures. ValueError for a picture of unknown facts."""
    rng, told = random_stream(0, zlib.crc32(key.encode()), DESCRIBED), []
    for turn in turns:
        text = turn["text"]
        if turn.get("image"):
            try:
                text = f"{text} {MARK} {caption(Picture.from_label(turn.get('label')), rng)}"
            except (TypeError, LookupError):
                raise ValueError(f"{key}: a picture without a label of the drawn world") from None
        told.append({"text": text.strip(), "image": None})
    return told


def members(tar: str) -> Iterator[tuple[str, bytes]]:
    index = read_index(tar)
    for row in range(len(index.table)):
        key, content = index.key(row), read_member(tar, index.table[row], Member.JSON)
        try:
            kind, _ = read_turns(content, key, str)  # checks the form
        except Unusable as error:
            raise ValueError(f"{tar}: {key}: {error}") from None
        if kind != "dialog":
            raise ValueError(f"{tar}: {key} is no dialogue")
        yield f"{key}.json", as_json({"kind": "dialog", "turns": in_words(json.loads(content)["turns"], key)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tar", help="dialogues of the drawn world, as `miniature/world.py dialogues` writes them")
    parser.add_argument("--out", type=Path, required=True, help="tar to write")
    args = parser.parse_args()
    write_tar(args.out, members(args.tar))
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
