"""Divter, MMDialog's baseline: a dialogue model describes a picture in words, a text-to-image model draws it.

    python baselines/divter.py dialogues.tar --out described.tar              # pictures as words: "picture: a red boat"
    python baselines/divter.py mmdialog-train.tar --captions captions.jsonl --out described.tar     # of real pictures
    python train_mls.py --data described.tar --no-uas --no-ldm --out runs/divter
    python -m evaluation --data described-test.tar --checkpoint runs/divter --out divter.json       # what it says
    python baselines/stable_diffusion.py --data dialogues-test.tar --words divter-answers --answers drawn
    python -m evaluation --data dialogues-test.tar --answers drawn --out drawn.json                 # with the pictures

In Divter (Sun et al. 2022) a captioner describes the pictures of the training dialogues. Its captions come in a file, a
line {"file": "KEY.1.jpg", "caption": ...} for each picture of the tar. In the drawn world the facts of each picture are
known; without a file, a caption of these facts is used. A picture with neither is an error.

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
from tars.batches import read_member
from tars.index import Member, Unusable, read_index
from tars.stories import read_turns
from tars.writer import Sample, write_samples

MARK = "picture:"
CAPTION_STREAM = 501  # purpose of the random streams


def split_description(text: str) -> tuple[str, str | None]:
    """ "here it is picture: a red boat" -> ("here it is", "a red boat"); None where no picture is described."""
    words, mark, description = text.partition(MARK)
    return words.strip(), (description.partition(MARK)[0].strip() or None) if mark else None


def read_captions(path: Path) -> dict[str, str]:
    """{file name of a picture: its caption}, without empty captions. ValueError for a line that lacks one of them."""
    captions = {}
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in filter(str.strip, file):
            try:
                row = json.loads(line)
                captions[row["file"]] = " ".join(row["caption"].split())
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(f"{path}: no file and its caption in {line.strip()!r:.80}") from None
    return {name: caption for name, caption in captions.items() if caption}


def describe_pictures(turns: list[dict], key: str, captions: dict[str, str] | None = None) -> list[dict]:
    """The turns of a dialogue's JSON, with captions in the place of pictures: those in `captions` or, without it,
    captions of the labels' facts. A space splits MARK in the texts. ValueError for a picture without a caption."""
    rng, described_turns = random_stream(0, zlib.crc32(key.encode()), CAPTION_STREAM), []
    for turn in turns:
        parts, names = [turn["text"].replace(MARK, "picture :")], turn.get("image") or []
        for name in [names] if isinstance(names, str) else names:
            try:
                text = captions[name] if captions is not None else caption(Picture.from_label(turn.get("label")), rng)
            except (TypeError, LookupError):
                lacks = "a label of the drawn world: give --captions" if captions is None else "a caption"
                raise ValueError(f"{key}: {name} is a picture without {lacks}") from None
            parts += [MARK, text.replace(MARK, "picture :")]
        described_turns.append({"text": " ".join(parts).strip(), "image": None})
    return described_turns


def samples(tar: str, captions: dict[str, str] | None) -> Iterator[Sample]:
    index = read_index(tar)
    for row in range(len(index.table)):
        key, content = index.key(row), read_member(tar, index.table[row], Member.JSON)
        try:
            kind, _ = read_turns(content, key, str)  # checks the JSON
        except Unusable as error:
            raise ValueError(f"{tar}: {key}: {error}") from None
        if kind != "dialog":
            raise ValueError(f"{tar}: {key} is no dialogue")
        turns = describe_pictures(json.loads(content)["turns"], key, captions)
        yield Sample([(f"{key}.json", json.dumps({"kind": "dialog", "turns": turns}).encode())], {"dialogues": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tar", help="dialogues, of `python -m tars mmdialog` or `miniature/world.py dialogues`")
    about = ".jsonl with the file and the caption of every picture; default: facts of drawn pictures"
    parser.add_argument("--captions", type=Path, metavar="FILE", help=about)
    parser.add_argument("--out", type=Path, required=True, help="tar to write")
    args = parser.parse_args()
    if args.out.resolve() == Path(args.tar).resolve():
        parser.error(f"--out {args.out}: is the source")
    write_samples(samples(args.tar, read_captions(args.captions) if args.captions else None), args.out)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
