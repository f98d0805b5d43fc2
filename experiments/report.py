"""Writes experiments/report/ from the scores that are there: README.md, plots and grids of pictures.

    write_report(options, seeds, folder)      and figures.json: the figures of each seed, to decide claims anew

A value is the mean over seeds with the sample deviation between them ("0.52 ± 0.03"); what is not measured is a dash.
The paper's own value (published.json) stands behind ours.
"""

import statistics
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bench.common import hardware
from common.cli import pick_device
from common.files import read_json, write_json, write_text
from common.page import draw_sheet, save_image
from evaluation.cases import pictures_of, read_answer, read_cases
from experiments.claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    MANY_SEEDS,
    NOISE,
    ONE_SEED,
    UNMEASURED,
    Figures,
    differences,
    judge,
    seeds_to_decide,
)
from experiments.duel import WAYS
from experiments.systems import (
    DUELS,
    METRICS,
    PARTS,
    PICTURES,
    RIVALS,
    SIZES,
    TABLES,
    Options,
    Table,
    scorings_of,
)
from generation import split
from trainer.log import COLOURS, read_log

PUBLISHED = Path(__file__).parent / "published.json"
NOTES = Path(__file__).resolve().parent / "notes.md"  # by hand, on the run whose report this repository has
SHOWN = 8  # columns of a grid
NONE = "-"  # what is not measured
DUEL_COLUMNS = {"first": "MiniGPT-5 better", "even": "even", "second": "two stages better",
                "first right": "MiniGPT-5 right", "second right": "two stages right"}  # fmt: skip


# ---- figures


def read_figures(options: Options, seeds: list[int]) -> Figures:
    """Of all scorings and comparisons that are done, under the paper's names. A comparison has its figures in one file:
    a system of Figure 3 is then figure3/SCORING, a side of Table 4 two-stages/first or /second."""
    found = {}
    for seed in seeds:
        for name in {name for part in PARTS for name in scorings_of(part)}:
            if (path := options.score(name, seed)).is_file():
                figures = read_json(path)["figures"]
                named = {
                    metric: [figures[t] for t in titles if t in figures] for metric, (titles, _) in METRICS.items()
                }
                found[name, seed] = {metric: values[0] for metric, values in named.items() if values}
        for name in DUELS:
            if (path := options.score(f"table4/{name}", seed)).is_file():
                ways = read_json(path)["ways"]
                for column in DUEL_COLUMNS:
                    found[f"{name}/{column}", seed] = {way: ways[way][column] for way in WAYS}
        if (path := options.score("figure3", seed)).is_file():
            wins = {Path(folder).name: share for folder, share in read_json(path)["wins"].items()}
            for name in RIVALS.values():
                found[f"figure3/{name}", seed] = {"wins": wins[options.answers(name, seed).name]}
    return dict(sorted(found.items()))


def paper_figures(published: dict) -> Figures:
    """What the paper's tables have, as the figures of one seed."""
    found = {}
    for part, content in TABLES.items():
        for label, figures in published.get(part, {}).items():
            found.setdefault((content.rows[label], 0), {}).update(figures)
    for way, shares in published["table4"].items():
        for column, share in shares.items():
            found.setdefault((f"two-stages/{column}", 0), {})[way] = share
    return found


def values(figures: Figures, scoring: str, metric: str) -> list[float]:
    return [row[metric] for (name, _), row in sorted(figures.items()) if name == scoring and metric in row]


def spread(numbers: list[float]) -> str:
    """ "0.52 ± 0.03" """
    if not numbers:
        return NONE
    mean = f"{statistics.mean(numbers):.3g}"
    return f"{mean} ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else mean


# ---- Markdown


def rows_of(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(['', *columns])} |", "| --- |" + " ---: |" * len(columns)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def cell(figures: Figures, scoring: str, metric: str, theirs: dict[str, float]) -> str:
    return spread(values(figures, scoring, metric)) + (f" (paper {theirs[metric]:g})" if metric in theirs else "")


def arrow(metric: str) -> str:
    return f"{metric} {'↑' if METRICS[metric][1] else '↓'}"


