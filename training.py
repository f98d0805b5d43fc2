"""What both training scripts need: common options, learning rate, stopping, checkpoints, log, pictures of a run.

A run's folder:

    log.jsonl               a line every few steps
    losses.png samples.png  drawn as the run goes on
    step-00000500/          a checkpoint, written and removed under another name: there is no half one
        trained.safetensors    all that trains (voken rows, mapper, adapter), what sample.py --checkpoint reads
        optimizer.safetensors  the optimisers' moments under the same names
        state.json             step, position in the data, sums of the next line of the log, the command's arguments
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from checkpoints import checkpoint_folders
from cli import DTYPES, add_weights_option, make_folder, parse
from generation import Sampling, paint
from images import draw_grid, save_image, to_image
from loading import WeightsError, open_safetensors, read_json, save_safetensors
from minigpt5 import Draws, MiniGPT5, Rows, send, type_of
from muon import Muon
from parallel import Gradients, World
from vae import to_pixels

MOST_VOKENS = 128  # of a picture: those of stage 1's rows are beside a caption in 256 tokens
KEEP = 2  # newest checkpoints kept of a run
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def add_run_options(parser: argparse.ArgumentParser, out: str, epochs: float, batch_size: int) -> None:
    """The options that both stages have, with their defaults."""
    add = parser.add_argument
    add_weights_option(parser)
    add("--out", type=Path, default=Path(out), help="folder of the run")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint in --out, or start")
    add("--drawn", type=int, default=20_000, help="without --data: samples of the miniature's world to draw")
    add("--epochs", type=float, default=epochs, help="passes over the data")
    add("--steps", type=int, help="optimiser steps in all; overrides --epochs")
    add("--batch-size", type=int, default=batch_size, help="samples of one forward pass, on each GPU")
    add("--accumulate", type=int, default=1, help="forward passes of one optimiser step")
    add("--warmup", type=int, default=1000, help="steps of linear warm-up")
    add("--no-cfg", action="store_true", help="never drop the condition (the paper's ablation)")
    add("--no-ldm", action="store_true", help="without L_LDM (the paper's ablation)")
    add("--min-snr-gamma", type=float, default=5.0, help="L_LDM weighted by min(SNR, gamma)/SNR, as released; 0: not")
    add("--seed", type=int, default=0)
    add("--group", type=int, default=8, help="batches among which rows are sorted by length, for less padding; 1: none")
    add("--workers", type=int, default=4, help="processes that read pictures; 0: none")
    add("--max-bad", type=float, default=0.01, help="stop when more than this share, of 1,000 at least, is broken")
    add(
        "--max-nonfinite",
        type=int,
        default=20,
        help="stop after so many steps in a row that were skipped, as not finite",
    )
    add("--save-every", type=int, default=1000, help="steps between checkpoints; the last step always has one")
    add("--sample-every", type=int, default=1000, help="steps between samples.png; 0: never")
    add("--val", nargs="+", metavar="DATA", help="held-out data whose losses are logged, as val_loss and so on")
    add("--val-every", type=int, default=1000, help="steps between these; the last step always has them")
    add("--val-batches", type=int, default=20, help="batches of --val, on each GPU, that they are means over")
    add("--log-every", type=int, default=10, help="steps between lines of log.jsonl, which hold means over them")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, default="auto", help="of the frozen weights; auto: bf16 on a GPU (README, Memory)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the losses; default: on a GPU")
    add("--gradient-checkpointing", action="store_true", help="compute frozen layers twice to save memory")
    add("--shard", action="store_true", help="each of several processes holds a part of Vicuna and of the UNet")


def check_run_options(parser: argparse.ArgumentParser, command: str) -> argparse.Namespace:
    args = parse(parser, command)
    least_1 = "drawn batch_size accumulate group max_nonfinite save_every log_every val_every val_batches vokens"
    for name in least_1.split():
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("lr", "output_lr", "mapper_lr", "adapter_lr", "muon"):
        if (getattr(args, name, None) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0")
    if not 0 <= args.max_bad <= 1:
        parser.error("--max-bad must be from 0 to 1")
    if args.epochs <= 0 or args.warmup < 0:
        parser.error("--epochs must be above 0, --warmup at least 0")
    if args.steps is not None and args.steps < 1:
        parser.error("--steps must be at least 1")
    if getattr(args, "vokens", 1) > MOST_VOKENS:
        parser.error(f"--vokens must be at most {MOST_VOKENS}")
    if args.shard and args.compile:
        parser.error("--shard cannot be combined with --compile: layers that are put together on the way are no graph")
    return args


def open_run(args: argparse.Namespace, world: World) -> Path:
    """The run's folder. ValueError where it holds a run already that is not to be resumed, or for --shard alone."""
    if args.shard and world.size == 1:
        raise ValueError("--shard needs several processes: torchrun starts them (README, Several GPUs)")
    out = make_folder(args.out)
    for left in sorted(out.glob(".*.tmp")) if world.rank == 0 else []:
        print(f"removed: {left}, which an earlier process could not finish")
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if checkpoint_folders(out) and not args.resume:
        raise ValueError(f"{out} holds a run already: --resume goes on with it, another --out starts anew")
    return out


