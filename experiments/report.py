"""Writes experiments/report/ from the scores that are there: README.md, plots and grids of pictures.

    write_report(options, seeds, folder)

A value is the mean over seeds with the sample deviation between them ("0.52 ± 0.03"); what is not measured is a dash.
Where the paper's own value is known (published.json) it stands behind ours.
"""

import statistics
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bench.common import hardware
from common.cli import pick_device
from common.files import read_json, write_text
from common.page import draw_grid, save_image
from evaluation.cases import pictures_of, read_answer, read_cases
from experiments.claims import CLAIMS, FAILS, HOLDS, NOISE, differences, verdict
from experiments.duel import WAYS
from experiments.systems import METRICS, PICTURES, SIZES, TABLES, Options, Table, scorings_of
from trainer.log import COLOURS, read_log

PUBLISHED = Path(__file__).parent / "published.json"
NOTES = Path(__file__).resolve().parent / "notes.md"  # by hand, on the run whose report this repository has
SHOWN = 8  # columns of a grid
NONE = "-"  # what is not measured
Figures = dict[tuple[str, int], dict[str, float]]  # (scoring, seed) -> {metric: value}


# ---- figures


def read_figures(options: Options, seeds: list[int]) -> Figures:
    """Of all scorings that are done, under the paper's names."""
    found = {}
    for name in sorted({name for part in TABLES for name in scorings_of(part)}):
        for seed in seeds:
            path = options.score(name, seed)
            if path.is_file():
                figures = read_json(path)["figures"]
                titles = {
                    metric: next((t for t in known if t in figures), None) for metric, (known, _) in METRICS.items()
                }
                found[name, seed] = {metric: figures[title] for metric, title in titles.items() if title}
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


def table(part: str, content: Table, figures: Figures, published: dict) -> list[str]:
    known, rows = published.get(part, {}), []
    for label, scoring in content.rows.items():
        row = [label]
        for metric in content.columns:
            theirs = known.get(label, {}).get(metric)
            behind = f" (paper {theirs:g})" if theirs is not None else ""
            row.append(spread(values(figures, scoring, metric)) + behind)
        rows.append(row)
    columns = [f"{name} {'↑' if METRICS[name][1] else '↓'}" for name in content.columns]
    return rows_of(columns, rows)


def duels(options: Options, seeds: list[int], published: dict) -> list[str]:
    files = [options.score("table4", seed) for seed in seeds]
    records = [read_json(path)["ways"] for path in files if path.is_file()]
    columns = ["MiniGPT-5 better", "even", "two stages better", "MiniGPT-5 right", "two stages right"]
    names, rows = ("first", "even", "second", "first right", "second right"), []
    for way in WAYS:
        row = [way]
        for name in names:
            theirs = published.get("table4", {}).get(way, {}).get(name)
            behind = f" (paper {theirs:g})" if theirs is not None else ""
            row.append(spread([record[way][name] for record in records]) + behind)
        rows.append(row)
    return rows_of(columns, rows)


def claims(figures: Figures, options: Options, seeds: list[int]) -> list[str]:
    rows = []
    for claim in CLAIMS:
        found = differences(claim, figures)
        what = f"{claim.metric}: {claim.better} against {claim.worse}"
        rows.append([claim.text, claim.source, what, signed(found), f"**{verdict(found)}**"])
    for way in WAYS:
        files = [options.score("table4", seed) for seed in seeds]
        records = [read_json(path)["ways"][way] for path in files if path.is_file()]
        found = [record["first"] - record["second"] for record in records]
        text, what = f"Better than two stages: {way}", "table 4: share better minus share worse"
        rows.append([text, "abstract: better in more than 56 % of cases", what, signed(found), f"**{verdict(found)}**"])
    told = Counter(row[-1].strip("*") for row in rows)
    open_ones = len(rows) - told[HOLDS] - told[FAILS] - told[NOISE]  # not measured, or with one seed
    count = f"Of {len(rows)} claims {told[HOLDS]} hold, {told[FAILS]} do not, {told[NOISE]} are within noise"
    count += f", {open_ones} are open." if open_ones else "."
    head = "| the paper's claim | said in | measured as | by how much | here |"
    return [count, "", head, "| --- | --- | --- | ---: | --- |", *(f"| {' | '.join(row)} |" for row in rows), ""]


