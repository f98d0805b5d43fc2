"""The training sets of the miniature: samples of the drawn world as arrays on the disk, made once.

Entry i of a set is a function of its seed and i alone. A set that is already on the disk is used as it is: remove the
folder `sets` of a run after changes to the world.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.files import written_whole
from miniature.facts import Picture
from miniature.paint import draw
from miniature.recipe import Setup
from miniature.world import sample_pair

CHUNK = 1024  # entries that a process makes at a time


def cached(path: Path, length: int, make: Callable[[range], np.ndarray], workers: int) -> Tensor:
    """The tensor (length, ...) whose blocks are make(range), mapped from `path`, which is written if it is missing.

    With more than one worker `make` is called in other processes, so it must be picklable.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {length:,} entries of {path}", flush=True)
        pieces = [range(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]
        with written_whole(path) as temporary:
            first = make(range(1))
            array = np.lib.format.open_memmap(temporary, "w+", first.dtype, (length, *first.shape[1:]))
            with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # starts no process before it has work
                made = (pool.map if min(workers, len(pieces)) > 1 else map)(make, pieces)
                for piece, values in zip(pieces, made, strict=True):
                    array[piece.start : piece.stop] = values
            array.flush()
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c"))  # "c": torch may write to it, the file stays as it is
    except (ValueError, EOFError):
        raise ValueError(f"{path}: damaged; remove it to make it again") from None


def block(make_entry: Callable[[int], np.ndarray], entries: range) -> np.ndarray:
    return np.stack([make_entry(i) for i in entries])


def training_set(setup: Setup, name: str, make_entry: Callable[[int], np.ndarray], length: int | None = None) -> Tensor:
    """make_entry(i) of all training pictures, or of `length`, as a tensor on the device."""
    length = length or setup.pictures
    path = setup.sets / f"{name}-{setup.seed}-{length}.npy"
    return cached(path, length, partial(block, make_entry), setup.workers).to(setup.device)


def drawn_pair(seed: int, split: str, i: int) -> np.ndarray:
    picture, _, jitter = sample_pair(seed, i, split)
    return np.asarray(draw(picture, jitter))


def training_pictures(setup: Setup) -> Tensor:
    """Training pictures 0 .. setup.pictures - 1 of `world.sample_pair`: uint8 (n, 64, 64, 3)."""
    return training_set(setup, "pictures-train", partial(drawn_pair, setup.seed, "train"))


def held_out_pictures(setup: Setup) -> tuple[Tensor, list[Picture]]:
    """The held-out pictures of a measurement: uint8 (setup.tested, 64, 64, 3), and their facts."""
    drawn = np.stack([drawn_pair(setup.seed, "held-out", i) for i in range(setup.tested)])
    facts = [sample_pair(setup.seed, i, "held-out")[0] for i in range(setup.tested)]
    return torch.from_numpy(drawn).to(setup.device), facts


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 (B, h, w, 3) -> float32 (B, 3, h, w) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
