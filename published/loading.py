"""Published weights into modules: sizes from config.json, tensors from safetensors.

Every part of the stack loads in the same way (parts.py):

    config = read_config(UNetConfig, folder / "config.json")
    unet = load(partial(UNet, config), folder, dtype=torch.bfloat16)

The module is built without memory, and the memory-mapped tensors become its parameters. A module's attribute paths are
the published names, so this is `load_state_dict(strict, assign)`: a frozen weight whose dtype and layout already fit is
never copied, it stays a view of the file until something moves it to a GPU. Where a published file has other names, a
table of `Names` says which. All errors are `WeightsError`: one line that names the file, the key and the shapes.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from common.files import read_json as read_object
from common.files import written_whole

MAX_SIZE, MAX_LAYERS = 1 << 24, 1000  # of any number in a config.json, of a number of layers: building has to end
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes that weights may have, as safetensors names them
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")  # without a folder: an index must not lead out of its own

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


def read_json(path: Path) -> dict:
    try:
        return read_object(path)
    except ValueError as error:
        raise WeightsError(str(error)) from None


def checked(value: object, default: object, name: str):
    """`value` of a config.json as the type of `default`. ValueError for another type or a size that no model has."""
    if isinstance(default, tuple):
        values = value if isinstance(value, list) else [value]  # one value stands for all levels
        if not 1 <= len(values) <= 16:
            raise ValueError(f"{name} should have 1 to 16 entries")
        return tuple(checked(entry, default[0], name) for entry in values)
    if type(default) is float and type(value) is int and abs(value) <= MAX_SIZE:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"{name} should be {type(default).__name__}, found {value!r:.80}")
    largest = MAX_LAYERS if "layers" in name else MAX_SIZE
    smallest = {int: 0 if default in (0, 1) else 1, float: 1e-13}  # an offset may be 0, a size may not
    if type(value) in smallest and not smallest[type(value)] <= value <= largest:
        raise ValueError(f"{name} cannot be {value!r:.80}")
    return value


def read_config(cls, path: Path, *nested: str, supported: dict[str, tuple] | None = None):
    """Fill the dataclass `cls` from a published config.json, or from the object `nested` inside it.

    Keys that `cls` does not name are ignored. A missing or null key takes the field's default, which is the published
    model's value: published files leave defaults out. WeightsError for another type, an impossible size, and a setting
    that has none of its `supported` values, among which None stands for one that is left out.
    """
    values = read_json(path)
    try:
        for name, allowed in (supported or {}).items():
            if values.get(name) not in allowed:
                known = " or ".join(repr(value) for value in allowed if value is not None) or "null"
                raise ValueError(f"{name} {values.get(name)!r:.80} is not supported, only {known}")
        for key in nested:
            values = values.get(key) or {}
            if not isinstance(values, dict):
                raise ValueError(f"{key} should be an object, found {values!r:.80}")
        given = [field for field in dataclasses.fields(cls) if values.get(field.name) is not None]
        config = cls(**{field.name: checked(values[field.name], field.default, field.name) for field in given})
        heads = getattr(config, "num_attention_heads", 1)
        if getattr(config, "hidden_size", heads) % heads:
            raise ValueError(f"hidden_size {config.hidden_size} cannot be shared by {heads} attention heads")
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
    return config


def tensor_files(folder: Path, wanted: Iterable[str] = ("",)) -> list[Path]:
    """The safetensors files of `folder` that hold keys starting with one of `wanted`, through the index where there is
    one. Files with a second suffix are passed over: half-precision variants (`*.fp16.safetensors`)."""
    folder, wanted = Path(folder), tuple(wanted)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = read_json(index).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, dict) else ()
        if not shards or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in shards):
            raise WeightsError(f"{index}: weight_map should name a .safetensors file of this folder for every tensor")
        return [folder / name for name in sorted({f for key, f in weight_map.items() if key.startswith(wanted)})]
    files = sorted(f for f in folder.glob("*.safetensors") if len(f.suffixes) == 1)
    if not files:
        raise WeightsError(f"{folder}: no .safetensors file")
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


def matched(
    wanted: dict[str, torch.Tensor], files: Iterable[Path], names: Names = (), first_wins: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of `files` under the names of `wanted`, memory-mapped.

    WeightsError where a tensor is unexpected, there twice, missing or of another shape or dtype: it says the first
    problem and how many more there are. Where `first_wins`, a tensor may be in several files, and the first one's
    counts. A linear layer may be stored as a 1x1 convolution.
    """
    found, seen, problems = {}, {}, []
    files = list(files)
    for path in files:
        for key, tensor in tensor_slices(path).items():
            name = our_name(key, names)
            if name is None or (first_wins and name in seen):
                continue
            shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
            expected = tuple(wanted[name].shape) if name in wanted else None
            if expected is None:
                problems.append(f"{path}: unexpected tensor {key}")
            elif name in seen:
                problems.append(f"{path}: {key} is already in {seen[name]}")
            elif shape != expected and shape != (*expected, 1, 1):
                problems.append(f"{path}: {key} has shape {shape}, expected {expected}")
            elif dtype not in FLOATS:
                problems.append(f"{path}: {key} has dtype {dtype}, expected {', '.join(FLOATS)}")
            else:
                found[name] = tensor[:].view(expected)
            seen[name] = path
    where = files[0] if len(files) == 1 else files[0].parent
    missing = [name for name in wanted if name not in seen]
    problems += [f"{where}: tensor {name} {tuple(wanted[name].shape)} is missing" for name in missing]
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise WeightsError(problems[0] + more, problems)
    return found


def load(
    build: Callable[[], nn.Module],
    files: Path | list[Path],
    names: Names = (),
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
) -> nn.Module:
    """What `build` makes, with the tensors of `files`, or of the folder `files`, for parameters, each cast and moved
    once. It is frozen and in eval mode. WeightsError for sizes that no module has, and as `matched` says.

    `channels_last` stores convolutions, and with them feature maps, as (B, h, w, C), which makes them faster and the
    reshaping for attention free. (Not so on a GPU without torch.compile, where group normalisation copies them to
    (B, C, h, w).)
    """
    folder = files if isinstance(files, Path) else files[0].parent
    try:
        with torch.device("meta"), Uninitialised():  # to initialise costs a second even there: torch imports a compiler
            model = build()
    except (ArithmeticError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{folder / 'config.json'}: no model has these sizes ({reason})") from None
    files = tensor_files(files) if isinstance(files, Path) else files
    wanted, state = model.state_dict(), {}
    found = matched(wanted, files, names)
    for name, tensor in found.items():
        layout = torch.channels_last if channels_last and tensor.dim() == 4 else torch.preserve_format
        state[name] = tensor.to(device, dtype, memory_format=layout)
    views = [name for name in found if state[name] is found[name]]
    if 0 < len(views) < len(found):  # map those anew: the first mapping keeps in memory what was read for the copies
        found = matched(wanted, files, names)
        state |= {name: found[name] for name in views}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the file whole or not at all, and onto the disk before this returns."""
    try:
        with written_whole(path) as temporary:
            tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            safetensors.torch.save_file(tensors, temporary, {"format": "pt", **(metadata or {})})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # safetensors makes its files readable by the owner alone
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not written ({error})") from None
