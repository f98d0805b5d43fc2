"""The files of a run that are for its reader: the log and two pictures.

    log.jsonl     a line every few steps: means of the losses since the last line, speed, memory, broken samples
    tensorboard/  the numbers of the log for TensorBoard, with --tensorboard
    losses.png    the log as curves
    samples.png   real pictures above those that are painted from their vokens

They are in the run's folder.
"""

import json
import re
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from common.cli import suited_options
from common.collate import Batch
from common.files import write_text
from common.images import to_image
from common.page import draw_sheet, save_image
from generation import Sampling, paint
from minigpt5 import MiniGPT5, dtype_of, send
from prompts import SPEAKERS
from vae import to_pixels

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#555555")
PANEL = 800, 520  # pixels of a chart, twice those of the file


# ---- log.jsonl


def open_board(out: Path, done: int):
    """TensorBoard's writer for a run that goes on after step `done`; TensorBoard then hides what an earlier start of
    the run wrote of later steps."""
    from torch.utils.tensorboard import SummaryWriter  # here, since few runs have it

    return SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)


def append_log(path: Path, record: dict, board=None) -> None:
    """A line of the log. Its numbers also go to `board`, where there is one."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:  # that of a full disk does not name the file
        raise ValueError(f"{path}: not written: {error.strerror}") from None
    if board:
        for name, value in record.items():
            if isinstance(value, int | float):
                board.add_scalar(name, value, record["step"])
        board.flush()


def read_log(path: Path) -> list[dict]:
    """The records of a log, without lines that are no JSON objects, such as a last one that was cut off."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError, RecursionError, TypeError):
            records.append({} | json.loads(line))
    return records


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run goes through those steps again."""
    records = [record for record in read_log(path) if record.get("step", step) <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


# ---- pictures of a run


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each value replaced by the mean over the tenth of all points around it; at the ends they are fewer."""
    reach, sums = len(points) // 20, [0.0, *accumulate(value for _, value in points)]
    spans = [(max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points))]
    return [(step, (sums[b] - sums[a]) / (b - a)) for (step, _), (a, b) in zip(points, spans, strict=True)]


def draw_chart(title: str, curves: list[tuple]) -> Image.Image:
    """A chart of some curves, each (points, colour, width of the line)."""
    chart, font = Image.new("RGB", PANEL, "white"), ImageFont.load_default(22)
    pen, (left, top, right, bottom) = ImageDraw.Draw(chart), (120, 70, PANEL[0] - 50, PANEL[1] - 60)
    steps, values = zip(*(point for points, _, _ in curves for point in points), strict=True)
    last, low, high = max(steps), min(values), max(values)

    def place(step: float, value: float) -> tuple[float, float]:
        return left + step / last * (right - left), bottom - (value - low) / ((high - low) or 1) * (bottom - top)

    for part in (0, 0.25, 0.5, 0.75, 1):
        step, value = last * part, low + (high - low) * part
        pen.line([place(0, value), place(last, value)], "#ddd", 2)
        pen.text((left - 12, place(0, value)[1]), f"{value:.3g}", "#555", font, anchor="rm")
        pen.text((place(step, low)[0], bottom + 14), f"{step:,.0f}", "#555", font, anchor="mt")
    for points, colour, width in curves:
        pen.line([place(*point) for point in points], colour, width, joint="curve")
        x, y = place(*points[-1])
        pen.ellipse([x - width, y - width, x + width, y + width], colour)
    pen.text((left, 20), title, "black", ImageFont.load_default(26))
    return chart


def plot_losses(records: list[dict], path: Path) -> None:
    """A chart for each loss and one for the learning rate, over the steps. Thin: the lines of the log; thick: their
    running mean; black: held-out losses. A title ends with the last value of each curve."""
    names = [name for name in ("loss", "text_loss", "ldm_loss", "cap_loss", "lr") if any(name in r for r in records)]
    if names in ([], ["lr"]):  # no loss was finite
        return
    columns = min(len(names), 3)
    sheet = Image.new("RGB", (PANEL[0] * columns, PANEL[1] * -(-len(names) // columns)), "white")
    for panel, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        points, held_out = ([(r["step"], r[key]) for r in records if key in r] for key in (name, f"val_{name}"))
        mean = points if name == "lr" else smoothed(points)
        title = f"{name}  {mean[-1][1]:.4g}" + (f", held out {held_out[-1][1]:.4g}" if held_out else "")
        curves = [curve for curve in ((points, colour, 1), (mean, colour, 4), (held_out, "black", 4)) if curve[0]]
        sheet.paste(draw_chart(title, curves), (panel % columns * PANEL[0], panel // columns * PANEL[1]))
    save_image(sheet.reduce(2), path)  # drawn twice as large, so that its lines are smooth


class Preview(NamedTuple):
    """The batch whose pictures samples.png shows: the first one after the command starts or resumes."""

    batch: Batch
    inputs: torch.Tensor | None  # input pictures, as `MiniGPT5.embed` takes them
    pictures: torch.Tensor  # the output pictures, bytes or moments, as `MiniGPT5.encode_pictures` takes them
    captions: list[str]  # the words beneath the pictures of each sequence


def picture_title(source: str, target: str) -> str:
    """The words beneath a picture in samples.png: those of the answer, or else the request's."""
    request = re.split(r"\n|###\w+:", source.removesuffix(SPEAKERS[1]).strip())[-1].strip()
    return re.sub(r"\[IMG\d+\]|###", "", target).strip() or request


@torch.no_grad()
def paint_samples(model: MiniGPT5, preview: Preview, weights: Path, path: Path) -> None:
    """The preview's first four pictures above those painted from their vokens, always from the same noise, with the
    guidance of the folder `weights`."""
    batch, _, pictures, captions = preview
    batch, was_training = send(batch, model.device), model.training
    model.eval()
    embeddings = model.embed(batch.ids, preview.inputs)
    hidden = type(model).hidden_states(model, embeddings, batch.targets)  # not the compiled one: no further graph
    features = model.voken_features(hidden, batch.picture_sequences[:4], batch.picture_starts[:4])
    latents = model.sample_latents(len(features), torch.Generator().manual_seed(0))
    sampling = Sampling.of(suited_options(weights, "sample") | {"sampler": "dpm", "steps": 20})
    painted = paint(model, features, sampling, latents)
    if pictures.dim() == 5:  # moments
        means = send(pictures[:4, 0], model.device).to(dtype_of(model.vae))
        real = model.vae.decode(means * model.vae.config.scaling_factor)
    else:
        real = to_pixels(pictures[:4])
    model.train(was_training)
    columns = zip(batch.picture_sequences.tolist(), real, painted.nan_to_num(), strict=False)
    columns = [(captions[row], [to_image(before), to_image(after)]) for row, before, after in columns]
    save_image(draw_sheet(columns), path)
