"""Checkpoints of what MiniGPT-5 trains: a safetensors file of `MiniGPT5.trained_parameters` and its metadata.

    vokens.input, vokens.output     (N + 1, D)   embedding rows: the vokens', then the image placeholder's
    fc.*, t2i_decoder_prompt, ...                the mapper, under its published names
    model.layers.i. ... .lora_A     (r, D)       stage 2's LoRA, or
    prefix_encoder.*                             its prefix
    model.embed_tokens.weight, lm_head.weight    Vicuna's tables, where a released checkpoint has others than Vicuna
    metadata                                     stage, vokens; lora_alpha; "system": how its prompts begin

A file that does not hold all of what the model trains is laid over uas.safetensors in the same folder: what it does not
hold is taken from there. Every number that sizes the model to be built is checked before it is used.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minigpt5 import MiniGPT5
from published.loading import FLOATS, WeightsError, matched, open_safetensors, save_safetensors, tensor_slices

STAGE_1 = "uas.safetensors"
STORY_FILES, CHAT_FILES = ("mls-story", "mls-vist"), ("mls-mmdialog",)  # names of stage 2's files
TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # Vicuna's input and output embedding
NO_TABLES = tuple((f"^{re.escape(name)}$", None) for name in TABLES)


# ---- finding them


def checkpoint_folders(out: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted(Path(out).glob("step-" + "[0-9]" * 8), reverse=True)


def find_checkpoint(place: Path) -> Path | None:
    """The file that `place` stands for: itself; trained.safetensors in a checkpoint's folder, or in the newest
    checkpoint of a run's folder; uas.safetensors in weights/minigpt5. None if there is none."""
    if place.is_file():
        return place
    folders = place, *checkpoint_folders(place)
    for file in [*(folder / "trained.safetensors" for folder in folders), place / STAGE_1]:
        if file.is_file():
            return file
    return None


def given_checkpoint(place: Path) -> Path:
    """The checkpoint that the user named. ValueError where there is none."""
    found = find_checkpoint(place)
    if found is None:
        raise ValueError(f"{place}: neither a checkpoint nor the folder of a run that has one")
    return found


def shipped_checkpoint(folder: Path, stage_2: tuple[str, ...]) -> Path | None:
    """The first of stage 2's files `stage_2` in `folder` (weights/minigpt5), else stage 1's; None if there is none."""
    places = [*(folder / f"{name}.safetensors" for name in stage_2), folder]
    return next(filter(None, map(find_checkpoint, places)), None)


# ---- what they hold


class Checkpoint(NamedTuple):
    metadata: dict[str, str]
    tensors: dict  # name -> slice, see `tensor_slices`
    vokens: int
    adapters: dict  # the options of `MiniGPT5.add_adapters` for the adapters that it holds


def open_checkpoint(path: Path) -> Checkpoint:
    """The contents of a checkpoint, of which only the header is read. WeightsError if it is none."""
    metadata, tensors = open_safetensors(path).metadata() or {}, tensor_slices(path)
    if "vokens.input" not in tensors:
        raise WeightsError(f"{path}: tensor vokens.input is missing, this is no checkpoint of MiniGPT-5")
    vokens = rows_of(tensors, "vokens.input", range(2, 1025), path) - 1
    matrices, adapters = [name for name in tensors if name.endswith(".lora_A.weight")], {}
    if matrices:
        rank = rows_of(tensors, matrices[0], range(1, 1025), path)
        targets = tuple(sorted({name.split(".")[-3] for name in matrices}))
        try:
            alpha = float(metadata.get("lora_alpha", 2 * rank))
        except ValueError:
            alpha = 0.0
        if not 0 < alpha < 1e6:
            raise WeightsError(f"{path}: lora_alpha cannot be {metadata['lora_alpha']!r:.80}")
        adapters["lora"] = {"targets": targets, "rank": rank, "alpha": alpha}
    if "prefix_encoder.embedding.weight" in tensors:
        names = {"tokens": "prefix_encoder.embedding.weight", "hidden": "prefix_encoder.transform.0.weight"}
        adapters["prefix"] = {size: rows_of(tensors, name, range(1, 1 << 14), path) for size, name in names.items()}
    return Checkpoint(metadata, tensors, vokens, adapters)


def rows_of(tensors: dict, name: str, allowed: range, path: Path) -> int:
    """How many rows a checkpoint's matrix has, a size of the model to be built. WeightsError if it is not `allowed`."""
    shape = tensors[name].get_shape() if name in tensors else []
    if len(shape) != 2 or shape[0] not in allowed:
        expected = f"{allowed.start} to {allowed.stop - 1:,} rows"
        raise WeightsError(f"{path}: {name} has shape {tuple(shape)}, expected {expected}")
    return shape[0]


def with_file_below(path: Path, tensors: Collection[str], wanted: Collection[str]) -> list[Path]:
    """The files that hold a checkpoint: `path`, and stage 1's, over which it is laid where `wanted` has more names than
    its `tensors`. WeightsError if that file is not there."""
    below, missing = path.with_name(STAGE_1), sorted(set(wanted) - set(tensors))
    if not missing or path.name == STAGE_1:
        return [path]
    if not below.is_file():
        raise WeightsError(f"{path}: tensor {missing[0]} is missing, and {below}: no such file")
    return [path, below]


# ---- saving and loading


def save_trained(model: MiniGPT5, path: Path, stage: str) -> None:
    metadata = {"format": "minigpt5", "stage": stage, "vokens": str(len(model.tokenizer.voken_ids))}
    if model.lora:
        metadata["lora_alpha"] = str(model.lora[0].scale * model.lora[0].lora_A.out_features)
    save_safetensors(model.trained_parameters() | model.tables, path, metadata)


@torch.no_grad()
def load_trained(model: MiniGPT5, path: Path) -> None:
    """Take a checkpoint's tensors; the model must have the adapters that it has.

    A released checkpoint may bring tables of its own: weight decay shrank the rows that are Vicuna's, and the released
    model runs with the shrunk ones. They replace Vicuna's, and `model.tables` keeps them for the next checkpoint.
    """
    checkpoint, trained = open_checkpoint(path), model.trained_parameters()
    files = with_file_below(path, checkpoint.tensors, trained)
    for name, tensor in matched(trained, files, NO_TABLES, first_wins=True).items():
        trained[name].copy_(tensor)  # in place: an optimiser may hold these
    for file in reversed(files):
        for key, tensor in open_checkpoint(file).tensors.items():
            if key in TABLES:
                model.tables[key] = load_table(model, file, key, tensor)
    model.system = checkpoint.metadata.get("system")


def load_table(model: MiniGPT5, path: Path, key: str, stored) -> nn.Parameter:
    """Replace one of Vicuna's tables by the `stored` one of a checkpoint; returns the new one."""
    module, pieces = model.llama.get_submodule(key.removesuffix(".weight")), model.tokenizer.base_vocabulary
    shape, dtype, width = stored.get_shape(), stored.get_dtype(), module.weight.shape[1]
    if len(shape) != 2 or shape[0] < pieces or shape[1] != width or dtype not in FLOATS:
        raise WeightsError(f"{path}: {key} {tuple(shape)} {dtype} is no table of {pieces} rows of width {width}")
    module.weight = nn.Parameter(stored[:].to(module.weight.device, module.weight.dtype), requires_grad=False)
    return module.weight
