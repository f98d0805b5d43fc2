"""Published weights into modules: sizes from config.json, tensors from safetensors, nothing guessed.

Every part of the stack loads in the same way:

    config = read_config(UNetConfig, folder / "config.json")
    with shapes_only(folder / "config.json"):
        unet = UNet(config)                                # no memory
    fill(unet, tensor_files(folder), dtype=torch.bfloat16)  # memory-mapped tensors become the parameters

A module's attribute paths are the published names, so filling is `load_state_dict(strict, assign)`: a frozen weight
whose type and layout already fit is never copied, it stays a view of the file until something moves it to a GPU.
All errors are `WeightsError` with a one-line message that names the file, the key and the shapes.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from common.files import written_whole


class Uninitialised(TorchFunctionMode):
    """Modules built inside keep what memory held: no initialiser of torch.nn.init runs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        drawn = function in (torch.Tensor.uniform_, torch.Tensor.normal_)  # by initialisers that no mode can see
        if drawn or getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def shapes_only(config: Path | str = "config") -> Iterator[None]:
    """Modules built inside have shapes but no memory, and no random values either: on the meta device those would
    still cost a second, since torch imports its compiler for them. `config` names the file in a WeightsError about
    sizes that no module can have."""
    try:
        with torch.device("meta"), Uninitialised():
            yield
    except WeightsError:
        raise
    except (ArithmeticError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{config}: no model has these sizes ({str(error).splitlines()[0]})") from None


class WeightsError(ValueError):
    """Weights that cannot be used. The message is one line: what, where, what to do; `problems` lists all of them."""

    def __init__(self, message: str, problems: Iterable[str] = ()):
        super().__init__(message)
        self.problems = list(problems) or [message]


def read_json(path: Path) -> dict:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON and bad UTF-8 alike
        raise WeightsError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


# The largest values that a config.json may ask for. LIMITS: for numbers of layers, so that building them ends, and for
# what no tensor's shape would contradict. Else MOST for whole numbers, a million for others, 16 entries for lists.
MOST = 1 << 24
LIMITS = {"num_hidden_layers": 256, "layers_per_block": 16, "sample_size": 1024, "freq_shift": 1, "steps_offset": 1}
LIMITS |= {"rms_norm_eps": 0.01, "layer_norm_eps": 0.01, "norm_eps": 0.01, "beta_start": 0.5, "beta_end": 0.5}


def is_sane(name: str, value: object, default: object) -> bool:
    """Whether `value` can stand in the place of `default`: its type, and a size that a model may have."""
    if isinstance(default, tuple):
        entries = value if isinstance(value, tuple) else ()
        return 1 <= len(entries) <= 16 and all(is_sane(name, entry, default[0]) for entry in entries)
    if type(value) is not type(default):
        return False
    if type(value) is int:
        least = 0 if default < 2 else 1  # an offset may be none, a size not
        return least <= value <= LIMITS.get(name, MOST)
    return type(value) is not float or 1e-13 < value <= LIMITS.get(name, 1e6)


def read_config(cls, path: Path, *nested: str):
    """Fill the dataclass `cls` from a published config.json, or from the object `nested` inside it.

    Keys that `cls` does not name are ignored. A missing or null key takes the field's default, which is the
    published model's value: published files leave defaults out. WeightsError for other types and absurd sizes.
    """
    values = read_json(path)
    for key in nested:
        values = values.get(key) or {}
        if not isinstance(values, dict):
            raise WeightsError(f"{path}: {key} should be an object, found {values!r:.80}")
    known = {}
    for field in dataclasses.fields(cls):
        value = values.get(field.name)
        if value is None:
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        value = tuple(value) if isinstance(value, list) else value
        value = float(value) if type(default) is float and type(value) is int and abs(value) < MOST else value
        if type(value) is not type(default):
            raise WeightsError(f"{path}: {field.name} should be {type(default).__name__}, found {value!r:.80}")
        if not is_sane(field.name, value, default):
            raise WeightsError(f"{path}: {field.name} cannot be {value!r:.80}")
        known[field.name] = value
    config = cls(**known)
    heads = getattr(config, "num_attention_heads", 1)
    if getattr(config, "hidden_size", heads) % heads:
        raise WeightsError(f"{path}: hidden_size {config.hidden_size} cannot be shared by {heads} attention heads")
    return config


def check_settings(path: Path, supported: dict[str, tuple]) -> dict:
    """A published config.json. WeightsError for a setting that is none of its `supported` values; None: left out."""
    published = read_json(path)
    for name, values in supported.items():
        if published.get(name) not in values:
            known = " or ".join(repr(value) for value in values if value is not None) or "null"
            raise WeightsError(f"{path}: {name} {published.get(name)!r:.80} is not supported, only {known}")
    return published


def tensor_files(folder: Path, wanted: Iterable[str] = ("",)) -> list[Path]:
    """The safetensors files of `folder` that hold keys starting with one of `wanted`, through the index where there is
    one. Half-precision variants (`*.fp16.safetensors`) and adapters beside the model are passed over."""
    folder, wanted = Path(folder), tuple(wanted)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(map(is_shard, weight_map.values())):
            raise WeightsError(f"{index}: weight_map should name a .safetensors file of this folder for every tensor")
        return [folder / name for name in sorted({f for key, f in weight_map.items() if key.startswith(wanted)})]
    files = sorted(f for f in folder.glob("*.safetensors") if len(f.suffixes) == 1)
    if not files:
        raise WeightsError(f"{folder}: no .safetensors file")
    return files


def is_shard(name: object) -> bool:
    """A file's name alone: an index of unknown origin must not lead out of its folder."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]{1,200}\.safetensors", name) is not None


def open_safetensors(path: Path):
    """`safetensors.safe_open` on the CPU (memory-mapped), with errors in one line."""
    try:
        return safetensors.safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error})") from None


FLOATS = ("F64", "F32", "F16", "BF16")  # number types of weights


def stored(files: Iterable[Path], rename: Callable[[str], str | None] | None = None) -> Iterator[tuple]:
    """(our name, published name, file, slice) for every stored tensor that `rename` keeps (None drops a tensor).

    A slice has get_shape() and get_dtype() without reading any tensor data, and slice[:] is the memory-mapped tensor.
    """
    for path in files:
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118, a file is no dictionary
                name = rename(key) if rename else key
                if name is not None:
                    yield name, key, path, file.get_slice(key)


def compare(wanted: dict[str, torch.Tensor], files: Iterable[Path], rename: Callable | None = None) -> list[str]:
    """How `files` and the tensors `wanted` differ, one line a problem: unexpected, twice, missing, another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    problems, seen = [], {}
    files = list(files)
    for name, key, path, tensor in stored(files, rename):
        if name not in expected:
            problems.append(f"{path}: unexpected tensor {key}")
        elif name in seen:
            problems.append(f"{path}: {key} is already in {seen[name]}")
        elif tuple(tensor.get_shape()) != expected[name]:
            problems.append(f"{path}: {key} has shape {tuple(tensor.get_shape())}, expected {expected[name]}")
        elif tensor.get_dtype() not in FLOATS:
            problems.append(f"{path}: {key} has type {tensor.get_dtype()}, expected {', '.join(FLOATS)}")
        seen[name] = path
    where = files[0] if len(files) == 1 else files[0].parent if files else "no file"
    problems += [f"{where}: tensor {name} {shape} is missing" for name, shape in expected.items() if name not in seen]
    return problems


def matched(
    wanted: dict[str, torch.Tensor], files: Iterable[Path], rename: Callable[[str], str | None] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of `files` under the names of `wanted`, memory-mapped.

    `rename` maps a published key to ours, None for a key to leave out. Any other difference between the two sets of
    names and shapes is an error: the first problem and how many more there are.
    """
    files = list(files)
    problems = compare(wanted, files, rename)
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise WeightsError(problems[0] + more, problems)
    return {name: tensor[:] for name, _, _, tensor in stored(files, rename)}


def fill(
    model: nn.Module,
    files: Iterable[Path],
    rename: Callable[[str], str | None] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
) -> nn.Module:
    """Make the tensors of `files` the parameters of the meta-device `model`, each cast and moved once. The model is
    then frozen and in eval mode. `rename` and errors are those of `matched`. `channels_last`: convolutions, and with
    them feature maps, in memory as (B, h, w, C), which makes them faster and attention's reshaping free. (Not on a GPU
    without compiling: there group normalisation takes (B, C, h, w).)"""

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if channels_last and tensor.dim() == 4 else torch.preserve_format
        return tensor.to(device, dtype, memory_format=layout)

    files, wanted = list(files), model.state_dict()
    found = matched(wanted, files, rename)
    state = {name: placed(tensor) for name, tensor in found.items()}
    views = [name for name, tensor in found.items() if state[name] is tensor]
    if 0 < len(views) < len(found):  # a mapping of their own, as this one keeps in memory what was read for the copies
        found = matched(wanted, files, rename)
        state |= {name: found[name] for name in views}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def pinned(module: nn.Module, most: int = 1 << 30) -> nn.Module:
    """Frozen weights into memory of the host that stays in place, from which a GPU reads several times as fast.

    Many share a block of up to `most` bytes: torch takes such memory in powers of two, and for each matrix of Vicuna
    alone that would be a third more.
    """
    groups, used = [], 0
    for parameter in module.parameters():
        size = -(-parameter.nbytes // 64) * 64  # the next one starts on a line of the cache
        if not groups or used + size > most:
            groups, used = [*groups, []], 0
        groups[-1].append((parameter, used))
        used += size
    for group in groups:
        last, start = group[-1]
        block = torch.empty(start + last.nbytes, dtype=torch.uint8, pin_memory=True)
        for parameter, at in group:
            place = block[at : at + parameter.nbytes].view(parameter.dtype)
            place = place.as_strided(parameter.shape, parameter.stride(), place.storage_offset())
            parameter.data = place.copy_(parameter)
    return module


@contextmanager
def on(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Inside, the modules have copies of their parameters on `device`, unless those are there already; afterwards their
    own again. For frozen modules: nothing is copied back."""
    layers = [layer for module in modules for layer in module.modules()]
    own = [(layer, *named) for layer in layers for named in layer.named_parameters(recurse=False)]
    moved = [(layer, name, parameter) for layer, name, parameter in own if parameter.device != device]
    for layer, name, parameter in moved:
        setattr(layer, name, nn.Parameter(parameter.to(device, non_blocking=True), requires_grad=False))
    try:
        yield
    finally:
        for layer, name, parameter in moved:
            setattr(layer, name, parameter)


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write atomically: a temporary name beside `path`, flushed to the disk, then renamed."""
    try:
        with written_whole(path) as temporary:
            tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            safetensors.torch.save_file(tensors, temporary, {"format": "pt", **(metadata or {})})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # safetensors makes its files readable by the owner alone
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not written ({error})") from None
