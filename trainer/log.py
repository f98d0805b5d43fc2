"""The files of a run that are for its reader: the log and two pictures.

    log.jsonl     a line every few steps: means of the losses since the last line, speed, memory, broken samples
    losses.png    the log as curves
    samples.png   real pictures above those that are painted from their vokens

They are in the run's folder.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from common.files import write_text
from common.images import to_image
from common.page import draw_grid, save_image
from generation import Sampling, paint
from minigpt5 import Batch, MiniGPT5, dtype_of, send
from vae import to_pixels

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


# ---- log.jsonl


@contextmanager
def one_line_write_errors(path: Path) -> Iterator[None]:
    """An error while `path` is written names it: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: not written: {error.strerror}") from None


def append_log(path: Path, record: dict) -> None:
    with one_line_write_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict]:
    """The whole lines of a log; a last line that was cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run goes through those steps again."""
    lines = [json.dumps(record) + "\n" for record in read_log(path) if record["step"] <= step]
    with one_line_write_errors(path):
        write_text(path, "".join(lines))


# ---- pictures of a run


def plot_losses(records: list[dict], path: Path) -> None:
    """One small chart for each loss over the steps, side by side, from 0 to its largest value; held-out losses are
    black."""
    names = [name for name in ("loss", "text_loss", "ldm_loss", "cap_loss") if any(name in r for r in records)]
    if not names:  # nothing was finite
        return
    width, height, margin = 320, 220, 34
    chart = Image.new("RGB", (width * len(names), height), "white")
    pen, font = ImageDraw.Draw(chart), ImageFont.load_default(12)
    for panel, name in enumerate(names):
        points, held_out = ([(r["step"], r[key]) for r in records if key in r] for key in (name, f"val_{name}"))
        last, top = (max(numbers) for numbers in zip(*points, *held_out, strict=True))
        left, right, bottom = panel * width + margin, (panel + 1) * width - 10, height - margin
        pen.line([(left, margin), (left, bottom), (right, bottom)], fill="#888")
        across, up = (right - left) / max(last, 1), (bottom - margin) / (top or 1.0)
        for curve, colour in ((points, COLOURS[panel]), (held_out, "black")):
            line = [(left + across * step, bottom - up * value) for step, value in curve]
            pen.line(line if len(line) > 1 else line * 2, fill=colour, width=2)
        ends = [f"{curve[-1][1]:.4f}" for curve in (points, held_out) if curve]
        pen.text((left, 8), f"{name}  {', held out '.join(ends)}", fill="black", font=font)
        pen.text((left - 30, margin - 6), f"{top:.2g}", fill="#555", font=font)
        pen.text((right - 60, bottom + 6), f"step {last}", fill="#555", font=font)
    save_image(chart, path)


class Preview(NamedTuple):
    """The batch whose pictures samples.png shows, which are the same during the whole run."""

    batch: Batch
    inputs: torch.Tensor | None  # input pictures, as `MiniGPT5.embed` takes them
    pictures: torch.Tensor  # the output pictures, bytes or moments, as `MiniGPT5.encode_pictures` takes them
    captions: list[str]  # what is written above the picture of each sequence


@torch.no_grad()
def paint_samples(model: MiniGPT5, preview: Preview, path: Path) -> None:
    """The preview's first four pictures above those painted from their vokens, always from the same noise."""
    batch, _, pictures, captions = preview
    batch, was_training = batch.to(model.device), model.training
    model.eval()
    embeddings = model.embed(batch.ids, preview.inputs)
    hidden = type(model).hidden_states(model, embeddings, batch.targets)  # not the compiled one: no further graph
    features = model.voken_features(hidden, batch.picture_sequences[:4], batch.picture_starts[:4])
    latents = model.sample_latents(len(features), torch.Generator().manual_seed(0))
    painted = paint(model, features, Sampling(sampler="dpm", steps=20), latents)
    if pictures.dim() == 5:  # moments
        means = send(pictures[:4, 0], model.device).to(dtype_of(model.vae))
        real = model.vae.decode(means * model.vae.config.scaling_factor)
    else:
        real = to_pixels(pictures[:4])
    model.train(was_training)
    columns = zip(batch.picture_sequences.tolist(), real, painted, strict=False)
    draw_grid([(captions[row], [to_image(before), to_image(after)]) for row, before, after in columns], path)
