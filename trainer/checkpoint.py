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

from common.files import read_json
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
    shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(out: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for path in sorted(out.glob(".*.tmp")):
        print(f"removed: {path}, which an earlier process could not finish")
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
            moments = read_moments(folder / "optimizer.safetensors", trained)
            load_trained(folder / "trained.safetensors")
        except WeightsError as error:
            print(f"passed over: {error}")
            continue
        names = {parameter: name for name, parameter in trained.items()}
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                own = moments.get(names[parameter], {})
                if own and ("average" in own) != isinstance(optimizer, Muon):
                    raise ValueError(f"{folder}: {names[parameter]} had another optimiser; go on with the same --muon")
                if own:
                    optimizer.state[parameter] = {kind: t.to(parameter.device) for kind, t in own.items()}
        return state
    if folders:
        raise ValueError(f"{out}: none of its {len(folders)} checkpoints fits this run")
    return None


def read_state(folder: Path) -> dict:
    path = folder / "state.json"
    state = read_json(path, WeightsError)
    if "data" not in state or state.get("step") != int(folder.name.removeprefix("step-")):
        raise WeightsError(f"{path}: the step is not the folder's, or there is no position in the data")
    return state


def read_moments(path: Path, trained: dict[str, nn.Parameter]) -> dict[str, dict[str, torch.Tensor]]:
    """{name of a trained tensor: {kind of moment: tensor}}."""
    moments = {}
    with open_safetensors(path) as file:
        for key in file.keys():  # noqa: SIM118, a file is no dictionary
            tensor, (kind, _, name) = file.get_tensor(key), key.partition(".")
            shape = trained[name].shape if name in trained else None
            if not tensor.is_floating_point() or tensor.shape not in ((), shape):
                raise WeightsError(f"{path}: {key} fits no trained tensor ({tensor.dtype} {tuple(tensor.shape)})")
            moments.setdefault(name, {})[kind] = tensor
    return moments
