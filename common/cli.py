"""What all commands share: one line for an error, defaults that go with the weights, the device, the number type."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

# OpenMP's idle threads sleep: by default they spin, and on cores that others use, too, a command then takes 3 to 10
# times as long. It counts only before torch is loaded, so every script imports this file first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from common.files import read_json

MINIATURE = Path(__file__).resolve().parents[1] / "miniature" / "weights"
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def run(main: Callable[[], None]) -> None:
    """Run a command. What the user can mend (files, values, disk space) ends in one line and exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:  # WeightsError and ImageError are ValueErrors
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        script = Path(sys.argv[0])
        name = script.parent.name if script.name == "__main__.py" else script.name  # python -m NAME
        print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    layout = "folder of the published layout (README, Published weights); default: the miniature"
    parser.add_argument("--weights", type=Path, default=MINIATURE, metavar="DIR", help=layout)


def suited_options(weights: Path, command: str) -> dict:
    """What suits a size is its weights' to say: the options that WEIGHTS/minigpt5/config.json has under `command`, and
    none where there is no such file."""
    path = weights / "minigpt5" / "config.json"
    suited = read_json(path).get(command, {}) if path.is_file() else {}
    if not isinstance(suited, dict):
        raise ValueError(f"{path}: {command} should be an object of options and values")
    return suited


def parse(parser: argparse.ArgumentParser, command: str) -> argparse.Namespace:
    """Add --weights and read the command line. Options that are not given take the values of `suited_options`.
    ValueError if these name an unknown option."""
    first = argparse.ArgumentParser(add_help=False)
    add_weights_option(first)
    add_weights_option(parser)
    weights = first.parse_known_args()[0].weights
    path, suited = weights / "minigpt5" / "config.json", suited_options(weights, command)
    if unknown := set(suited) - set(vars(parser.parse_args([]))):
        raise ValueError(f"{path}: {command} has no option {', '.join(sorted(unknown))}")
    options = {option.dest: option for option in parser._actions}
    for name, value in suited.items():
        option, is_flag = options[name], isinstance(value, bool)
        if is_flag != (option.nargs == 0) or not isinstance(value, str | int | float) or value != value:
            raise ValueError(f"{path}: {command} has {name} {value!r:.80}, which is no value for it")
        if option.choices and value not in option.choices:
            raise ValueError(f"{path}: {command} has {name} {value!r:.80}, not one of {', '.join(option.choices)}")
        option.default = value if is_flag else str(value)  # argparse reads a default that is text as if it were typed
        option.help = re.sub("; default: .*", "", option.help or "", flags=re.DOTALL)  # that was the other one
    return read_arguments(parser)


def read_arguments(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line with the defaults said in --help, and only numbers that are any."""
    for option in parser._actions:
        if option.help and option.default not in (None, False, [], argparse.SUPPRESS) and "default" not in option.help:
            option.help += " (default: %(default)s)"
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name.replace('_', '-')} must be a finite number")
    if not 0 <= getattr(args, "seed", 0) < 1 << 63:
        parser.error("--seed must be at least 0 and below 2^63")
    return args


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Under torchrun each process takes the GPU of its local rank. ValueError
    for one that is not there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: not auto, cpu, cuda or cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch sees no GPU")
    count = torch.cuda.device_count()
    number = int(os.environ.get("LOCAL_RANK", 0) if name == "cuda" else name.removeprefix("cuda:"))
    if number >= count:
        raise ValueError(f"--device cuda:{number}: there are {count} GPUs, the first is cuda:0")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile pays: on a GPU, and one with bfloat16 (Ampere or later), else it refuses such weights."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def make_folder(path: Path) -> Path:
    """Create a folder for output. OSError where it cannot be created or written."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise OSError(f"{path}: no permission to write there")
    return path
