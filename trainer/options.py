"""The options that all training scripts have."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from common.cli import FROM_0, FROM_1, number, parse

RATE = number(0.0)  # a learning rate
SHARE = number(0.0, 1.0)
BATCH_SIZE, WORKERS = number(1, 65_536), number(0, 1_024)
VOKENS = number(1, 128)  # of a picture: in stage 1 they stand behind a caption in a sequence of 256 tokens


def read_run_options(
    parser: argparse.ArgumentParser, command: str, out: str, epochs: float, batch_size: int, refused: tuple = ()
) -> argparse.Namespace:
    """The command line with these options beside the script's own, checked. What the weights have for `command`
    overrides the defaults here. refused: names of options that are not for this script; they are off."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help="folder of the run")
    add("--resume", action="store_true", help="continue from the newest intact checkpoint in --out, if there is one")
    add("--drawn", type=FROM_1, default=20_000, help="without --data: samples of the miniature's world to draw")
    add("--epochs", type=float, default=epochs, help="passes over the data")
    add("--steps", type=FROM_1, help="optimiser steps in all; overrides --epochs")
    add("--batch-size", type=BATCH_SIZE, default=batch_size, help="samples of one forward pass, on each GPU")
    add("--accumulate", type=FROM_1, default=1, help="forward passes of one optimiser step")
    add("--warmup", type=FROM_0, default=1000, help="steps of linear warm-up of the learning rates")
    add("--no-cfg", action="store_true", help="never replace voken features by zeros (an ablation of the paper)")
    add("--no-ldm", action="store_true", help="train without L_LDM (an ablation of the paper)")
    add("--min-snr-gamma", type=float, default=5.0,
        help="weight L_LDM by min(SNR, gamma) / SNR, as released; 0: no weights, as in the paper")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of all random numbers of the run")
    add("--workers", type=WORKERS, default=4, help="processes that read pictures; 0: none")
    add("--max-bad", type=SHARE, default=0.01,
        help="stop when broken samples exceed this share of those seen, or of 1,000 if fewer are seen")  # fmt: skip
    add("--max-nonfinite", type=FROM_1, default=20, help="stop after so many non-finite losses or gradients in a row")
    add("--save-every", type=FROM_1, default=1000, help="steps between checkpoints; the last step always has one")
    add("--sample-every", type=int, default=1000, help="steps between samples.png and losses.png; 0: never")
    add("--val", nargs="+", metavar="DATA", help="held-out data, whose losses are logged as val_loss and so on")
    add("--val-every", type=FROM_1, default=1000, help="steps between held-out losses; the last step always has them")
    add("--val-batches", type=FROM_1, default=20, help="held-out batches on each GPU, over which the losses are means")
    add("--log-every", type=FROM_1, default=10, help="steps between lines of log.jsonl, with means over these steps")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard, too, into OUT/tensorboard")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the losses; default: on a GPU")
    add("--gradient-checkpointing", action="store_true", help="compute frozen layers twice, which saves memory")
    args = parse(parser, command)
    for name in refused:
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} is not for this baseline")
        setattr(args, name, False)
    if args.epochs <= 0:
        parser.error("--epochs must be above 0")
    if args.tensorboard and not find_spec("tensorboard"):
        parser.error("--tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'")
    return args
