"""What a training run shows of itself: its log's lines, losses on held-out data, a chart and pictures.

    log.jsonl     a line every few steps: means of the losses since the last one, speed, memory, what was broken
    losses.png    the log as curves
    samples.png   real pictures above those that their vokens paint

They lie in the run's folder, beside the checkpoints of training.py.
"""

import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from common.images import draw_grid, save_image, to_image
from generation import Sampling, paint
from minigpt5 import Batch, MiniGPT5, dtype_of, send
from trainer.processes import Gradients, World
from vae import to_pixels

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: of the GPU, or of the process (of mapped files what was read)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process: once all lengths were met, it should stay the same."""
    from torch._dynamo.utils import counters  # takes a second to import

    return counters["stats"]["unique_graphs"]


class Meter:
    """Means of the losses since the last line of the log, over all ranks and without what is not finite. Reads no value
    from the GPU until a line is due."""

    def __init__(self, per_step: int):
        self.per_step, self.sums, self.passes, self.steps, self.clock = per_step, {}, {}, 0, time.perf_counter()

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """The losses of one forward pass; a batch without pictures has fewer of them."""
        for name, value in losses.items():
            finite = value.detach().isfinite()
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().where(finite, 0.0)
            self.passes[name] = self.passes.get(name, 0) + finite

    def state(self) -> dict:
        """What the next line of the log will say about this rank so far."""
        return {"sums": values_of(self.sums), "passes": values_of(self.passes)}

    def load_state(self, state: dict) -> None:
        kinds = (state.get(kind, {}) for kind in ("sums", "passes"))
        self.sums, self.passes = ({name: torch.tensor(value) for name, value in kind.items()} for kind in kinds)

    def means(self, world: World) -> dict[str, float]:
        ranks = world.gather(self.state())
        sums, passes = (added(rank[kind] for rank in ranks) for kind in ("sums", "passes"))
        return {name: total / passes[name] for name, total in sums.items() if passes[name]}

    def line(self, step: int, optimizer: torch.optim.Optimizer, bad: dict, gradients: Gradients) -> dict:
        """The line of the log after `step`, and a new start."""
        seconds, device = time.perf_counter() - self.clock, gradients.flat.device
        record = {"step": step, **self.means(gradients.world), "lr": optimizer.param_groups[-1]["lr"]}
        bad = added(gradients.world.gather(dict(bad)))
        record |= {"samples_per_s": round(self.steps * self.per_step / seconds, 3)}
        record |= {"bad": bad, "nonfinite": int(gradients.skipped), "memory_gb": round(peak_memory(device), 2)}
        self.__init__(self.per_step)
        return record


def validate(model: MiniGPT5, batches, forward: Callable, count: int, world: World, asked: list) -> dict[str, float]:
    """{"val_loss", "val_text_loss", ...}: means over the first `count` batches of each rank, of one pass at most; {} if
    `asked` to stop. forward(batch, n) -> (losses of batch n, ...), with the same random numbers each time.

    Compiled losses keep what their gradients need, as graphs that do not would have to be made first.
    """
    start = batches.state_dict()
    count = min(count, -(-len(batches.dataset) // (batches.batch_size * world.size)))
    training, meter, stopping = model.training, Meter(0), False
    model.eval()
    with closing(batches), torch.set_grad_enabled(bool(model.compiled_for)):
        for n in range(count):
            meter.add(forward(next(batches), n)[0])
            if stopping := world.any(bool(asked)):
                break
    model.train(training)
    batches.load_state_dict(start)
    return {} if stopping else {f"val_{name}": value for name, value in meter.means(world).items()}


def values_of(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: tensor.item() for name, tensor in tensors.items()}


def added(counts: Iterable[dict]) -> dict:
    """The sum of dictionaries of numbers, name by name."""
    total = {}
    for count in counts:
        total |= {name: total.get(name, 0) + value for name, value in count.items()}
    return total


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of what writes `path` says so: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: not written: {error.strerror}") from None


def append_log(path: Path, record: dict) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
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
    try:
        with writing(path):
            temporary.write_text("".join(lines), encoding="utf-8")
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- pictures of a run


def draw_losses(records: list[dict], path: Path) -> None:
    """One small chart a loss over the steps, side by side, from 0 to its largest value; black: of held-out data."""
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


@torch.no_grad()
def paint_samples(
    model: MiniGPT5, rows: Batch, inputs: torch.Tensor | None, real: torch.Tensor, words: list[str], path: Path | None
) -> None:
    """The first four pictures of a batch, bytes or moments, above what their vokens paint, each with its words, always
    from one noise. Where layers are sharded all ranks have to paint, those without a path for the others."""
    training = model.training
    hidden = type(model).hidden_states(model.eval(), model.embed(rows.ids, inputs), rows.targets)
    features = model.voken_features(hidden, rows.picture_rows[:4], rows.picture_starts[:4])
    latents = model.sample_latents(len(features), torch.Generator().manual_seed(0))
    painted = paint(model, features, Sampling(sampler="dpm", steps=20), latents)
    if real.dim() == 5:
        means = send(real[:4, 0], model.device).to(dtype_of(model.vae))
        real = model.vae.decode(means * model.vae.config.scaling_factor)
    else:
        real = to_pixels(real[:4])
    model.train(training)
    if path is None:
        return
    columns = zip(rows.picture_rows.tolist(), real, painted, strict=False)
    draw_grid([(words[row], [to_image(before), to_image(after)]) for row, before, after in columns], path)
