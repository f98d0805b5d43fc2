"""What all commands share: printing, one-line errors, options (the weights may bring their defaults), device and
dtype."""

import argparse
import io
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Let OpenMP's idle threads sleep. By default they spin, which on shared cores makes a command 3 to 10 times slower.
# This takes effect only if it is set before torch is loaded, so every script imports this file first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from common.files import read_json

MINIATURE = Path(__file__).resolve().parents[1] / "miniature" / "weights"
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST_NUMBER, LARGEST_COUNT = 1e30, 1 << 31  # of an option: float32 overflows not far above the first
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # characters that a terminal obeys
UPWARDS = re.compile(r"\n*(\x1b\[A)*")  # how a progress bar reaches its line
SHORTAGE = re.compile(r".*(allocat|(out of|shared) memory|open files|start new thread).*")  # in torch's words


class Printed(io.TextIOWrapper):
    """Standard output or error. Control characters, which a file may hold, and characters that its encoding does not
    have are written as "?". What nobody can read (a closed pipe, a full disk) is dropped: results are in files."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text if UPWARDS.fullmatch(text) else CONTROL.sub("?", text))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def open_streams() -> None:
    """Standard input, output and error that raise no error; those that were closed at the start are empty."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        setattr(sys, name, stream)
        with suppress(OSError):  # a stream in memory has no file number, and raises no errors
            file = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115
            setattr(sys, name, Printed(file, stream.encoding, "replace", line_buffering=stream.line_buffering))


def run(main: Callable[[], None]) -> None:
    """Run a command. What the user can mend (files, values, disk space, memory) ends in one line and exit status 2."""
    open_streams()
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # WeightsError and ImageError are ValueErrors
        message, shortage = str(error), SHORTAGE.search(str(error))
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        elif isinstance(error, MemoryError):
            message = f"not enough memory {message}"
        elif isinstance(error, RuntimeError):  # torch's, of several lines; all others are faults of the program
            if not shortage:
                raise
            message = shortage[0] + "; --workers 0 needs no shared memory" * ("shared memory" in shortage[0])
        script = Path(sys.argv[0])
        name = script.parent.name if script.name == "__main__.py" else script.name  # python -m NAME
        print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add_weights_option(parser)
    add_device_option(parser)
    about = "dtype of the frozen weights; auto: bf16 on a GPU, else by their size (docs/training.md)"
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=about)


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    layout = "folder of the published layout (README, Published weights); default: the miniature"
    parser.add_argument("--weights", type=Path, default=MINIATURE, metavar="DIR", help=layout)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    about = "auto, cpu, cuda, cuda:N or mps"
    parser.add_argument("--device", type=pick_device, default="auto", help=f"{about} (default: auto)")


def add_picture_options(parser: argparse.ArgumentParser, sampling: type, against: str) -> None:
    add = parser.add_argument
    add("--steps", type=int, default=sampling.steps, help="denoising steps of a picture")
    add("--guidance", type=float, default=sampling.guidance, help=f"guidance against {against}; 1: off")
    add("--sampler", choices=sampling.samplers, default=sampling.sampler, help="diffusion sampler")


def add_sampling_options(parser: argparse.ArgumentParser, sampling: type, words_first: bool = False) -> None:
    """The fields of the class `generation.Sampling` as options; --words-first only where `words_first`. The class is an
    argument, since nothing in common/ imports a model."""
    add = parser.add_argument
    add_picture_options(parser, sampling, against="voken features of zeros (see --empty-caption)")
    about = "guide against the empty caption, not against zeros; default: as trained"
    add("--empty-caption", action=argparse.BooleanOptionalAction, help=about)
    add("--temperature", type=float, default=sampling.temperature, help="for the words; 0: always the likeliest")
    add("--top-p", type=float, default=sampling.top_p, help="sample among the likeliest words of this mass; 1: off")
    add("--repetition-penalty", type=float, default=sampling.repetition_penalty, help="for words said before; 1: off")
    add("--max-new-tokens", type=int, default=sampling.max_new_tokens, help="longest answer, in tokens")
    add("--force-image", action="store_true", help="begin every answer with a picture")
    if words_first:
        about = "say in words what a picture shows, then paint that description"
        add("--words-first", action=argparse.BooleanOptionalAction, default=False, help=about)


