"""Two systems' continuations of stories side by side, in the place of the human judges of the paper's Table 4.

    python experiments/duel.py --data stories-test.tar --answers minigpt5-answers two-stage-answers --out table4.json

The paper's judges saw both continuations and said which is better in three ways, or neither. Here code reads the words
(miniature/words.py) and the miniature's judge the picture, and each continuation is right or wrong in each way:

    language continuity     the words say something of the story's true next picture or of the last one, and nothing
                            that is wrong of it
    image quality           the judge sees one or two things, each clear
    multimodal coherence    the words are true of the picture beside them, which keeps the story's scene and its hero

A continuation is better where it is right and the other is not; else they are even.
"""

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import FROM_0, add_weights_option, read_arguments, run  # isort: skip

import torch

from common.files import write_json
from evaluation.cases import Case, facts_of, read_answer, read_cases
from evaluation.scorers import WorldJudge
from generation import split
from miniature.facts import Picture
from miniature.judge import NOTHING
from miniature.score_stories import hero_colour, kept_facts, true_of
from tars.index import Member

WAYS = ("language continuity", "image quality", "multimodal coherence")


def last_picture(case: Case) -> Picture | None:
    """The facts of the picture before the one that is wanted."""
    return facts_of(json.loads(case.read(Member.JSON))["turns"][len(case.before) - 1].get("label"))


def judged(words: str, seen: Picture, last: Picture, following: Picture) -> dict[str, bool]:
    """A continuation's words, what the judge sees in its picture, and the facts of the true pictures before and now."""
    clear = bool(seen.things) and len(seen.things) <= 2 and all(thing.kind for thing in seen.things)
    keeps = kept_facts(seen, last, hero_colour(words, last.things[0].colour))["all"]
    continues = true_of(words, following) or true_of(words, last)
    return dict(zip(WAYS, (continues, clear, true_of(words, seen) and keeps), strict=True))


def compare(ones: list[dict[str, bool]], others: list[dict[str, bool]]) -> dict[str, dict[str, float]]:
    """{way: {"first", "even", "second": shares of the cases}, and how often each is right}."""
    found = {}
    for way in WAYS:
        pairs = [(one[way], other[way]) for one, other in zip(ones, others, strict=True)]
        shares = {"first": sum(a > b for a, b in pairs), "even": sum(a == b for a, b in pairs)}
        shares |= {"second": sum(a < b for a, b in pairs)}
        shares |= {"first right": sum(a for a, _ in pairs), "second right": sum(b for _, b in pairs)}
        found[way] = {name: count / len(pairs) for name, count in shares.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="stories of the drawn world")
    add(
        "--answers",
        nargs=2,
        type=Path,
        required=True,
        metavar="DIR",
        help="of `python -m evaluation --task text+image --last`",
    )
    add("--n", type=FROM_0, default=0, help="the first so many stories; 0: all")
    add("--out", type=Path, required=True, metavar="FILE", help="shares as JSON")
    add_weights_option(parser)
    args = read_arguments(parser)
    cases = read_cases(args.data, "text+image", True)[0][: args.n or None]
    judge = WorldJudge(args.weights / "judge.safetensors", torch.device("cpu"))
    sides = []
    for folder in args.answers:
        rows = []
        for case in cases:
            answer, last = read_answer(folder, case.key), last_picture(case)
            if last is None or case.facts is None:
                raise ValueError(f"{case.key}: pictures without labels of the drawn world")
            words, pictures = split(answer.segments if answer else [])
            seen = judge.pictures(pictures[:1])["facts"][0] if pictures else NOTHING
            rows.append(judged(words, seen, last, case.facts))
        sides.append(rows)
    record = {"answers": [str(folder) for folder in args.answers], "cases": len(cases), "ways": compare(*sides)}
    write_json(args.out, record)
    print(json.dumps(record["ways"], indent=1))


if __name__ == "__main__":
    run(main)
