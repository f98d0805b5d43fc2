"""The training sets of the miniature: samples of the drawn world as arrays on the disk, made once.

Row i of a set is a function of its seed and i alone. A set that is already on the disk is used as it is: remove the
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
from miniature.paint import draw
from miniature.world import sample_pair

CHUNK = 1024  # rows that a process makes at a time


def block(make_row: Callable[[int], np.ndarray], rows: range) -> np.ndarray:
    return np.stack([make_row(i) for i in rows])


def rows_of(make_row: Callable[[int], np.ndarray]) -> Callable[[range], np.ndarray]:
    """What makes one row -> what makes a block of them."""
    return partial(block, make_row)


def cached(path: Path, rows: int, make: Callable[[range], np.ndarray], workers: int) -> Tensor:
    """The tensor (rows, ...) whose blocks are make(range), mapped from `path`, which is written whole if it is missing.

    With more than one worker `make` is called in other processes, so it must be picklable.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {rows:,} rows of {path}", flush=True)
        pieces = [range(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)]
        with written_whole(path) as temporary:
            first = make(range(1))
            array = np.lib.format.open_memmap(temporary, "w+", first.dtype, (rows, *first.shape[1:]))
            if workers > 1 and len(pieces) > 1:
                with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
                    for piece, values in zip(pieces, pool.map(make, pieces), strict=True):
                        array[piece.start : piece.stop] = values
            else:
                for piece in pieces:
                    array[piece.start : piece.stop] = make(piece)
            array.flush()
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c"))  # "c": torch may write to it, the file stays as it is
    except (ValueError, EOFError):
        raise ValueError(f"{path}: damaged; remove it to make it again") from None


def picture_row(seed: int, split: str, i: int) -> np.ndarray:
    picture, _, jitter = sample_pair(seed, i, split)
    return np.asarray(draw(picture, jitter))


def pictures(folder: Path, rows: int, seed: int, workers: int, split: str = "train") -> Tensor:
    """Pictures 0 .. rows - 1 of `world.sample_pair`: uint8 (rows, 64, 64, 3)."""
    make = rows_of(partial(picture_row, seed, split))
    return cached(folder / f"pictures-{split}-{seed}-{rows}.npy", rows, make, workers)


def to_pixels(rows: Tensor) -> Tensor:
    """uint8 (B, h, w, 3) -> float32 (B, 3, h, w) in [-1, 1]."""
    return rows.permute(0, 3, 1, 2).float() / 127.5 - 1