def signed(numbers: list[float]) -> str:
    return NONE if not numbers else ("" if statistics.mean(numbers) < 0 else "+") + spread(numbers)


# ---- pictures


def plot(content: Table, figures: Figures, path: Path) -> bool:
    """A small chart a metric over the rows' numbers, each from its own least to its largest value: a point a seed, a
    line through the means. False where nothing is measured."""
    measured = {m: {x: values(figures, s, m) for x, s in content.rows.items()} for m in content.columns}
    measured = {m: {float(x): v for x, v in points.items() if v} for m, points in measured.items()}
    measured = {metric: points for metric, points in measured.items() if points}
    if not measured:
        return False
    width, height, margin = 300, 220, 38
    chart = Image.new("RGB", (width * len(measured), height), "white")
    pen, font = ImageDraw.Draw(chart), ImageFont.load_default(12)
    for panel, (metric, points) in enumerate(measured.items()):
        every = [value for seen in points.values() for value in seen]
        low, high, last = min(every), max(every), max(points)
        left, right, bottom = panel * width + margin, (panel + 1) * width - 14, height - margin

        def place(x, y, left=left, right=right, bottom=bottom, low=low, high=high, last=last):
            return left + (right - left) * x / last, bottom - (bottom - margin) * (y - low) / ((high - low) or 1.0)

        colour = COLOURS[panel % len(COLOURS)]
        pen.line([(left, margin), (left, bottom), (right, bottom)], fill="#888")
        line = [place(x, statistics.mean(seen)) for x, seen in sorted(points.items())]
        pen.line(line if len(line) > 1 else line * 2, fill=colour, width=2)
        for x, seen in points.items():
            for value in seen:
                across, up = place(x, value)
                pen.ellipse([across - 2, up - 2, across + 2, up + 2], outline=colour)
            pen.text((place(x, low)[0] - 4, bottom + 4), f"{x:g}", fill="#555", font=font)
        pen.text(
            (left, 6), f"{metric} {'(more is better)' if METRICS[metric][1] else '(less is better)'}", "black", font
        )
        pen.text((left - 34, margin - 6), f"{high:.2g}", fill="#555", font=font)
        pen.text((left - 34, bottom - 8), f"{low:.2g}", fill="#555", font=font)
    save_image(chart, path)
    return True


def grid(part: str, options: Options, seed: int, path: Path) -> list[str]:
    """The first test cases: the true picture, then the systems' one under another. Returns the rows' names, none where
    no answers are there. A picture that did not come is grey."""
    _, data, rows = PICTURES[part]
    folders = {name: options.answers(scoring, seed) for name, scoring in rows.items()}
    folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
    tar = options.test_tar(data)
    if not folders or not tar.is_file():
        return []
    columns = []
    for case in read_cases([str(tar)], "image", True)[0][:SHOWN]:
        true = pictures_of(case, case.pictures)[0]
        pictures = [true]
        for folder in folders.values():
            answer = read_answer(folder, case.key)
            came = [segment for segment in (answer.segments if answer else []) if not isinstance(segment, str)]
            pictures.append(came[0] if came else Image.new("RGB", true.size, "lightgrey"))
        columns.append((case.turn.text, pictures))
    draw_grid(columns, path, side=112)
    return ["the true picture", *folders]


# ---- all of it

NAMES = {"table1": "Table 1", "table2": "Table 2", "table3": "Table 3", "table5": "Table 5", "table6": "Table 6",
         "figure6": "Figure 6", "figure7": "Figure 7"}  # fmt: skip
