"""The paper's metrics (section 4) of a run, or of any system's answers, on tars of pairs, stories or dialogues.

    python -m evaluation --data held-out.tar --out uas.json                                    # the miniature
    python -m evaluation --data vist-val.tar --task image --last --context texts --checkpoint runs/mls \\
        --out texts.json --weights weights --inception pt_inception.pth --clip clip-vit-large-patch14
    python -m evaluation --data vist-val.tar --task image --last --answers their-answers --out theirs.json

    python -m evaluation wins A/ B/ C/ --out wins.json        # whose pictures are preferred; study, tally ask people

`--checkpoint` asks the model for the answers that `--answers` (default: a folder beside OUT) does not hold yet, so a
stopped run goes on. With --answers alone they are only read. OUT gets all figures as JSON, a table is beside it (.md).

    metric                        of pictures that are wanted      a picture that did not come counts as
    fid, fid-story, is            Inception's features             a grey picture
    clip-i; clip-t, hps           cosine with picture; with text   0
    judge-distance, judge-score   the miniature judge's features   a grey picture
    judge-distance-story          the same, mean over stories      a grey picture
    image-image, image-text       as CLIP's, by the miniature's    0
    attributes                    facts that the judge sees        wrong in everything

    metric                        of words that are wanted         an answer without words counts as
    bleu-1, bleu-2                n-grams of all answers           too short
    rouge-l, meteor, s-bert       means over answers               0
    rouge-l-released              as the released code's package   0
    bleu-1-mmdialog, bleu-2-...   means over replies of dialogues  0
    true                          a fact is said, and none wrong   wrong
    mm-relevance                  words and pictures of dialogues  0, in both definitions
    relevance                     the released code's definition, by the miniature's pairing

Where pictures are missing, a second column has the metrics of the cases that miss none, as the released code reports.
A metric that cannot be computed is named with the reason.
"""

import argparse
import gc
import sys
from dataclasses import asdict
from pathlib import Path

from common.cli import DTYPES, FROM_1, make_folder, parse, run  # isort: skip
from PIL import Image

from common.files import fingerprint, write_json, write_text
from evaluation.cases import CONTEXTS, Case, add_case_options, check_settings, generate, given_cases, open_answers
from evaluation.comparisons import METRICS, MetricSetup, measure, outcomes_of
from evaluation.scorers import OPENERS, SIDE, Unavailable, network_outputs, open_network
from evaluation.study import study, tally
from evaluation.wins import wins
from generation import Sampling
from prompts import TASKS
from published.loading import CHAT_FILES, STORY_FILES, given_checkpoint, shipped_checkpoint
from published.parts import load_minigpt5
from tars.batches import describe

COMPARISONS = {"study": study, "tally": tally, "wins": wins}  # of several systems' answers, with options of their own


# ---- the figures


def table(record: dict) -> str:
    """Markdown: one row per metric, then the metrics that are left out, with the reasons."""
    counts, complete = record["pictures"], record["figures, no picture missing"]
    lines = [f"{record['cases']:,} cases, {', '.join(f'{count:,} pictures {name}' for name, count in counts.items())}"]
    lines += [f"{name}: {describe(record[name])}" for name in ("unusable", "not in the answers") if record[name]]
    title = f" in the {record['cases, no picture missing']:,} cases that miss no picture |" if complete else ""
    lines += ["", f"| metric | all cases |{title}", "| --- | ---: |" + " ---: |" * bool(complete)]
    for name, value in record["figures"].items():
        second = f" {complete[name]:.4g} |" if name in complete else " |" * bool(complete)
        lines.append(f"| {name} | {value:.4g} |{second}")
    lines += ["", *(f"- left out: {name} ({reason})" for name, reason in record["left out"].items())]
    return "\n".join(lines).rstrip() + "\n"


