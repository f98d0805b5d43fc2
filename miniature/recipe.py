"""What every part of the miniature's pre-training is to the loop in `pretrain.py`, and how its weights are written.

Parts have the sizes that the config.json files of the shipped weights give.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.cli import MINIATURE
from common.files import read_json, write_json
from minigpt5 import send
from published.loading import save_safetensors


@dataclass
class Setup:
    """Where and with what the parts are trained."""

    runs: Path  # checkpoints and logs, a folder a part; `sets`: the training data
    weights: Path  # finished parts in the published layout: later parts read the earlier ones from there
    device: torch.device
    seed: int = 0
    pictures: int = 1 << 17  # different pictures that the parts see
    workers: int = 1  # processes that make the sets
    tested: int = 256  # held-out pictures of a measurement

    @property
    def sets(self) -> Path:
        return self.runs / "sets"


class Recipe:
    """A part: what is trained, on what, how it is measured and written. Subclasses set all of the following."""

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

    def batch(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The tensors of one step, on the device; all that is random in a step comes from here."""

    def losses(self, model: nn.Module, *batch: Tensor) -> dict[str, Tensor]:
        """{"loss": what is minimised, and what else is logged}."""

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Figures on held-out samples."""

    def export(self, model: nn.Module, weights: Path) -> None:
        """Write the part in the published layout."""


def reset(module: nn.Module, deviation: float = 0.02) -> None:
    """Embeddings and linear layers start small, as in language models."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=deviation)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)


def normal(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Standard normal numbers drawn on the device, as the (CPU) generator's next number decides."""
    seed = int(torch.randint(1 << 62, (), generator=generator))
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors({name: tensor.half() for name, tensor in tensors.items()}, path)


def write_settings(weights: Path, place: str, values: dict) -> None:
    """The JSON file `place` of the weights that ship, with `values` in it."""
    write_json(weights / place, read_json(MINIATURE / place) | values)


def write_part(weights: Path, folder: str, stem: str, module: nn.Module, sizes: dict) -> None:
    """A published folder: config.json and `stem`.safetensors in 16 bit."""
    write_tensors(weights / folder / f"{stem}.safetensors", module.state_dict())
    write_settings(weights, f"{folder}/config.json", sizes)
