"""Whether what a language model knows reaches the picture: 100 prompts that need words which no text of the miniature's
world has, "a schooner in the Baltic", "an orb of jade" (knowledge.jsonl, in the form of miniature/people/).

    python experiments/knowledge.py                                             # the miniature's three ways to draw
    python experiments/knowledge.py --system "SmolLM2, vokens alone" vokens smol runs/smol      # and one more

A system is a name, a way, a folder of weights and perhaps a checkpoint or a run. The ways:

    words     the prompt is put into words first, as in a chat; the vokens read this description
    vokens    the vokens read the prompt itself, as stage 1 reads a caption
    text      the frozen text encoder of Stable Diffusion reads the prompt; no language model takes part

All facts that a prompt determines are judged, and the number of things. In OUT: results.json, written anew after each
system, table.md and sheet.png of all systems in it. The same command goes on after the last system that is finished.
Intervals are of a bootstrap over prompts, each with the mean of its seeds.
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import FROM_1, MINIATURE, add_device_option, make_folder, read_arguments, run  # isort: skip

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.files import fingerprint, read_json, write_json, write_text
from common.page import save_image
from common.texts import clean_caption
from miniature.exam import SIDE, Answer, Exam, draw_prompts, picture_facts, text_to_pictures
from miniature.facts import random_stream, sample_picture
from miniature.judge import ATTRIBUTES, asks_for, right
from miniature.score import Wish, checkpoint_for, read_prompts, sampling_of_sample, seeds

PROMPTS = Path(__file__).parent / "knowledge.jsonl"
WAYS = ("words", "vokens", "text")
THREE = [["miniature, words first", "words"], ["miniature, vokens alone", "vokens"], ["frozen text encoder", "text"]]
TEXT_GUIDANCE = 3.0  # as in miniature/README.md
SHOWN = 24  # prompts on the sheet, evenly spaced
DRAWS = 10_000  # of the bootstrap
Answers = list[dict]  # {"prompt", "seed", "wrong": [names of facts], "description"}, seed after seed


# ---- what a system draws


def exam_of(way: str, weights: Path, checkpoint: Path | None, device: torch.device) -> Exam:
    """Sampling is sample.py's default with these weights; where they bring none, the miniature's."""
    sampling = sampling_of_sample(weights if (weights / "minigpt5" / "config.json").is_file() else MINIATURE)
    if way == "text":
        sampling = replace(sampling, guidance=TEXT_GUIDANCE)
    else:
        sampling = replace(sampling, words_first=way == "words", force_image=way == "vokens")
        checkpoint = checkpoint_for("people", weights, checkpoint, sampling.words_first)
    return Exam(weights, checkpoint, device, sampling, n=0, seed=0)


def drawn(exam: Exam, way: str, texts: list[str]) -> list[Answer]:
    if way == "text":
        return [Answer("", picture) for picture in text_to_pictures(exam, [clean_caption(text) for text in texts])]
    return draw_prompts(exam, texts)


def wrong_facts(wish: Wish, came: bool, facts: dict[str, bool]) -> list[str]:
    """The names of what the prompt asks for and the picture does not show; all of it where none came."""
    return [name for name in ATTRIBUTES if asks_for(wish.expected, name) and not (came and facts[name])]


def examine(exam: Exam, way: str, wishes: list[Wish], seeds: list[int]) -> tuple[Answers, list[Image.Image]]:
    """All answers, and the first seed's pictures for the sheet."""
    answers, shown = [], []
    for seed in seeds:
        exam.seed = seed
        said = drawn(exam, way, [wish.text for wish in wishes])
        pictures = [answer.picture for answer in said]
        for wish, picture, seen in zip(wishes, pictures, picture_facts(exam, pictures), strict=True):
            wrong = wrong_facts(wish, picture is not None, right(seen, wish.expected))
            description = picture.info.get("description", "") if picture else "no picture"
            answers.append({"prompt": wish.text, "seed": seed, "wrong": wrong, "description": description})
        shown = shown or [picture or Image.new("RGB", (SIDE, SIDE), "lightgrey") for picture in on_sheet(pictures)]
    return answers, shown


