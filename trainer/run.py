"""What both training scripts need: common options, learning rate, random numbers, stopping, checkpoints.

A run's folder:

    log.jsonl losses.png samples.png   see run_log.py
    step-00000500/          a checkpoint, written and removed under another name: there is no half one
        trained.safetensors    all that trains (voken rows, mapper, adapter), what sample.py --checkpoint reads
        optimizer.safetensors  the optimisers' moments under the same names
        state.json             step, position in the data, sums of the next line of the log, the command's arguments
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.cli import DTYPES, add_weights_option, make_folder, parse
from minigpt5 import MiniGPT5, Noise
from published.checkpoints import checkpoint_folders, load_trained, save_trained
from published.loading import WeightsError, open_safetensors, read_json, save_safetensors
from trainer.log import Meter, added
from trainer.muon import Muon
from trainer.processes import Gradients, World

MOST_VOKENS = 128  # of a picture: those of stage 1's rows are beside a caption in 256 tokens
KEEP = 2  # newest checkpoints kept of a run


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
    least_1 = "drawn batch_size accumulate max_nonfinite save_every log_every val_every val_batches vokens"
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


def total_steps(args: argparse.Namespace, samples: int, ranks: int) -> int:
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


def draw_pictures(model: MiniGPT5, picture_rows: list[int], drop_rate: float, seed: int, step: int, at: int) -> Noise:
    """`model.draw` for a batch that begins with sample `at` of the step. A sample's random numbers are the same on
    whichever rank and in whichever forward pass it comes. picture_rows: see `Batch`."""
    pictures = Counter(picture_rows)  # of each row, in their order
    draws = [model.sample_noise(n, step_generator(seed, step, at + row), drop_rate) for row, n in pictures.items()]
    return Noise(*map(torch.cat, zip(*draws, strict=True))).to(model.device)


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
        save = getattr(model, "save_trained", None) or partial(save_trained, model)
        save(temporary / "trained.safetensors", stage)
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
            load = getattr(model, "load_trained", None) or partial(load_trained, model)
            load(folder / "trained.safetensors")
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


def stored_arguments(args: argparse.Namespace) -> dict:
    """The command's arguments as state.json holds them."""
    return json.loads(json.dumps(vars(args), default=str))


def run_state(args: argparse.Namespace, batches, meter: Meter, gradients: Gradients) -> dict:
    """What a checkpoint says besides tensors. Over all ranks, so all of them have to call this."""
    ranks = gradients.world.gather({**batches.state_dict(), **meter.state()})
    data = dict(min(ranks, key=lambda rank: (rank["epoch"], rank["position"])))
    data |= {name: added(rank[name] for rank in ranks) for name in ("bad", "sums", "passes")}
    data |= {"seen": sum(rank["seen"] for rank in ranks)}
    return {"data": data, "nonfinite": int(gradients.skipped), "arguments": stored_arguments(args)}


def go_on(state: dict | None, args: argparse.Namespace, batches, meter: Meter, gradients: Gradients) -> int:
    """Take up what `run_state` said, on any number of ranks; the step to go on with. Prints which options have
    changed."""
    step, world = state["step"] if state else 0, gradients.world
    if len(set(world.gather(step))) > 1:
        raise ValueError("the ranks find different checkpoints: --out must be one folder that all machines share")
    if state:
        batches.load_state_dict(state["data"])
        gradients.skipped += state.get("nonfinite", 0)
        if world.rank == 0:
            meter.load_state(state["data"])
        print(f"resumed from step {step}")
        before = state.get("arguments", {})
        for name, value in stored_arguments(args).items():
            if name not in ("out", "resume") and before.get(name, value) != value:
                print(f"--{name.replace('_', '-')} is {value} from here on, before it was {before[name]}")
    return step
