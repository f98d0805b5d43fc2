"""What several test files share: comparing tensors, randomising a reference model, finding third-party samples."""

from pathlib import Path

import pytest
import torch

SAMPLES = Path(__file__).resolve().parents[2] / "shared"  # third-party pictures and vocabularies, not in the product
DATA = {"seed": 0, "size": 1, "digest": "", "epoch": 0, "position": 0, "seen": 0, "bad": {}}  # of a run's state.json


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference relative to the largest absolute value of the reference."""
    assert ours.shape == reference.shape, f"shape {tuple(ours.shape)}, reference {tuple(reference.shape)}"
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max().clamp(min=1e-30)).item()


def assert_close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float, name: str = "") -> None:
    figure = difference(ours.detach().cpu(), reference.detach().cpu())
    print(f"{name}: largest relative difference {figure:.1e}")
    assert figure <= tolerance, f"{name}: {figure:.2e} is over {tolerance:.0e}"


def randomise(module: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """Every parameter random and non-trivial: weights of norms around 1, all else around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight") and parameter.dim() == 1
            parameter.copy_(1 + scale * noise if is_norm else scale * noise)
    return module.eval()


def sample_file(*parts: str) -> Path:
    """A file of the third-party samples; the test is skipped where they are missing."""
    path = SAMPLES.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"third-party sample {'/'.join(parts)} is not here")
    return path


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
