"""Checkpoints of a run.

    step-00000500/
        trained.safetensors    all trained tensors (voken rows, mapper, adapter), which sample.py --checkpoint reads
        optimizer.safetensors  the optimisers' moments under the same names
        state.json             step, position in the data, sums of the next line of the log, the command's arguments

They are written and removed under another name, so that there is no half one.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from common.files import is_number, read_json, remove
from published.loading import WeightsError, checkpoint_folders, open_safetensors, save_safetensors
from trainer.muon import Muon

KEPT = 2  # newest checkpoints of a run; older ones are removed


def save_checkpoint(
    out: Path,
    state: dict,
    trained: dict[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    save_trained: Callable[[Path], None],
) -> Path:
    """Write the folder of state["step"], which is on the disk when this returns, and remove all but the newest ones.
    `save_trained` writes trained.safetensors.

    ValueError where that fails, and where a tensor is not finite; the earlier checkpoints then stay as they are.
    """
    folder = out / f"step-{state['step']:08d}"
    temporary = out / f".{folder.name}.{os.getpid()}.tmp"
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
        save_trained(temporary / "trained.safetensors")
        save_safetensors(moments, temporary / "optimizer.safetensors")
        with open(temporary / "state.json", "w", encoding="utf-8") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(temporary)
        remove_checkpoint(folder)  # a damaged one of this step, which --resume passed over
        temporary.replace(folder)
        sync_folder(out)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        kept = ", ".join(old.name for old in checkpoint_folders(out)) or "none"
        raise ValueError(f"{folder}: not written: {reason}; checkpoints of this run: {kept}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoint_folders(out)[KEPT:]:
        remove_checkpoint(old)
    return folder


def remove_checkpoint(folder: Path) -> None:
    """Remove it, if it is there, under another name: a process that is killed meanwhile leaves no half checkpoint."""
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}.tmp")
    with suppress(OSError):
        folder.replace(old)
        remove(old)


def set_aside(out: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which were passed over, so that they stay and do not count."""
    for folder in checkpoint_folders(out):
        if folder.name > f"step-{step:08d}":
            remove(folder.with_suffix(".damaged"))
            folder.replace(folder.with_suffix(".damaged"))


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder, too."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def load_checkpoint(
    out: Path,
    trained: dict[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    load_trained: Callable[[Path], None],
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
        for optimizer, parameter, own in moments:
            optimizer.state[parameter] = own
        return state
    if folders:
        raise ValueError(f"{out}: none of its {len(folders)} checkpoints fits this run")
    return None


def read_state(folder: Path) -> dict:
    """state.json. WeightsError where anything in it is not of the type that a run writes."""
    path = folder / "state.json"
    state = read_json(path, WeightsError)
    data = state.get("data") if isinstance(state.get("data"), dict) else {}
    counts = [state.get("step"), state.get("nonfinite", 0)]
    counts += [data.get(name) for name in ("seed", "size", "epoch", "position", "seen")]
    sums = [data.get("bad"), data.get("sums", {}), data.get("passes", {})]
    is_right = (
        all(type(count) is int and count >= 0 and is_number(count) for count in counts)
        and counts[0] == int(folder.name.removeprefix("step-"))
        and all(isinstance(by_name, dict) and all(map(is_number, by_name.values())) for by_name in sums)
        and isinstance(data.get("digest"), str)
        and isinstance(state.get("arguments", {}), dict)
    )
    if not is_right:
        raise WeightsError(f"{path}: not the state of a run after the step that its folder names")
    return state


def read_moments(
    path: Path, trained: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> list[tuple[torch.optim.Optimizer, nn.Parameter, dict[str, torch.Tensor]]]:
    """The moments of every parameter that an optimiser steps. WeightsError where one is missing or has another shape or
    dtype, for which a fused optimiser would read and write beyond its end. ValueError for those of another optimiser.
    """
    names, moments = {parameter: name for name, parameter in trained.items()}, []
    stepped = [(optimizer, p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    with open_safetensors(path) as file:
        stored = set(file.keys())
        for optimizer, parameter in stepped:
            name, is_muon, own = names[parameter], isinstance(optimizer, Muon), {}
            if f"{'exp_avg' if is_muon else 'average'}.{name}" in stored:
                raise ValueError(f"{path}: {name} had another optimiser; go on with the same --muon")
            shape = tuple(parameter.shape)
            wanted = {"average": shape} if is_muon else {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
            for kind, shape in wanted.items():
                key = f"{kind}.{name}"
                tensor = file.get_slice(key) if key in stored else None
                found = "missing" if tensor is None else f"{tensor.get_dtype()} {tuple(tensor.get_shape())}"
                if found != f"F32 {shape}":
                    raise WeightsError(f"{path}: {key} is {found}, expected F32 {shape}")
                own[kind] = file.get_tensor(key).to(parameter.device)
                if not own[kind].isfinite().all():
                    raise WeightsError(f"{path}: {key} is not finite")
            moments.append((optimizer, parameter, own))
    return moments
