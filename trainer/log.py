"""The files of a run that are for its reader: the log and two pictures.

    log.jsonl     a line every few steps: means of the losses since the last line, speed, memory, broken samples
    losses.png    the log as curves
    samples.png   real pictures above those that are painted from their vokens

They are in the run's folder.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from common.files import is_number, write_text
from common.images import to_image
from common.page import draw_grid, save_image
from generation import Sampling, paint
from minigpt5 import Batch, MiniGPT5, dtype_of, send
from vae import to_pixels

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
NUMBERS = ("step", "loss")  # endings of the names whose values are numbers in every record of a log


# ---- log.jsonl


def append_log(path: Path, record: dict) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:  # that of a full disk does not name the file
        raise ValueError(f"{path}: not written: {error.strerror}") from None


def read_log(path: Path) -> list[dict]:
    """The records of a log. Lines that are none, such as a last one that was cut off, are left out: those that are no
    object, and those whose step or losses are no numbers."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            record = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and all(is_number(v) for name, v in record.items() if name.endswith(NUMBERS)):
            records.append(record)
    return records


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run goes through those steps again."""
    records = [record for record in read_log(path) if "step" in record]
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    if others := sum(map(bool, lines)) - len(records):
        print(f"{path}: {others:,} lines are left out, because they are no records of a step")
    write_text(path, "".join(json.dumps(record) + "\n" for record in records if record["step"] <= step))


# ---- pictures of a run


def plot_losses(records: list[dict], path: Path) -> None:
    """One small chart for each loss over the steps, side by side, from 0 to its largest value; held-out losses are
    black."""
    records = [record for record in records if "step" in record]
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
    columns = zip(batch.picture_sequences.tolist(), real, painted.nan_to_num(), strict=False)
    draw_grid([(captions[row], [to_image(before), to_image(after)]) for row, before, after in columns], path)
