"""What the loop of `pretrain.py` asks of every part of the miniature (`Recipe`), and how its weights are written.

Parts have the sizes that the config.json files of the shipped weights give. Their training sets are samples of the
drawn world as arrays on the disk, made once: entry i of a set is a function of its seed and i alone. A set that is on
the disk is used as it is: remove the folder `sets` of a run after changes to the world.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import MINIATURE
from common.files import atomic_write, read_json, write_json
from miniature.facts import Picture
from miniature.paint import draw
from miniature.world import sample_pair
from minigpt5 import send
from published.loading import save_safetensors

CHUNK = 1024  # entries of a set that a process makes at a time


# ---- training sets


def cached(path: Path, length: int, make: Callable[[range], np.ndarray], workers: int) -> Tensor:
    """The tensor (length, ...) whose blocks are make(range), mapped from `path`, which is written if it is missing.

    With more than one worker `make` is called in other processes, so it must be picklable.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {length:,} entries of {path}", flush=True)
        pieces = [range(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]
        with atomic_write(path) as temporary:
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


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 (B, h, w, 3) -> float32 (B, 3, h, w) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn(sample: Callable[[int], tuple], i: int) -> np.ndarray:
    """uint8 (64, 64, 3): sample i, whose first value is the picture and the last its jitter."""
    picture, *_, jitter = sample(i)
    return np.asarray(draw(picture, jitter))


# ---- what the loop in `pretrain.py` calls


@dataclass
class Setup:
    """Where and with what the parts are trained."""

    runs: Path  # checkpoints and logs, one folder per part; `sets`: the training data
    weights: Path  # finished parts in the published layout: later parts read the earlier ones from there
    device: torch.device
    seed: int = 0
    pictures: int = 1 << 17  # different pictures that the parts see
    workers: int = 1  # processes that make the sets
    tested: int = 256  # held-out pictures of a measurement

    @property
    def sets(self) -> Path:
        return self.runs / "sets"

    def training_set(self, name: str, make_entry: Callable[[int], np.ndarray], length: int | None = None) -> Tensor:
        """make_entry(i) of all training pictures, or of `length`, as a tensor on the device."""
        length = length or self.pictures
        path = self.sets / f"{name}-{self.seed}-{length}.npy"
        return cached(path, length, partial(block, make_entry), self.workers).to(self.device)

    def training_pictures(self) -> Tensor:
        """Training pictures 0 .. pictures - 1 of `world.sample_pair`: uint8 (n, 64, 64, 3)."""
        return self.training_set("pictures-train", partial(drawn, partial(sample_pair, self.seed)))

    def held_out_pictures(self) -> tuple[Tensor, list[Picture]]:
        """The held-out pictures of a measurement: uint8 (tested, 64, 64, 3), and their facts."""
        sample = partial(sample_pair, self.seed, split="held-out")
        pictures = np.stack([drawn(sample, i) for i in range(self.tested)])
        return torch.from_numpy(pictures).to(self.device), [sample(i)[0] for i in range(self.tested)]


class Recipe:
    """A part: what is trained, on what, how it is measured and written. Subclasses set all that follows, and have

    batch(generator)          the tensors of one step, on the device; all that is random in a step comes from here
    losses(model, *batch)     {"loss": what is minimised, and what else is logged}
    measure(model)            figures on held-out samples
    export(model, weights)    writes the part into a folder in the published layout
    """

    name: str
    model: nn.Module  # all that trains
    batch_sizes: tuple[int, int]  # on a GPU, on a CPU
    budgets: tuple[int, int]  # minutes of training, on a GPU and on a CPU
    lr: float  # AdamW's, for norms, biases, embeddings and first and last layers
    matrix_lr: float  # Muon's, for all other matrices
    hold: int  # steps at the full rates, which then fall as 1 / sqrt(step)

    def __init__(self, setup: Setup):
        self.device, self.seed = setup.device, setup.seed
        on_cpu = setup.device.type == "cpu"
        self.batch_size, self.minutes = self.batch_sizes[on_cpu], self.budgets[on_cpu]

    def pick(self, length: int, generator: torch.Generator) -> Tensor:
        """A batch of places in a set of that length, on the device."""
        return send(torch.randint(length, (self.batch_size,), generator=generator), self.device)

    def normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal numbers drawn on the device, as the (CPU) generator's next number decides."""
        seed = int(torch.randint(1 << 62, (), generator=generator))
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device)


# ---- weights


def reset(module: nn.Module, deviation: float = 0.02) -> None:
    """Embeddings and linear layers start small, as in language models."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=deviation)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors({name: tensor.half() for name, tensor in tensors.items()}, path)


def write_settings(weights: Path, place: str, values: dict) -> None:
    """Write the shipped JSON file `place` into `weights`; `values` replace those of its entries that they name."""
    write_json(weights / place, {name: values.get(name, old) for name, old in read_json(MINIATURE / place).items()})


def write_part(weights: Path, folder: str, stem: str, module: nn.Module, sizes: dict) -> None:
    """A published folder: config.json and `stem`.safetensors in 16 bit."""
    write_tensors(weights / folder / f"{stem}.safetensors", module.state_dict())
    write_settings(weights, f"{folder}/config.json", sizes)