def suited_options(weights: Path, command: str) -> dict:
    """The defaults that weights bring: the options that WEIGHTS/minigpt5/config.json has under `command`; none where
    there is no such file. ValueError where these are no JSON object."""
    path = weights / "minigpt5" / "config.json"
    suited = read_json(path).get(command, {}) if path.is_file() else {}
    if not isinstance(suited, dict):
        raise ValueError(f"{path}: {command} should be an object of options and values")
    return suited


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: numbers from `least` to `most`, integers if `least` is an int, else floats."""

    def read(text: str) -> float:
        value = type(least)(text)
        if not least <= value <= most:
            limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:,g}"
            raise argparse.ArgumentTypeError(f"must be {limits}")
        return value

    read.__name__ = type(least).__name__  # argparse names the type in its error
    return read


FROM_0, FROM_1 = number(0), number(1)


def parse(
    parser: argparse.ArgumentParser, command: str, sampling: type | None = None, words_first: bool = False
) -> argparse.Namespace:
    """Add --weights, --device, --dtype and, with `sampling`, `add_sampling_options`, and read the command line. Options
    that are not given take the values of `suited_options`. ValueError if these are none of its options or values."""
    if sampling:
        add_sampling_options(parser, sampling, words_first)
    first = argparse.ArgumentParser(add_help=False)
    add_weights_option(first)
    add_model_options(parser)
    weights = first.parse_known_args()[0].weights
    path, suited = weights / "minigpt5" / "config.json", suited_options(weights, command)
    options = {option.dest: option for option in parser._actions}
    for name, value in suited.items():
        option, is_flag = options.get(name), isinstance(value, bool)
        takes_one = option and option.nargs in (None, 0) and option.type is not Path  # paths are the user's
        if not takes_one or is_flag != (option.nargs == 0) or (option.choices and str(value) not in option.choices):
            raise ValueError(f"{path}: {command} has {name} {value!r:.80}, which is no value for an option")
        option.default = value if is_flag else str(value)  # argparse reads a default that is text as if it were typed
        option.help = re.sub("; default: .*", "", option.help or "", flags=re.DOTALL)  # it names the old default
    return read_arguments(parser)


def read_arguments(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, with the defaults in --help; it accepts only numbers that can be computed with."""
    for option in parser._actions:
        has_default = option.default is not False and option.default not in (None, [], argparse.SUPPRESS)
        if option.help and has_default and "default" not in option.help:
            option.help += " (default: %(default)s)"
    args = parser.parse_args(argv)
    for option in parser._actions:
        if type(option) is argparse._StoreAction and option.nargs in (None, "+") and getattr(args, option.dest) == []:
            parser.error(f"--{option.dest.replace('_', '-')} needs a value")  # argparse reads "--name=--" as a list
    for name, value in vars(args).items():
        if isinstance(value, float) and not abs(value) <= LARGEST_NUMBER:
            parser.error(f"--{name.replace('_', '-')} must be a finite number, of at most {LARGEST_NUMBER:g}")
        if isinstance(value, int) and name != "seed" and abs(value) >= LARGEST_COUNT:
            parser.error(f"--{name.replace('_', '-')} must be below {LARGEST_COUNT:,}")
    if not 0 <= getattr(args, "seed", 0) < 1 << 63:
        parser.error("--seed must be at least 0 and below 2^63")
    return args


class DeviceError(argparse.ArgumentTypeError, ValueError):
    """A device that is not there."""


def pick_device(name: str) -> torch.device:
    """ "auto" is the NVIDIA GPU where there is one, else the CPU; "mps" is Apple's GPU. Under torchrun each process
    takes the GPU of its local rank. DeviceError for one that is not there."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d\d?)?", name):
        raise DeviceError(f"{name}: not auto, cpu, cuda, cuda:N or mps")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    count = {"cpu": 1, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.device_count()}[device.type]
    if (device.index or 0) >= count:
        raise DeviceError(f"{name}: this torch sees {count:d} such devices")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile pays: on a GPU, and one with bfloat16 (Ampere or later), else it refuses such weights."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def make_folder(path: Path) -> Path:
    """Create a folder for output. OSError where it cannot be created or written."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise OSError(f"{path}: no permission to write there")
    return path