def table(part: str, content: Table, figures: Figures, published: dict) -> list[str]:
    known = published.get(part, {})
    rows = [
        [label, *(cell(figures, scoring, metric, known.get(label, {})) for metric in content.columns)]
        for label, scoring in content.rows.items()
    ]
    return rows_of([arrow(metric) for metric in content.columns], rows)


def duels(figures: Figures, published: dict) -> list[str]:
    rows = []
    for name, label in (("two-stages", "SD as published draws"), ("two-stages-tuned", "fine-tuned SD draws")):
        for way in WAYS:
            theirs = published["table4"][way] if name == "two-stages" else {}
            shown = [cell(figures, f"{name}/{c}", way, {way: theirs[c]} if c in theirs else {}) for c in DUEL_COLUMNS]
            rows.append([f"{label}: {way}", *shown])
    return rows_of(list(DUEL_COLUMNS.values()), rows)


def wins(figures: Figures) -> list[str]:
    rows = [[label, cell(figures, f"figure3/{name}", "wins", {})] for label, name in RIVALS.items()]
    return rows_of(["share of captions won ↑"], rows)


def claims(figures: Figures, published: dict) -> list[str]:
    rows, told, theirs = [], Counter(), paper_figures(published)
    for claim in CLAIMS:
        found = judge(claim, figures)
        told[found.verdict] += 1
        what = f"{claim.metric}: {' and '.join(found.better)} against {' and '.join(found.worse)}"
        there, seeds = signed(differences(found.better, found.worse, claim.metric, theirs)), NONE
        if found.verdict == NOISE:
            many = seeds_to_decide(found.differences, claim.margin, claim.same)
            seeds = str(many) if many else f"over {MANY_SEEDS}"
        rows.append([claim.text, claim.source, what, there, signed(found.differences), f"**{found.verdict}**", seeds])
    open_ones = told[UNMEASURED] + told[ONE_SEED]
    count = f"Of {len(rows)} claims {told[HOLDS]} hold, {told[FAILS]} do not, {told[NOISE]} are within noise"
    count += f", {open_ones} are open." if open_ones else "."
    head = ["the paper's claim", "said in", "measured as", "by how much: paper", "here", "verdict", "seeds to decide"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | ---: | ---: | --- | ---: |"]
    return [count, "", *lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def signed(numbers: list[float]) -> str:
    return NONE if not numbers else ("" if statistics.mean(numbers) < 0 else "+") + spread(numbers)


# ---- pictures


def plot(content: Table, figures: Figures, path: Path) -> bool:
    """A small chart a metric over the numbers in the rows' labels ("curve, number"), each from its least to its largest
    value: one colour per curve, one point per seed, a line through the means. False where nothing is measured."""
    curves = {}  # metric -> curve -> number -> values
    for metric in content.columns:
        for label, scoring in content.rows.items():
            name, _, number = label.rpartition(", ")
            if seen := values(figures, scoring, metric):
                curves.setdefault(metric, {}).setdefault(name, {})[float(number)] = seen
    if not curves:
        return False
    width, height, margin = 300, 240, 38
    chart = Image.new("RGB", (width * len(curves), height), "white")
    pen, font = ImageDraw.Draw(chart), ImageFont.load_default(12)
    for panel, (metric, lines) in enumerate(curves.items()):
        every = [value for points in lines.values() for seen in points.values() for value in seen]
        numbers = sorted({number for points in lines.values() for number in points})
        low, high, last = min(every), max(every), max(numbers)
        left, right, top, bottom = panel * width + margin, (panel + 1) * width - 14, margin + 20, height - margin

        def place(x, y, left=left, right=right, top=top, bottom=bottom, low=low, high=high, last=last):
            return left + (right - left) * x / last, bottom - (bottom - top) * (y - low) / ((high - low) or 1.0)

        pen.line([(left, top), (left, bottom), (right, bottom)], fill="#888")
        across = left
        for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
            line = [place(x, statistics.mean(seen)) for x, seen in sorted(points.items())]
            pen.line(line if len(line) > 1 else line * 2, fill=colour, width=2)
            for x, y in (place(x, value) for x, seen in points.items() for value in seen):
                pen.ellipse([x - 2, y - 2, x + 2, y + 2], outline=colour)
            pen.text((across, 24), name, fill=colour, font=font)
            across += pen.textlength(f"{name}   ", font=font)
        for x in numbers:
            pen.text((place(x, low)[0] - 4, bottom + 4), f"{x:g}", fill="#555", font=font)
        pen.text((left, 6), f"{metric} ({'more' if METRICS[metric][1] else 'less'} is better)", "black", font)
        pen.text((left - 34, top - 6), f"{high:.2g}", fill="#555", font=font)
        pen.text((left - 34, bottom - 8), f"{low:.2g}", fill="#555", font=font)
    save_image(chart, path)
    return True


def grid(part: str, options: Options, seed: int, path: Path) -> list[str]:
    """The first test cases: the true picture, then the systems' one under another. Returns the rows' names, none where
    no answers are there. A picture that did not come is grey."""
    _, data, rows = PICTURES[part]
    folders = {name: options.answers(scoring, seed) for name, scoring in rows.items()}
    folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
    tar = options.tar(data, test=True)
    if not folders or not tar.exists():
        return []
    columns = []
    for case in read_cases([str(tar)], "image", True)[0][:SHOWN]:
        true = pictures_of(case, case.pictures)[0]
        pictures = [true]
        for folder in folders.values():
            answer = read_answer(folder, case.key)
            _, came = split(answer.segments if answer else [])
            pictures.append(came[0] if came else Image.new("RGB", true.size, "lightgrey"))
        columns.append((case.turn.text, pictures))
    save_image(draw_sheet(columns, side=112), path)
    return ["the true picture", *folders]


# ---- all of it

NAMES = {"table1": "Table 1", "table2": "Table 2", "table3": "Table 3", "table5": "Table 5", "table6": "Table 6",
         "figure6": "Figure 6", "figure7": "Figure 7"}  # fmt: skip
HEAD = """# The paper's experiments{where}

Written by

{commands}

with {seeds}; steps and batch size are those of stage 1, samples the drawn training pairs, n the test cases of each kind
(0: all; `systems.py` has the rest). {data} {hours}

A value is the mean over seeds ± their deviation, behind it the paper's own. {networks} A missing picture counts as a
miss. A dash: not measured.
"""
DRAWN = (
    "Data are the miniature's drawn world: captioned pictures for CC3M, its stories for VIST, its dialogues for "
    "MMDialog; test data are held out, so the paper's values are of other data and other networks.",
    "Networks that see photographs are no use here: CLIP's place is taken by the miniature's own contrastive model "
    '("pairing"), Inception\'s by its judge, so FID and IS are a Frechet distance and an Inception-style score on the '
    'judge\'s features and compare only within this report. "all right": the share of pictures in which the judge '
    "finds every fact right that the caption or the step has; in dialogues every fact of the true picture, also where "
    'the request leaves it open. "true": words say something of the picture and nothing that is wrong of it.',
)
REAL = ("Data are the user's.", "The miniature's own measures are not for photographs.")
ABOUT = {  # beneath a table
    "table1": "The context is what is given of the earlier steps: nothing, their texts, their pictures, or both. "
              "Stable Diffusion reads as many of a story's texts as its encoder has room for. 0 and an IS of 1: no "
              "picture came.",
    "table2": "The paper's FID is one of the few pictures of each story, then the mean over stories, hence so high; "
              "FID without more words is of all pictures together.",
    "table3": "The paper's METEOR cannot be compared: the released code does not compute it, so its tokens and "
              "synonyms are not known. ROUGE-L is the released package's. A story's first step is left out.",
    "table5": "A case is any turn but a dialogue's first, also the human's, whose words nothing determines: that "
              "lowers all figures of words. The paper's BLEU cannot be compared: the released code gives nltk whole "
              "strings, so that it counts characters, a sentence at a time, and takes means over dialogues. BLEU-1 "
              'and BLEU-2 are of words and of the whole corpus; "MMDialog\'s" are means over replies, as its authors '
              "define them.",
    "table6": "Without CFG no condition is dropped in training, and sampling is guided against the encoding of the "
              "empty caption.",
    "figure6": "The paper: Stable Diffusion and MiniGPT-5 both get better with a larger scale; past 10 coherence "
               "stands still and quality falls.",
    "figure7": "The paper: every metric gets better with more vokens, most from 1 to 4.",
}  # fmt: skip


def hours(options: Options) -> str:
    seconds = sum(record["seconds"] for record in read_log(options.out / "times.jsonl"))
    machine = hardware(pick_device(options.device))
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    return f"The jobs took {seconds / 3600:.1f} hours, added up, on {where}." if seconds else ""


def head(options: Options, seeds: list[int], sizes: str) -> str:
    said = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    data, networks = REAL if options.data else DRAWN
    pairing = "    python experiments/pretrain.py --parts pairing --pictures 65536    # what stands for CLIP\n"
    command = f"    python experiments/paper.py{' --data DIR --weights weights' if options.data else ''}{sizes}"
    commands = ("" if options.data else pairing) + command
    where = "" if options.data else " in miniature"
    return HEAD.format(where=where, commands=commands, seeds=said, data=data, networks=networks, hours=hours(options))


def write_report(options: Options, seeds: list[int], folder: Path) -> None:
    figures, published = read_figures(options, seeds), read_json(PUBLISHED)
    if not figures:
        raise ValueError(f"{options.out / 'scores'}: no scores yet, so there is nothing to report")
    sizes = "".join(f" --{name.replace('_', '-')} {getattr(options, name)}" for name in SIZES)
    lines = [head(options, seeds, sizes), "## Claims", "", *claims(figures, published)]
    lines += ["A claim holds where the mean difference between the seeds' figures is over its standard error times "
              "Student's t for 95 % (`claims.py`). Of several comparisons the weakest is shown. A seed, of trainings "
              "and answers to the same test cases, is a claim's sample. Seeds to decide: how many would, if mean and "
              "deviation stayed as they are.", ""]  # fmt: skip
    notes = NOTES.read_text(encoding="utf-8")
    if notes.startswith(f"<!-- {sizes.strip()} -->\n"):  # they are about a run of these sizes
        lines += [notes.partition("\n")[2]]
    for part, content in TABLES.items():
        lines += [f"## {NAMES[part]}. {content.title}", ""]
        if part.startswith("figure") and plot(content, figures, folder / f"{part}.png"):
            lines += [f"![{content.title}]({part}.png)", ""]
        lines += [*table(part, content, figures, published), *([ABOUT[part], ""] if part in ABOUT else [])]
        if part == "table3":
            lines += ["## Table 4. A story continued in words and a picture, side by side", "",
                      "The paper's judges are people. " + (
                          "`python -m evaluation study` wrote the pages for them, `tally` has their table." if
                          options.data else "Here `duel.py` says when a continuation is better, by the attribute "
                          "judge; `python -m evaluation study` asks people.") + " Two stages: fine-tuned MiniGPT-4 "
                      "tells, Stable Diffusion draws what it told.", "", *duels(figures, published)]  # fmt: skip
    lines += ["## Figure 3. For each caption the picture that is preferred", "",
              "The paper prefers by HPS v2, and MiniGPT-5 wins most often. " + ("" if options.data else "In the drawn "
              "world HPS v2 has nothing to say: the picture with more right facts wins, of equal ones that with the "
              "higher image-text score."), "", *wins(figures)]  # fmt: skip
    for part, (title, _, _) in PICTURES.items():
        rows = grid(part, options, seeds[0], folder / f"{part}.png")
        lines += [f"## {'Figure 4. Pictures' if part == 'figure4' else 'Pictures'}: {title}", ""]
        lines += [f"From top to bottom: {'; '.join(rows)}.", "", f"![{title}]({part}.png)", ""] if rows else [NONE, ""]
    lines += ["## The paper's own figures", "", f"{published['source']} ([published.json](../published.json)).", ""]
    write_json(folder / "figures.json", {f"{name} {seed}": row for (name, seed), row in figures.items()})
    write_text(folder / "README.md", "\n".join(lines))