def on_sheet(rows: list) -> list:
    return rows[:: max(1, len(rows) // SHOWN)][:SHOWN]


# ---- figures


def right_by_prompt(answers: Answers, wishes: list[Wish]) -> np.ndarray:
    """(P,): of each prompt the share of its seeds with every fact right."""
    return np.array([not answer["wrong"] for answer in answers]).reshape(-1, len(wishes)).mean(0)


def right_by_chance(wishes: list[Wish]) -> np.ndarray:
    """(P,): of each prompt the share of random pictures that have every fact right."""
    pictures = [sample_picture(random_stream(0, i)) for i in range(1000)]
    return np.array([np.mean([right(picture, wish.expected)["all"] for picture in pictures]) for wish in wishes])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean of values (P,): 95 % of the means of P values that are drawn from them, with replacement."""
    picks = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    return tuple(np.percentile(values[picks].mean(1), (2.5, 97.5)))


def with_interval(values: np.ndarray, sign: str = "") -> str:
    """ "61.3 (53.0 to 69.3)", in per cent; a dash where there is no value."""
    if not len(values):
        return "-"
    low, high = interval(values)
    return f"{100 * values.mean():{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def table(systems: dict[str, dict], wishes: list[Wish]) -> str:
    """Two tables in Markdown: shares that are all right, and of each fact the share that is right where asked for."""
    counts = np.array([len(wish.expected.things) for wish in wishes])
    shares = {name: right_by_prompt(system["answers"], wishes) for name, system in systems.items()}
    first = next(iter(shares.values()))
    shares["a random picture"] = right_by_chance(wishes)
    asked = {name: sum(asks_for(wish.expected, name) for wish in wishes) for name in ATTRIBUTES}
    columns = [f"{name}, {number}" for name, number in asked.items()]
    lines = [f"| all right, per cent | {len(wishes)} prompts | {sum(counts == 1)} of one thing | "
             f"{sum(counts == 2)} of two | less the first |", "| --- |" + " ---: |" * 4]  # fmt: skip
    for name, share in shares.items():
        parts = [share, share[counts == 1], share[counts == 2]]
        difference = "" if share is first else with_interval(share - first, "+")
        lines.append(f"| {name} | {' | '.join(map(with_interval, parts))} | {difference} |")
    lines += ["", f"| right where asked for, prompts | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(asked)]
    for name, system in systems.items():
        wrong = [fact for answer in system["answers"] for fact in answer["wrong"]]
        total = {fact: asked[fact] * len(system["answers"]) / len(wishes) for fact in ATTRIBUTES}
        cells = [f"{100 - 100 * wrong.count(fact) / total[fact]:.1f}" if total[fact] else "-" for fact in ATTRIBUTES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sheet(
    systems: dict[str, list[tuple[Image.Image, bool]]], prompts: list[str], side: int = 96, words: int = 430
) -> Image.Image:
    """A row for each prompt, a column for each system's pictures; those that are all right have a green frame."""
    font, head, step = ImageFont.load_default(12), 54, side + 8
    page = Image.new("RGB", (words + len(systems) * step, head + len(prompts) * step), "white")
    pen = ImageDraw.Draw(page)
    for row, text in enumerate(prompts):
        pen.text((6, head + row * step + side // 2), text[:80], fill="black", font=font)
    for column, (name, pictures) in enumerate(systems.items()):
        left = words + column * step
        pen.multiline_text((left, 4), "\n".join(wrap(name, 16)[:3]), fill="black", font=font)
        for row, (picture, fine) in enumerate(pictures):
            square = picture.resize((side, side), Image.Resampling.LANCZOS)
            page.paste(ImageOps.expand(square, 3, "limegreen" if fine else "white"), (left, head + row * step))
    return page


# ---- the command


def file_name(system: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", system.lower())) + ".png"


def strip_of(pictures: list[Image.Image]) -> Image.Image:
    """Pictures under one another: how a system's part of the sheet is kept until all systems are there."""
    strip = Image.new("RGB", (SIDE, SIDE * len(pictures)))
    for row, picture in enumerate(pictures):
        strip.paste(picture, (0, SIDE * row))
    return strip


def pictures_in(path: Path) -> list[Image.Image]:
    with Image.open(path) as strip:
        return [strip.crop((0, top, SIDE, top + SIDE)) for top in range(0, strip.height, SIDE)]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    about = "NAME WAY WEIGHTS [CHECKPOINT], repeatable; default: the miniature in all three ways"
    add("--system", nargs="+", action="append", metavar="NAME", help=about)
    add("--prompts", type=Path, default=PROMPTS, help="prompts in the form of miniature/people/prompts.jsonl")
    add("--n", type=FROM_1, help="only the first so many prompts")
    add("--seeds", type=seeds, default=[0, 1, 2], help="default: 0,1,2")
    add("--out", type=Path, default=Path("runs/knowledge"), help="folder of results.json, table.md and sheet.png")
    add_device_option(parser)
    args = read_arguments(parser, argv)
    args.system = args.system or [[*names, str(MINIATURE)] for names in THREE]
    for system in args.system:
        if len(system) not in (3, 4) or system[1] not in WAYS:
            parser.error(f"--system {' '.join(system)}: not NAME WAY WEIGHTS [CHECKPOINT] with WAY {', '.join(WAYS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    wishes, out = read_prompts(args.prompts)[: args.n], make_folder(args.out)
    path = out / "results.json"
    asked = {"prompts": fingerprint([args.prompts], args.n), "seeds": args.seeds}
    results = read_json(path) if path.is_file() else asked | {"systems": {}}
    if {name: results.get(name) for name in asked} != asked:
        raise ValueError(f"{path} has other prompts or seeds: name another --out")
    for name, way, weights, *checkpoint in args.system:
        exam = exam_of(way, Path(weights), Path(*checkpoint) if checkpoint else None, args.device)
        files = [*sorted(exam.weights.rglob("*.safetensors")), *filter(None, [exam.checkpoint])]
        made = {"way": way, "sampling": vars(exam.sampling), "weights": fingerprint(files)}
        there = results["systems"].get(name)
        if there and made.items() <= there.items():
            print(f"{name}: is in {path}", flush=True)
            continue
        answers, shown = examine(exam, way, wishes, args.seeds)
        save_image(strip_of(shown), out / file_name(name))
        results["systems"][name] = made | {"answers": answers}
        write_json(path, results)
        print(f"{name}: {100 * right_by_prompt(answers, wishes).mean():.1f} % all right", flush=True)
    systems = results["systems"]
    write_text(out / "table.md", table(systems, wishes))
    columns = {}
    for name, system in systems.items():
        fine = [not answer["wrong"] for answer in on_sheet(system["answers"][: len(wishes)])]
        columns[name] = list(zip(pictures_in(out / file_name(name)), fine, strict=True))
    save_image(sheet(columns, [wish.text for wish in on_sheet(wishes)]), out / "sheet.png")
    print(f"\n{table(systems, wishes)}\nsee {out}")


if __name__ == "__main__":
    run(main)