HEAD = """# The paper's experiments in miniature

Written by

    python miniature/pretrain.py --parts pairing --pictures 65536    # what stands for CLIP, unless it is there
    python experiments/paper.py{sizes}

with {seeds}; steps and batch size are those of stage 1, samples the training pairs, n the test cases of each kind
(`systems.py` has the rest). Data are the miniature's drawn world: captioned pictures for CC3M, its stories for VIST,
its dialogues for MMDialog; test data are held out. {hours}

A value is the mean over seeds ± their deviation. Networks that see photographs are no use here: CLIP's place is taken
by the miniature's own contrastive model ("pairing"), Inception's by its judge, so FID and IS are a Frechet distance and
an Inception-style score on the judge's features and compare only within this report. "all right": the share of
pictures in which the judge finds every fact right that the caption or the step has; in dialogues every fact of the true
picture, also where the request leaves it open. "true": words say something of the picture and nothing that is wrong of
it. A missing picture counts as a miss. A dash: not measured.
"""


def hours(options: Options) -> str:
    seconds = sum(record["seconds"] for record in read_log(options.out / "times.jsonl"))
    machine = hardware(pick_device(options.device))
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    return f"The jobs took {seconds / 3600:.1f} hours, added up, on {where}." if seconds else ""


def write_report(options: Options, seeds: list[int], folder: Path) -> None:
    figures, published = read_figures(options, seeds), read_json(PUBLISHED)
    if not figures:
        raise ValueError(f"{options.out / 'scores'}: no scores yet, so there is nothing to report")
    said = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    sizes = "".join(f" --{name.replace('_', '-')} {getattr(options, name)}" for name in SIZES)
    lines = [HEAD.format(seeds=said, hours=hours(options), sizes=sizes)]
    lines += ["## Claims", "", *claims(figures, options, seeds)]
    lines += ["A claim holds where the mean difference between the seeds' figures is over its standard error times "
              "Student's t for 95 % (`claims.py`).", ""]  # fmt: skip
    notes = NOTES.read_text(encoding="utf-8")
    if notes.startswith(f"<!-- {sizes.strip()} -->\n"):  # they are about a run of these sizes
        lines += [notes.partition("\n")[2]]
    for part, content in TABLES.items():
        lines += [f"## {NAMES[part]}. {content.title}", ""]
        if part.startswith("figure") and plot(content, figures, folder / f"{part}.png"):
            lines += [f"![{content.title}]({part}.png)", ""]
        lines += table(part, content, figures, published)
        if part == "table1":
            lines += ["The context is what is given of the earlier steps: nothing, their texts, their pictures, or "
                      "both. Stable Diffusion reads as many of a story's texts as its encoder has room for. 0 and an "
                      "IS of 1: no picture came.", ""]  # fmt: skip
        if part == "table3":
            lines += ["## Table 4. A story continued in words and a picture, side by side", "",
                      "The paper's human judges are replaced by the attribute judge: `duel.py` says when a "
                      "continuation is better. Two stages: fine-tuned MiniGPT-4 tells, fine-tuned SD draws "
                      "what it told, a sentence that seldom names the scene.", "",
                      *duels(options, seeds, published)]  # fmt: skip
        if part == "table5":
            lines += ["A case is any turn but a dialogue's first, also the human's, whose words nothing determines: "
                      "that lowers all figures of words.", ""]  # fmt: skip
        if part == "table6":
            lines += ["GILL and MiniGPT-5 without L_LDM are one training here (`systems.py`). Without CFG: no "
                      "condition is dropped in training, guidance 1 in sampling.", ""]  # fmt: skip
    for part, (title, _, _) in PICTURES.items():
        rows = grid(part, options, seeds[0], folder / f"{part}.png")
        lines += [f"## {'Figure 4. Pictures' if part == 'figure4' else 'Pictures'}: {title}", ""]
        lines += [f"From top to bottom: {'; '.join(rows)}.", "", f"![{title}]({part}.png)", ""] if rows else [NONE, ""]
    lines += ["## Figure 3. HPS v2", "", "It measures what people prefer in photographs and paintings, and has no "
              "counterpart in the drawn world; `python -m evaluation --hps` computes it at full size.", ""]  # fmt: skip
    unknown = ", ".join(name for part, name in NAMES.items() if part not in published)
    lines += ["## The paper's own figures", "", published["source"], "", f"So there are none for: {unknown}.", ""]
    write_text(folder / "README.md", "\n".join(lines))
