"""Checkpoints of a run.

    step-00000500/
        trained.safetensors    all trained tensors (voken rows, mapper, adapter), which sample.py --checkpoint reads
        optimizer.safetensors  the optimisers' state under the same names
        state.json             step, position in the data, sums of the next line of the log, the command's arguments

They are written and removed under another name, so that none is ever half there.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from common.files import atomic_write, read_json, remove
from published.loading import WeightsError, checkpoint_folders, matching_tensors, save_safetensors
from trainer.muon import Muon

Parameters, Optimizers = dict[str, nn.Parameter], list[torch.optim.Optimizer]
MAX_CHECKPOINTS = 2  # newest checkpoints of a run; older ones are removed


def save_checkpoint(
    out: Path, state: dict, trained: Parameters, optimizers: Optimizers, save_trained: Callable[[Path], None]
) -> Path:
    """Write the folder of state["step"], and remove all but the newest ones: one that a power cut spoils has another
    before it. `save_trained` writes trained.safetensors.

    ValueError or OSError where that fails, or a tensor is not finite; the earlier checkpoints then stay as they are.
    """
    folder, moments = out / f"step-{state['step']:08d}", {}
    for name, parameter in trained.items():
        for optimizer in optimizers:
            moments |= {f"{kind}.{name}": tensor for kind, tensor in optimizer.state.get(parameter, {}).items()}
    for name, tensor in (trained | moments).items():
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: not written: {name} is not finite, training has diverged")
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        save_trained(temporary / "trained.safetensors")
        save_safetensors(moments, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for old in checkpoint_folders(out)[MAX_CHECKPOINTS:]:  # renamed first, so that a kill leaves no half checkpoint
        remove(old.replace(old.with_name(f".{old.name}.old.{os.getpid()}.tmp")))
    return folder


def set_aside(out: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which were passed over, so that they stay and do not count."""
    for folder in checkpoint_folders(out):
        if folder.name > f"step-{step:08d}":
            remove(folder.with_suffix(".damaged"))
            folder.replace(folder.with_suffix(".damaged"))


def load_checkpoint(
    out: Path, trained: Parameters, optimizers: Optimizers, load_trained: Callable[[Path], None]
) -> dict | None:
    """Fill the trained tensors and the moments from the newest checkpoint of a run that is intact. Its state, or None
    where the run has no checkpoint. `load_trained` reads trained.safetensors in place.

    A checkpoint that cannot be read is named and passed over. ValueError where that leaves none.
    """
    folders = checkpoint_folders(out)
    for folder in folders:
        try:
            state = read_state(folder)
            moments = read_moments(folder / "optimizer.safetensors", trained, optimizers)
            load_trained(folder / "trained.safetensors")
        except WeightsError as error:
            print(f"passed over: {error}")
            continue
        for optimizer, parameter, kind, tensor in moments:
            optimizer.state[parameter][kind] = tensor.to(parameter.device, copy=True)
        return state
    if folders:
        raise ValueError(f"{out}: none of its {len(folders)} checkpoints fits this run")
    return None


def read_state(folder: Path) -> dict:
    """state.json. WeightsError where anything in it is not of the type that a run writes."""
    path = folder / "state.json"
    state = read_json(path, WeightsError)
    try:
        data = state["data"]
        counts = [state["step"], state.get("nonfinite", 0)]
        counts += [data[name] for name in ("seed", "size", "epoch", "position", "seen")]
        limits = {int: 1 << 63, float: math.inf}  # of what a tensor can hold
        sums = [data["bad"], data.get("sums", {}), data.get("passes", {})]
        if not (
            all(type(count) is int and 0 <= count < limits[int] for count in counts)
            and all(abs(value) < limits[type(value)] for by_name in sums for value in by_name.values())
            and state["step"] == int(folder.name.removeprefix("step-"))
            and isinstance(state.get("arguments", {}), dict)
        ):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise WeightsError(f"{path}: not the state of a run after the step that its folder names") from None
    return state


def read_moments(path: Path, trained: Parameters, optimizers: Optimizers) -> list[tuple]:
    """(optimiser, parameter, kind, tensor) of every moment. WeightsError where one is missing, of no use or of another
    shape or dtype, for which a fused optimiser would read and write beyond its end."""
    names, places, expected = {parameter: name for name, parameter in trained.items()}, {}, {}
    stepped = [(optimizer, p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for optimizer, p in stepped:
        is_muon = isinstance(optimizer, Muon)
        templates = {"average": p} if is_muon else {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
        expected |= {f"{kind}.{names[p]}": tensor for kind, tensor in templates.items()}
        places |= {f"{kind}.{names[p]}": (optimizer, p, kind) for kind in templates}
    moments = matching_tensors(expected, [path])
    for name, tensor in moments.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise WeightsError(f"{path}: {name} is not float32, or not finite")
    return [(*places[name], tensor) for name, tensor in moments.items()]
