"""Which of several systems people would prefer most often (the paper's Figure 3).

    python -m evaluation wins A/ B/ C/ --hps HPS_v2_compressed.pt --out wins.json
    python -m evaluation wins A/ B/ C/ --out wins.json                                 # the miniature

In each case the first picture of every folder of answers is compared, and the most preferred one wins. Systems whose
pictures are equally good share the case, and one without a picture cannot win. HPS v2 prefers the picture with the
highest cosine with the case's text. Without --hps a stand-in for the miniature's drawn world decides: the most right
facts first, as its judge reads them, then the higher image-text score of its pairing.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import add_device_option, add_weights_option, read_arguments
from common.files import write_json
from evaluation.cases import Case, compared_cases, read_answer
from evaluation.comparisons import encode
from evaluation.metrics import cosine
from evaluation.scorers import network_outputs, open_network
from generation import split
from miniature.judge import ATTRIBUTES, asks_for, right

Preference = tuple[float, ...]  # compared in order; of an answer without a picture empty, which is below all others


def preferences(cases: list[Case], folder: Path, networks: dict) -> list[Preference]:
    """How much each case's picture in a folder of answers is preferred, in the order of the cases."""
    texts = encode(networks["hps" if "hps" in networks else "pairing"], [case.turn.text for case in cases])
    result = []
    for case, text in zip(tqdm(cases, desc=folder.name, unit="case", delay=2), texts, strict=True):
        pictures = split(read_answer(folder, case.key).segments)[1]
        result.append(preference(case, text, network_outputs(networks, pictures[:1])[0]) if pictures else ())
    return result


def preference(case: Case, text: torch.Tensor, outputs: dict) -> Preference:
    if "hps" in outputs:
        return (cosine(text, outputs["hps"]).item(),)
    is_right = right(outputs["facts"], case.facts)
    facts = sum(is_right[name] for name in ATTRIBUTES if asks_for(case.facts, name))
    return facts, cosine(text, outputs["pairing"]).item()


def count_wins(rows: list[list[Preference]]) -> list[float]:
    """Preferences of several systems, each in the same order of cases -> the share of cases that each of them wins."""
    wins = [0.0] * len(rows)
    for case in zip(*rows, strict=True):
        winners = [i for i, one in enumerate(case) if one and one == max(case)]
        for i in winners:
            wins[i] += 1 / len(winners)
    return [share / len(rows[0]) for share in wins]


def wins() -> None:
    """`python -m evaluation wins`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m evaluation wins", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("answers", nargs="+", type=Path, metavar="DIR", help="folders of answers")
    add("--out", type=Path, required=True, metavar="FILE", help="shares as JSON")
    add("--data", nargs="+", help="the tars that were asked about; default: as a folder of answers says")
    add("--hps", type=Path, metavar="PATH", help="weights: HPS_v2_compressed.pt")
    add_device_option(parser)
    add_weights_option(parser)
    args = read_arguments(parser)
    if len(set(args.answers)) < len(args.answers):
        parser.error("a folder of answers is named twice")
    cases = [case for case in compared_cases(args.answers, args.data) if case.pictures]
    paths = {"hps": args.hps} if args.hps else {n: args.weights / f"{n}.safetensors" for n in ("judge", "pairing")}
    if not cases or not (args.hps or all(case.facts for case in cases)):
        raise ValueError("no picture was wanted" if not cases else "no labels of the drawn world: give --hps FILE")
    networks = {name: open_network(name, path, args.device) for name, path in paths.items()}
    rows = [preferences(cases, folder, networks) for folder in args.answers]
    shares = dict(zip(map(str, args.answers), count_wins(rows), strict=True))
    write_json(args.out, {"by": "HPS v2" if args.hps else "facts", "cases": len(cases), "wins": shares})
    lines = [f"{len(cases):,} cases", "", "| | cases won |", "| --- | ---: |"]
    print("\n".join([*lines, *(f"| {name} | {share:.2%} |" for name, share in shares.items())]))
