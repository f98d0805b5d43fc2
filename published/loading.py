"""Files of tensors: published weights into modules, and checkpoints of what MiniGPT-5 trains.

    unet = load(partial(UNet, config), folder, dtype=torch.bfloat16)        parts.py has all parts of the stack

The module is built without memory, and the memory-mapped tensors become its parameters. A module's attribute paths are
the published names, so this is `load_state_dict(strict, assign)`: a frozen weight whose dtype and layout already fit is
never copied, it stays a view of the file until something moves it to a GPU. Where a published file has other names, a
table of `Names` says which. All errors are `WeightsError`: one line that names the file, the key and the shapes.

A checkpoint is a safetensors file of `MiniGPT5.trained_parameters` and its metadata:

    vokens.input, vokens.output     (N + 1, D)   embedding rows: the vokens', then the image placeholder's
    fc.*, t2i_decoder_prompt, ...                the mapper, under its published names
    model.layers.i. ... .lora_A     (r, D)       stage 2's LoRA, or
    prefix_encoder.*                             its prefix
    model.embed_tokens.weight, lm_head.weight    Vicuna's tables, where a released checkpoint has others than Vicuna
    metadata                                     stage, vokens; lora_alpha; "lora": "words only"; "guidance": "empty
                                                 caption"; of its prompts "system", "separator", "first_token"

Trained tensors that a file does not hold are taken from uas.safetensors in the same folder. Every number that sizes the
model to be built is checked before it is used.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from common.files import atomic_write, read_json
from minigpt5 import MiniGPT5
from prompts import System

FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes that weights may have, as safetensors names them
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")  # without a folder: an index must not lead out of its own
STAGE_1 = "uas.safetensors"
STORY_FILES, CHAT_FILES = ("mls-story", "mls-vist"), ("mls-mmdialog",)  # names of stage 2's files
WORDS_FILES = ("mls-words",)  # LoRA for words first
TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # Vicuna's input and output embedding
MAX_RANK = 1024  # of LoRA's matrices

# (pattern, replacement) of published tensor names, applied one after the other; a name is left out where it is None.
Names = Iterable[tuple[str, str | None]]


class WeightsError(ValueError):
    """Weights that cannot be used. The message is one line: what, where, what to do; `problems` lists all of them."""

    def __init__(self, message: str, problems: Iterable[str] = ()):
        super().__init__(message)
        self.problems = list(problems) or [message]


class Uninitialised(TorchFunctionMode):
    """Modules built inside are not initialised: their parameters keep what the memory held."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_random = function in (torch.Tensor.uniform_, torch.Tensor.normal_)  # some initialisers call these directly
        if is_random or getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def tensor_files(folder: Path, prefixes: Iterable[str] = ("",)) -> list[Path]:
    """The safetensors files of `folder` that hold keys with one of the prefixes, or all files where there is no index.
    Files with a second suffix are variants, which do not count."""
    folder, prefixes = Path(folder), tuple(prefixes)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    if index := min(folder.glob("[!.]*.safetensors.index.json"), default=None):
        weight_map = read_json(index, WeightsError).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, dict) else ()
        if not shards or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in shards):
            raise WeightsError(f"{index}: weight_map should name a .safetensors file of this folder for every tensor")
        return [folder / name for name in sorted({f for key, f in weight_map.items() if key.startswith(prefixes)})]
    files = [f for f in sorted(folder.glob("*.safetensors")) if "." not in f.stem]  # without ._model.safetensors
    if not files:
        raise WeightsError(f"{folder}: no .safetensors file (variants, such as X.fp16.safetensors, do not count)")
    return files


def open_safetensors(path: Path):
    """`safetensors.safe_open` on the CPU (memory-mapped), with errors in one line."""
    try:
        return safetensors.safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error})") from None


