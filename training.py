"""What both training scripts need: learning rate, checkpoints, the log, the pictures of a run. Plain functions.

A run's folder:

    log.jsonl               a line every few steps
    losses.png samples.png  drawn as the run goes on
    step-00000500/          a checkpoint, written under another name and then renamed: there is no half one
        trained.safetensors    the voken rows and the mapper, what sample.py --checkpoint reads
        optimizer.safetensors  AdamW's moments under the same names
        state.json             step, position in the data, the command's arguments
"""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from images import save_image
from loading import WeightsError, open_safetensors, read_json, save_safetensors

KEEP = 2  # newest checkpoints kept of a run
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up over `warmup` steps, then linearly to 0 at step `total`. Step 0 is the first."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def step_generator(seed: int, step: int, micro: int) -> torch.Generator:
    """The random numbers of one forward pass, a function of its place alone: a resumed run draws the same ones."""
    entropy = np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy) >> 1)


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: of the GPU, or of the process (of mapped files what was read)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---- checkpoints


def checkpoint_folders(out: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted(Path(out).glob("step-" + "[0-9]" * 8), reverse=True)


def find_checkpoint(place: Path) -> Path | None:
    """A safetensors file; or of a run's folder the newest checkpoint's; or of weights/minigpt5 uas.safetensors."""
    if place.is_file():
        return place
    for file in [folder / "trained.safetensors" for folder in checkpoint_folders(place)] + [place / "uas.safetensors"]:
        if file.is_file():
            return file
    return None


def save_checkpoint(out: Path, step: int, model, optimizer: torch.optim.AdamW, state: dict, stage: str) -> Path:
    """Write step-NNNNNNNN/ whole or not at all, then drop all but the KEEP newest."""
    folder = out / f"step-{step:08d}"
    temporary = out / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        model.save_trained(temporary / "trained.safetensors", stage)
        moments = {}
        for name, parameter in model.trained_parameters().items():
            for moment, tensor in optimizer.state.get(parameter, {}).items():
                moments[f"{moment}.{name}"] = tensor
        save_safetensors(moments, temporary / "optimizer.safetensors")
        with open(temporary / "state.json", "w", encoding="utf-8") as file:
            json.dump({"step": step, **state}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoint_folders(out)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def load_checkpoint(out: Path, model, optimizer: torch.optim.AdamW) -> dict | None:
    """Continue from the newest whole checkpoint of `out`: fills model and optimiser, returns its state, None if none.

    A checkpoint that cannot be read is named and passed over; ValueError if that leaves none.
    """
    folders = checkpoint_folders(out)
    for folder in folders:
        try:
            state = read_json(folder / "state.json")
            with open_safetensors(folder / "optimizer.safetensors") as file:
                moments = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a file is no dictionary
            model.load_trained(folder / "trained.safetensors")
        except WeightsError as error:
            print(f"passed over: {error}")
            continue
        for name, parameter in model.trained_parameters().items():
            own = {key.partition(".")[0]: t for key, t in moments.items() if key.partition(".")[2] == name}
            optimizer.state[parameter] = {k: t if k == "step" else t.to(parameter.device) for k, t in own.items()}
        return state
    if folders:
        raise ValueError(f"{out}: none of its {len(folders)} checkpoints fits this run")
    return None


# ---- the log


def append_log(path: Path, record: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
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
    """Drop what was logged after `step`: a resumed run goes through those steps again."""
    lines = [json.dumps(record) + "\n" for record in read_log(path) if record["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


# ---- pictures of a run


def draw_losses(records: list[dict], path: Path) -> None:
    """One small chart a loss over the steps, side by side, each from 0 to its own largest value."""
    names = [name for name in ("loss", "text_loss", "ldm_loss", "cap_loss") if any(name in r for r in records)]
    width, height, margin = 320, 220, 34
    chart = Image.new("RGB", (width * len(names), height), "white")
    pen, font = ImageDraw.Draw(chart), ImageFont.load_default(12)
    for panel, name in enumerate(names):
        points = [(r["step"], r[name]) for r in records if name in r]
        last, top = max(step for step, _ in points), max(value for _, value in points) or 1.0
        left, right, bottom = panel * width + margin, (panel + 1) * width - 10, height - margin
        pen.line([(left, margin), (left, bottom), (right, bottom)], fill="#888")
        across, up = (right - left) / max(last, 1), (bottom - margin) / top
        line = [(left + across * step, bottom - up * value) for step, value in points]
        pen.line(line if len(line) > 1 else line * 2, fill=COLOURS[panel], width=2)
        pen.text((left, 8), f"{name}  {points[-1][1]:.4f}", fill="black", font=font)
        pen.text((left - 30, margin - 6), f"{top:.2g}", fill="#555", font=font)
        pen.text((right - 60, bottom + 6), f"step {last}", fill="#555", font=font)
    save_image(chart, path)


def draw_grid(rows: list[tuple[str, list[Image.Image]]], path: Path, side: int = 192) -> None:
    """(caption, pictures) -> one column a caption, its pictures under one another, the words beneath."""
    font = ImageFont.load_default(12)
    tall = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (len(rows) * (side + 8), tall * (side + 8) + 52), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (caption, pictures) in enumerate(rows):
        left = column * (side + 8) + 4
        for row, picture in enumerate(pictures):
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, row * (side + 8) + 4))
        lines = [""]
        for word in caption.split():
            if lines[-1] and pen.textlength(f"{lines[-1]} {word}", font=font) > side:
                lines.append(word)
            else:
                lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((left, tall * (side + 8) + 2), "\n".join(lines[:3]), fill="black", font=font)
    save_image(sheet, path)
