"""The options that all training scripts have."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from common.cli import parse

MAX_VOKENS = 128  # of a picture: in stage 1 they stand behind a caption in a sequence of 256 tokens
MAX_BATCH, MAX_WORKERS = 65_536, 1_024
COUNTS = ("drawn", "batch_size", "accumulate", "max_nonfinite", "vokens", "val_batches")
PERIODS = ("save_every", "log_every", "val_every")  # in steps
RATES = ("lr", "output_lr", "mapper_lr", "adapter_lr", "muon")


def add_run_options(parser: argparse.ArgumentParser, out: str, epochs: float, batch_size: int) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help="folder of the run")
    add("--resume", action="store_true", help="continue from the newest intact checkpoint in --out, if there is one")
    add("--drawn", type=int, default=20_000, help="without --data: samples of the miniature's world to draw")
    add("--epochs", type=float, default=epochs, help="passes over the data")
    add("--steps", type=int, help="optimiser steps in all; overrides --epochs")
    add("--batch-size", type=int, default=batch_size, help="samples of one forward pass, on each GPU")
    add("--accumulate", type=int, default=1, help="forward passes of one optimiser step")
    add("--warmup", type=int, default=1000, help="steps of linear warm-up of the learning rates")
    add("--no-cfg", action="store_true", help="never replace voken features by zeros (an ablation of the paper)")
    add("--no-ldm", action="store_true", help="train without L_LDM (an ablation of the paper)")
    add("--min-snr-gamma", type=float, default=5.0,
        help="weight L_LDM by min(SNR, gamma) / SNR, as released; 0: no weights, as in the paper")  # fmt: skip
    add("--seed", type=int, default=0, help="of all random numbers of the run")
    add("--workers", type=int, default=4, help="processes that read pictures; 0: the main process reads them")
    add("--max-bad", type=float, default=0.01,
        help="stop when more than this share of the samples is broken, 1,000 of them counted at least")  # fmt: skip
    add("--max-nonfinite", type=int, default=20,
        help="stop when so many steps in a row were skipped: loss or gradients not finite")  # fmt: skip
    add("--save-every", type=int, default=1000, help="steps between checkpoints; the last step always has one")
    add("--sample-every", type=int, default=1000, help="steps between samples.png and losses.png; 0: never")
    add("--val", nargs="+", metavar="DATA", help="held-out data, whose losses are logged as val_loss and so on")
    add("--val-every", type=int, default=1000, help="steps between held-out losses; the last step always has them")
    add("--val-batches", type=int, default=20, help="held-out batches on each GPU, over which the losses are means")
    add("--log-every", type=int, default=10, help="steps between lines of log.jsonl, each with means over these steps")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard, too, into OUT/tensorboard")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the losses; default: on a GPU")
    add("--gradient-checkpointing", action="store_true", help="compute frozen layers twice, which saves memory")


def read_run_options(parser: argparse.ArgumentParser, command: str, **defaults) -> argparse.Namespace:
    """The command line with these options beside the script's own, checked. `defaults`: see `add_run_options`; those
    that the weights have for `command` go before them."""
    add_run_options(parser, **defaults)
    args = parse(parser, command)

    def check(is_right: bool, message: str) -> None:
        if not is_right:
            parser.error(message)

    for name in COUNTS + PERIODS:
        check(getattr(args, name, 1) >= 1, f"--{name.replace('_', '-')} must be at least 1")
    for name in RATES:
        check((getattr(args, name, None) or 0) >= 0, f"--{name.replace('_', '-')} must be at least 0")
    has_tensorboard = not args.tensorboard or find_spec("tensorboard")
    check(has_tensorboard, "--tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'")
    check(0 <= args.max_bad <= 1, "--max-bad must be from 0 to 1")
    check(args.batch_size <= MAX_BATCH, f"--batch-size must be at most {MAX_BATCH:,}")
    check(0 <= args.workers <= MAX_WORKERS, f"--workers must be from 0 to {MAX_WORKERS:,}")
    check(args.epochs > 0 and args.warmup >= 0, "--epochs must be above 0, --warmup at least 0")
    check(args.steps is None or args.steps >= 1, "--steps must be at least 1")
    check(getattr(args, "vokens", 1) <= MAX_VOKENS, f"--vokens must be at most {MAX_VOKENS}")
    return args