def tensor_slices(path: Path) -> dict:
    """Published name -> slice of every tensor in a safetensors file. A slice has get_shape() and get_dtype() without
    reading any tensor data, and slice[:] is the memory-mapped tensor."""
    file = open_safetensors(path)
    return {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, a file is no dictionary


def our_name(key: str, names: Names) -> str | None:
    """The name that a published tensor has here; None where it is left out."""
    for pattern, replacement in names:
        if replacement is not None:
            key = re.sub(pattern, replacement, key)
        elif re.search(pattern, key):
            return None
    return key


def matching_tensors(
    expected: dict[str, torch.Tensor], files: Iterable[Path], names: Names = (), first_wins: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of `files` under the names of `expected`, memory-mapped.

    WeightsError where a tensor is unexpected, there twice, missing or of another shape or dtype: it says the first
    problem and how many more there are. Where `first_wins`, a tensor may be in several files, and the first one's
    counts. The matrix of a linear layer may be stored as a 1x1 convolution.
    """
    tensors, sources, problems = {}, {}, []
    files = list(files)
    for path in files:
        for key, tensor in tensor_slices(path).items():
            name = our_name(key, names)
            if name is None or (first_wins and name in sources):
                continue
            shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
            expected_shape = tuple(expected[name].shape) if name in expected else None
            if expected_shape is None:
                problems.append(f"{path}: unexpected tensor {key}")
            elif name in sources:
                problems.append(f"{path}: {key} is already in {sources[name]}")
            elif shape != expected_shape and not (len(expected_shape) == 2 and shape == (*expected_shape, 1, 1)):
                problems.append(f"{path}: {key} has shape {shape}, expected {expected_shape}")
            elif dtype not in FLOATS:
                problems.append(f"{path}: {key} has dtype {dtype}, expected {', '.join(FLOATS)}")
            else:
                tensors[name] = tensor[...].view(expected_shape)
            sources[name] = path
    where = files[0] if len(files) == 1 else files[0].parent
    missing = [name for name in expected if name not in sources]
    problems += [f"{where}: tensor {name} {tuple(expected[name].shape)} is missing" for name in missing]
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise WeightsError(problems[0] + more, problems)
    return tensors


def load(
    build: Callable[[], nn.Module],
    files: Path | list[Path],
    names: Names = (),
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
) -> nn.Module:
    """What `build` makes, with the tensors of `files`, or of the folder `files`, for parameters, each cast and moved
    once. It is frozen and in eval mode. WeightsError for sizes that no module has, and as `matching_tensors` says.

    `channels_last` stores convolutions, and with them feature maps, as (B, h, w, C), which is faster, but on a GPU only
    with torch.compile: group normalisation would copy them to (B, C, h, w).
    """
    folder = files if isinstance(files, Path) else files[0].parent
    try:
        with torch.device("meta"), Uninitialised():  # to initialise costs a second even there: torch imports a compiler
            model = build()
    except (ArithmeticError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{folder / 'config.json'}: no model has these sizes ({reason})") from None
    files = tensor_files(files) if isinstance(files, Path) else files
    parameters, state = dict(model.named_parameters()), {}  # a tied parameter, which has two names, has one here
    for name, tensor in matching_tensors(parameters, files, names).items():
        layout = torch.channels_last if channels_last and tensor.dim() == 4 else torch.preserve_format
        state[name] = tensor.to(device, dtype, memory_format=layout)
    loaded = {parameters[name]: nn.Parameter(tensor) for name, tensor in state.items()}
    state = {name: loaded[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the file whole or not at all, and onto the disk before this returns."""
    try:
        with atomic_write(path) as temporary:
            tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            safetensors.torch.save_file(tensors, temporary, {"format": "pt", **(metadata or {})})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # safetensors makes its files readable by the owner alone
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not written ({error})") from None


# ---- finding checkpoints


def checkpoint_folders(out: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted((path for path in Path(out).glob("step-" + "[0-9]" * 8) if path.is_dir()), reverse=True)


def find_checkpoint(place: Path) -> Path | None:
    """The file that `place` stands for: itself; trained.safetensors in a checkpoint's folder or a run's newest;
    uas.safetensors in weights/minigpt5. None if there is none."""
    folders = place, *checkpoint_folders(place)
    files = place, *(folder / "trained.safetensors" for folder in folders), place / STAGE_1
    return next(filter(Path.is_file, files), None)


def given_checkpoint(place: Path) -> Path:
    """The checkpoint that the user named. ValueError where there is none."""
    path = find_checkpoint(place)
    if path is None:
        raise ValueError(f"{place}: neither a checkpoint nor the folder of a run that has one")
    return path


def shipped_checkpoint(folder: Path, stage_2: tuple[str, ...]) -> Path | None:
    """The first of stage 2's files `stage_2` in `folder` (weights/minigpt5), else stage 1's; None if there is none."""
    places = [*(folder / f"{name}.safetensors" for name in stage_2), folder]
    return next(filter(None, map(find_checkpoint, places)), None)


# ---- what checkpoints hold


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
        rank = rows_of(tensors, matrices[0], range(1, MAX_RANK + 1), path)
        targets = tuple(sorted({name.split(".")[-3] for name in matrices}))
        alpha = metadata.get("lora_alpha", str(2 * rank))
        if not re.fullmatch(r"\d{1,6}(\.\d+)?", alpha, re.ASCII) or float(alpha) == 0:
            raise WeightsError(f"{path}: lora_alpha cannot be {alpha!r:.80}")
        adapters["lora"] = {"targets": targets, "rank": rank, "alpha": float(alpha)}
    if "prefix_encoder.embedding.weight" in tensors:
        names = {"tokens": "prefix_encoder.embedding.weight", "hidden": "prefix_encoder.transform.0.weight"}
        adapters["prefix"] = {size: rows_of(tensors, name, range(1, 1 << 14), path) for size, name in names.items()}
    return Checkpoint(metadata, tensors, vokens, adapters)


def rows_of(tensors: dict, name: str, allowed: range, path: Path) -> int:
    """How many rows a checkpoint's matrix has, a size of the model to be built. WeightsError if it is not `allowed`."""
    shape = tensors[name].get_shape() if name in tensors else []
    if len(shape) != 2 or shape[0] not in allowed:
        rows = f"{allowed.start} to {allowed.stop - 1:,} rows"
        raise WeightsError(f"{path}: {name} has shape {tuple(shape)}, expected {rows}")
    return shape[0]


# ---- saving and loading checkpoints


def save_trained(model: MiniGPT5, trained: dict[str, nn.Parameter], path: Path, stage: str) -> None:
    """Write a checkpoint of `trained`, the model's `trained_parameters`."""
    metadata = {"format": "minigpt5", "stage": stage, "vokens": str(len(model.tokenizer.voken_ids))}
    if model.lora:
        metadata["lora_alpha"] = str(model.lora[0].scale * model.lora[0].lora_A.out_features)
    if model.lora_for_words:
        metadata["lora"] = "words only"
    if model.guides_against_empty_caption:
        metadata["guidance"] = "empty caption"
    if model.first_token:
        metadata["first_token"] = model.first_token
    save_safetensors(trained | model.tables, path, metadata)


@torch.no_grad()
def load_trained(model: MiniGPT5, path: Path) -> None:
    """Load a checkpoint's tensors into the model, which must have its adapters. A released one may bring tables of its
    own, whose rows weight decay shrank: the released model runs with those. They replace Vicuna's, and `model.tables`
    keeps them for the next checkpoint."""
    checkpoint, trained = open_checkpoint(path), model.trained_parameters()
    files, stage_1, missing = [path], path.with_name(STAGE_1), sorted(trained.keys() - checkpoint.tensors.keys())
    if missing and path != stage_1:  # these tensors are stage 1's
        if not stage_1.is_file():
            raise WeightsError(f"{path}: tensor {missing[0]} is missing, and {stage_1}: no such file")
        files.append(stage_1)
    modules = {name: model.llama.get_submodule(name.removesuffix(".weight")) for name in TABLES}
    stored = {name for file in files for name in tensor_slices(file)}
    tables = {name: modules[name].weight[: model.tokenizer.base_vocabulary] for name in TABLES if name in stored}
    for name, tensor in matching_tensors(trained | tables, files, first_wins=True).items():
        if name in trained:
            trained[name].copy_(tensor)  # in place: an optimiser may hold these
        else:
            old = modules[name].weight
            model.tables[name] = modules[name].weight = nn.Parameter(tensor.to(old), requires_grad=False)
    metadata, special = checkpoint.metadata, model.tokenizer.special
    model.system = System(metadata["system"], metadata.get("separator", "\n")) if "system" in metadata else None
    model.lora_for_words = metadata.get("lora") == "words only"
    model.first_token = metadata.get("first_token")
    if model.first_token:
        if model.first_token not in special:
            raise WeightsError(f"{path}: first_token {model.first_token!r:.80} is no special token of the tokenizer")
        model.tokenizer.bos_id = special[model.first_token]
