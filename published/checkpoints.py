"""Checkpoints of what MiniGPT-5 trains: a safetensors file of `MiniGPT5.trained_parameters`, and what it must say.

    vokens.input, vokens.output     (N + 1, D)   rows of the two tables: the vokens', then the image placeholder's
    fc.*, t2i_decoder_prompt, ...                the mapper, under its published names
    model.layers.i. ... .lora_A     (r, D)       stage 2's LoRA, or
    prefix_encoder.*                             its prefix
    metadata                                     stage, vokens; lora_alpha; "over": the file that this one goes over;
                                                 "system": how its prompts begin

Every number that sizes the model to be built is checked before it is used.
"""

from contextlib import suppress
from pathlib import Path

from published.loading import WeightsError, is_shard, open_safetensors, stored

STORY_FILES, CHAT_FILES = ("mls-story", "mls-vist"), ("mls-mmdialog",)  # files of stage 2
TABLES = {"model.embed_tokens.weight": "embed_scale", "lm_head.weight": "head_scale"}


def checkpoint_folders(out: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted(Path(out).glob("step-" + "[0-9]" * 8), reverse=True)


def find_checkpoint(place: Path) -> Path | None:
    """The file that `place` stands for: itself; trained.safetensors in a checkpoint's folder, or in the newest
    checkpoint of a run's folder; uas.safetensors in weights/minigpt5. None if there is none."""
    if place.is_file():
        return place
    folders = place, *checkpoint_folders(place)
    for file in [*(folder / "trained.safetensors" for folder in folders), place / "uas.safetensors"]:
        if file.is_file():
            return file
    return None


def given_checkpoint(place: Path) -> Path:
    """What the user named. ValueError where there is none."""
    found = find_checkpoint(place)
    if found is None:
        raise ValueError(f"{place}: neither a checkpoint nor the folder of a run that has one")
    return found


def shipped_checkpoint(folder: Path, stage_2: tuple[str, ...]) -> Path | None:
    """Of weights/minigpt5: the first of stage 2's files `stage_2` that is there, else stage 1's."""
    places = [*(folder / f"{name}.safetensors" for name in stage_2), folder]
    return next(filter(None, map(find_checkpoint, places)), None)


def checkpoint_contents(path: Path) -> tuple[dict[str, str], dict]:
    """Metadata and {name: slice} of a checkpoint. WeightsError if it is none."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    tensors = {name: tensor for name, _, _, tensor in stored([path])}
    if "vokens.input" not in tensors:
        raise WeightsError(f"{path}: tensor vokens.input is missing, this is no checkpoint of MiniGPT-5")
    rows_of(tensors, "vokens.input", range(2, 1025), path)
    return metadata, tensors


def base_checkpoint(path: Path) -> Path | None:
    """The checkpoint in the same folder that `path` changes: stage 2's file may hold no more than stage 2 changed."""
    with open_safetensors(path) as file:
        name = (file.metadata() or {}).get("over")
    if name is not None and not is_shard(name):
        raise WeightsError(f"{path}: should go over a .safetensors file of its folder, not over {name!r:.80}")
    return None if name is None else path.with_name(name)


def rows_of(tensors: dict, name: str, sane: range, path: Path) -> int:
    """How many rows a checkpoint's matrix has, a size of the model to be built. WeightsError if that is not `sane`."""
    shape = tensors[name].get_shape() if name in tensors else []
    if len(shape) != 2 or shape[0] not in sane:
        raise WeightsError(f"{path}: {name} has shape {tuple(shape)}, expected {sane.start} to {sane.stop - 1:,} rows")
    return shape[0]


def number_of(metadata: dict[str, str], name: str, default: float, path: Path) -> float:
    """A positive number in a checkpoint's metadata."""
    with suppress(ValueError):
        if 0 < (number := float(metadata.get(name, default))) < 1e6:
            return number
    raise WeightsError(f"{path}: {name} cannot be {metadata[name]!r:.80}")


def checkpoint_adapters(path: Path) -> dict:
    """The options of `MiniGPT5.add_adapters` for the adapters that a checkpoint holds."""
    metadata, tensors = checkpoint_contents(path)
    matrices, adapters = [name for name in tensors if name.endswith(".lora_A.weight")], {}
    if matrices:
        rank = rows_of(tensors, matrices[0], range(1, 1025), path)
        targets = tuple(sorted({name.split(".")[-3] for name in matrices}))
        alpha = number_of(metadata, "lora_alpha", 2 * rank, path)
        adapters["lora"] = {"targets": targets, "rank": rank, "alpha": alpha}
    if "prefix_encoder.embedding.weight" in tensors:
        names = [f"prefix_encoder.{name}.weight" for name in ("embedding", "transform.0")]
        sizes = [rows_of(tensors, name, range(1, 1 << 14), path) for name in names]
        adapters["prefix"] = dict(zip(("tokens", "hidden"), sizes, strict=True))
    return adapters