def drawn_data(write: Callable[..., None], args: argparse.Namespace, size: int) -> list[str]:
    """A tar of the miniature's world in the run's folder, drawn once: `write` is one of miniature.world's writers."""
    path = args.out / f"{write.__name__.removeprefix('write_')}-{args.drawn}-{args.seed}.tar"
    if not path.exists():
        print(f"drawing {args.drawn:,} samples into {path}", flush=True)
        write(path, args.drawn, args.seed, size=size)
    return [str(path)]


def total_steps(args: argparse.Namespace, samples: int | None, ranks: int) -> int:
    if args.steps is None and samples is None:
        raise ValueError("--steps is needed: streamed tars do not tell how many samples they hold")
    if args.steps is not None:
        return args.steps
    return max(1, round(args.epochs * samples / (ranks * args.batch_size * args.accumulate)))


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up over `warmup` steps, then linearly to 0 at step `total`. Step 0 is the first."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def step_generator(seed: int, step: int, *place: int) -> torch.Generator:
    """The random numbers of a place in a step, a function of it alone: a resumed run draws the same ones. Zeros at the
    end of a place make no other place."""
    entropy = np.random.SeedSequence([seed, step, *place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy) >> 1)


def draw_pictures(model: MiniGPT5, picture_rows: list[int], drop_rate: float, seed: int, step: int, at: int) -> Draws:
    """`model.draw` for a batch that begins with sample `at` of the step. A sample's random numbers are the same on
    whichever rank and in whichever forward pass it comes. picture_rows: see `Rows`."""
    pictures = Counter(picture_rows)  # of each row, in their order
    draws = [model.draw(n, step_generator(seed, step, at + row), drop_rate) for row, n in pictures.items()]
    return Draws(*map(torch.cat, zip(*draws, strict=True))).to(model.device)


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: of the GPU, or of the process (of mapped files what was read)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process: once all lengths were met, it should stay the same."""
    from torch._dynamo.utils import counters  # takes a second to import

    return counters["stats"]["unique_graphs"]


# ---- stopping


@contextmanager
def stop_signals() -> Iterator[list]:
    """A list that is no longer empty once the process was asked to stop (SIGTERM, Ctrl-C)."""
    asked = []
    before = {number: signal.signal(number, lambda *_: asked.append(1)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command() -> str:
    """The command that goes on with this run; of several machines, but for where they meet."""
    start, local = [Path(sys.executable).name], int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if local:  # by torchrun
        start = ["torchrun", "--nnodes", str(int(os.environ["WORLD_SIZE"]) // local), "--nproc-per-node", str(local)]
    return shlex.join([*start, *sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])


def stop_if_nonfinite(gradients: Gradients, limit: int, step: int, out: Path) -> None:
    """ValueError where `limit` steps in a row were skipped, as all ranks know. Looked at with each line of the log."""
    longest = int(gradients.longest)
    if longest >= limit:
        if gradients.world.rank > 0:
            sys.exit(2)  # rank 0 says why
        saved = next((folder.name for folder in checkpoint_folders(out)), "none yet")
        what = f"loss or gradients of {longest} steps in a row up to step {step} were not finite"
        raise ValueError(f"{what}, --max-nonfinite is {limit}; the newest checkpoint is whole: {out}, {saved}")


# ---- checkpoints


def save_checkpoint(
    out: Path, step: int, model, optimizers: list[torch.optim.Optimizer], state: dict, stage: str
) -> Path:
    """Write step-NNNNNNNN/ whole or not at all, on the disk when this returns, then drop all but the KEEP newest.

    ValueError where that fails, and where there is something to save that is not finite.
    """
    folder = out / f"step-{step:08d}"
    temporary = out / f".{folder.name}.{os.getpid()}.tmp"
    trained = model.trained_parameters()
    moments = {}
    for name, parameter in trained.items():
        for optimizer in optimizers:
            moments |= {f"{kind}.{name}": tensor for kind, tensor in optimizer.state.get(parameter, {}).items()}
    try:
        for name, tensor in (trained | moments).items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite, training has diverged")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        model.save_trained(temporary / "trained.safetensors", stage)
        save_safetensors(moments, temporary / "optimizer.safetensors")
        with open(temporary / "state.json", "w", encoding="utf-8") as file:
            json.dump({"step": step, **state}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(temporary)
        drop_checkpoint(folder)  # a damaged one of this step, which --resume passed over
        temporary.replace(folder)
        sync_folder(out)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        kept = ", ".join(old.name for old in checkpoint_folders(out)) or "none"
        raise ValueError(f"{folder}: not written: {reason}; checkpoints of this run: {kept}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoint_folders(out)[KEEP:]:
        drop_checkpoint(old)
    return folder


def drop_checkpoint(folder: Path) -> None:
    """Remove it if it is there, under another name, so that a process that is killed on the way leaves no half one."""
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}.tmp")
    with suppress(OSError):
        folder.replace(old)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk, too."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def load_checkpoint(out: Path, model, optimizers: list[torch.optim.Optimizer]) -> dict | None:
    """Continue from the newest whole checkpoint of `out`: fills model and optimisers, returns its state, None if none.

    A checkpoint that cannot be read is named and passed over; ValueError if that leaves none.
    """
    folders = checkpoint_folders(out)
    for folder in folders:
        try:
            state = read_json(folder / "state.json")
            if "data" not in state or state.get("step") != int(folder.name.removeprefix("step-")):
                raise WeightsError(f"{folder / 'state.json'}: not the state of this step, or no position in the data")
            with open_safetensors(folder / "optimizer.safetensors") as file:
                moments = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a file is no dictionary
            shapes = {name: parameter.shape for name, parameter in model.trained_parameters().items()}
            for key, tensor in moments.items():
                if not tensor.is_floating_point() or tensor.shape not in ((), shapes.get(key.partition(".")[2])):
                    kind = f"{tensor.dtype} {tuple(tensor.shape)}"
                    raise WeightsError(f"{folder / 'optimizer.safetensors'}: {key} fits no trained tensor ({kind})")
            model.load_trained(folder / "trained.safetensors")
        except WeightsError as error:
            print(f"passed over: {error}")
            continue
        names = {parameter: name for name, parameter in model.trained_parameters().items()}
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                own = {k.partition(".")[0]: t for k, t in moments.items() if k.partition(".")[2] == names[parameter]}
                if own and ("average" in own) != isinstance(optimizer, Muon):
                    raise ValueError(f"{folder}: {names[parameter]} had another optimiser; go on with the same --muon")
                if own:
                    optimizer.state[parameter] = {kind: t.to(parameter.device) for kind, t in own.items()}
        return state
    if folders:
        raise ValueError(f"{out}: none of its {len(folders)} checkpoints fits this run")
    return None


def group_of(args: argparse.Namespace, batches) -> int:
    """The batches among which rows are sorted by length; of streamed tars none are."""
    return 1 if batches.dataset_size() is None else args.group


def run_state(args: argparse.Namespace, batches, meter: "Meter", gradients: Gradients) -> dict:
    """What a checkpoint says besides tensors. Over all ranks, so all of them have to call this."""
    ranks = gradients.world.gather({**batches.state_dict(), **meter.state()})
    data = dict(min(ranks, key=lambda rank: (rank["epoch"], rank["position"])))
    data |= {name: added(rank[name] for rank in ranks) for name in ("bad", "sums", "passes")}
    data |= {"seen": sum(rank["seen"] for rank in ranks)}
    if "cursors" in data:  # of streamed tars, each rank's own
        data["cursors"] = [cursor for rank in ranks for cursor in rank["cursors"]]
    arguments = json.loads(json.dumps(vars(args), default=str))
    groups = [group_of(args, batches), args.batch_size * len(ranks)]
    return {"data": data, "groups": groups, "nonfinite": int(gradients.skipped), "arguments": arguments}


def go_on(state: dict | None, args: argparse.Namespace, batches, meter: "Meter", gradients: Gradients) -> int:
    """Take up what `run_state` said, on any number of ranks; the step to go on with. ValueError where samples would be
    repeated or left out: those of a group (see data.py) are in batches of one size."""
    step, world = state["step"] if state else 0, gradients.world
    if len(set(world.gather(step))) > 1:
        raise ValueError("the ranks find different checkpoints: --out must be one folder that all machines share")
    if state:
        groups = [group_of(args, batches), args.batch_size * world.size]
        group, size = state.get("groups", groups)
        if [group, size] != groups and max(group, groups[0]) > 1:
            now = f"{groups[0]} batches of {groups[1]}"
            raise ValueError(f"cannot resume: --group sorted {group} batches of {size} samples of all ranks, now {now}")
        batches.load_state_dict(state["data"])
        gradients.skipped += state.get("nonfinite", 0)
        if world.rank == 0:
            meter.load_state(state["data"])
        print(f"resumed from step {step}")
    return step


# ---- the log


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
    start, size = batches.state_dict(), batches.dataset_size()
    if size is not None:
        count = min(count, -(-size // (batches.batch_size * world.size)))
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
    model: MiniGPT5, rows: Rows, inputs: torch.Tensor | None, real: torch.Tensor, words: list[str], path: Path | None
) -> None:
    """The first four pictures of a batch, bytes or moments, above what their vokens paint, each with its words, always
    from one noise. Where layers are sharded all ranks have to paint, those without a path for the others."""
    training = model.training
    hidden = model.eval().read(rows, inputs)
    features = model.voken_features(hidden, rows.picture_rows[:4], rows.picture_starts[:4])
    latents = model.draw_latents(len(features), torch.Generator().manual_seed(0))
    painted = paint(model, features, Sampling(sampler="dpm", steps=20), latents)
    if real.dim() == 5:
        means = send(real[:4, 0], model.device).to(type_of(model.vae))
        real = model.vae.decode(means * model.vae.config.scaling_factor)
    else:
        real = to_pixels(real[:4])
    model.train(training)
    if path is None:
        return
    columns = zip(rows.picture_rows.tolist(), real, painted, strict=False)
    draw_grid([(words[row], [to_image(before), to_image(after)]) for row, before, after in columns], path)