# ---- the command


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add_case_options(parser, list(CONTEXTS))
    add("--out", type=Path, metavar="FILE", help="figures as JSON; FILE with the ending .md: a table")
    add("--checkpoint", type=Path, help="a file or a run's folder; default, without --answers: of WEIGHTS/minigpt5 "
        "stage 2's for stories and dialogues where it is there, else stage 1's")  # fmt: skip
    add("--answers", type=Path, metavar="DIR", help="folder of the answers; default: NAME-answers for --out NAME.json")
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), metavar="METRIC", help=", ".join(METRICS))
    about = "parts of the Inception Score, released: 10; default: 10 or, of fewer than 1,000 pictures, 1"
    add("--splits", type=FROM_1, metavar="N", help=about)
    add("--inception", type=Path, metavar="FILE", help="weights of FID's Inception, as torch-fidelity has it")
    add("--clip", type=Path, metavar="DIR", help="folder of a CLIP in the Hugging Face layout")
    add("--hps", type=Path, metavar="FILE", help="HPS_v2_compressed.pt")
    add("--sbert", type=Path, metavar="DIR", help="folder of a sentence-transformers model")
    add("--meteor", type=Path, metavar="DIR", help="nltk_data folder with WordNet")
    args = parse(parser, "evaluate", Sampling)
    if not args.out or args.out.suffix != ".json":
        parser.error("--out is needed, with the ending .json")
    args.sampling = Sampling.of(vars(args))
    args.scores_only = bool(args.answers) and not args.checkpoint
    args.answers = args.answers or args.out.with_name(f"{args.out.stem}-answers")
    return args


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in COMPARISONS:
        COMPARISONS[sys.argv.pop(1)]()
        return
    args = arguments()
    cases, bad, data = given_cases(args)
    if args.context != "both" and cases[0].task not in TASKS:
        raise ValueError("--context is for stories, this data has none")
    settings = {"task": cases[0].task, "context": args.context, "data": data}
    make_folder(args.out.parent)
    if args.scores_only:
        check_settings(args.answers, settings)
    else:
        settings |= ask(args, cases, settings)

    networks, unavailable = {}, {}
    for name in [name for name in OPENERS if name in {METRICS[metric].network for metric in args.metrics}]:
        try:  # the miniature's judge and pairing lie in WEIGHTS
            networks[name] = open_network(name, getattr(args, name, args.weights / f"{name}.safetensors"), args.device)
        except Unavailable as error:
            unavailable[name] = str(error)
    outcomes, unusable, missing = outcomes_of(cases, args.answers, networks)
    setup = MetricSetup(networks, network_outputs(networks, [Image.new("RGB", (SIDE, SIDE), "grey")])[0], args.splits)
    figures, reasons = measure(args.metrics, setup, unavailable, outcomes)
    counts = {"wanted": sum(len(outcome.reference_pictures) for outcome in outcomes)}
    counts |= {"missing": sum(o.missing for o in outcomes), "came": sum(len(o.answer_pictures) for o in outcomes)}
    counts["extra"] = counts["came"] - (counts["wanted"] - counts["missing"])
    complete = [outcome for outcome in outcomes if not outcome.missing]
    of_pictures = [name for name in args.metrics if METRICS[name].of == "pictures"] if counts["missing"] else []
    record = {
        "data": args.data,
        "answers": str(args.answers),
        "settings": settings,
        "cases": len(outcomes),
        "unusable": dict(bad + unusable),
        "not in the answers": dict(missing),
        "pictures": counts,
        "figures": figures,
        "cases, no picture missing": len(complete),
        "figures, no picture missing": measure(of_pictures, setup, unavailable, complete)[0] if complete else {},
        "left out": reasons,
    }
    write_json(args.out, record)
    write_text(args.out.with_suffix(".md"), table(record))
    print(f"{table(record)}\nsee {args.out} and {args.out.with_suffix('.md')}")


def ask(args: argparse.Namespace, cases: list[Case], settings: dict) -> dict:
    """Make the answers that the folder lacks. Returns the checkpoint and the settings that they are made with."""
    folder, names = args.weights / "minigpt5", {"caption": (), "reply": CHAT_FILES}.get(cases[0].task, STORY_FILES)
    checkpoint = given_checkpoint(args.checkpoint or shipped_checkpoint(folder, names) or folder)
    made_with = {"checkpoint": f"{checkpoint.parent.name}/{checkpoint.name}", "trained": fingerprint([checkpoint])}
    made_with |= {"seed": args.seed, **asdict(args.sampling)}
    open_answers(args.answers, settings | made_with, args.data)
    reads = cases[0].task != "caption"
    model = load_minigpt5(args.weights, checkpoint, dtype=DTYPES[args.dtype], device=args.device, read_pictures=reads)
    generate(model.eval(), cases, args.answers, args.context, args.sampling, args.seed, args.batch_size)
    print(f"{len(cases):,} cases are answered, see {args.answers}")
    del model
    gc.collect()  # the networks may need its memory
    return made_with


if __name__ == "__main__":
    run(main)
