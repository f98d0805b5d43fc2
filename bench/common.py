"""What all benchmarks share: options, timing in turn, the name of the hardware, results as JSON and as a table.

Ours and its peers run in one process on the same weights and inputs, in turn, round after round, every second round
in the opposite order: what else the machine does, and how warm it is, meets all of them alike. A time is the median
over the rounds. A ratio is the median of ours / peer within a round, below 1 where ours is faster; beside it stand
its quartiles, between which half of the rounds lie.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.cli import DTYPES, make_folder, pick_device
from common.files import write_json, write_text

SHORTEST = 0.05  # seconds of one timing: faster calls are repeated until they fill it
# Relative, of outputs and of gradients, of ours and peer. In bfloat16 gradients show gross errors alone.
TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.1, 0.2)}


def parser(description: str, sizes: tuple[str, ...], rounds: int = 9) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `sizes` is what runs by default, with a GPU also the full size."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    names = "tiny", "miniature", "half", "full"
    add("--sizes", nargs="+", choices=names, help=f"default: {', '.join(sizes)}, on a GPU full, too")
    result.set_defaults(usual_sizes=sizes)
    add("--rounds", type=int, default=rounds, help="timings of each, in turn")
    add("--threads", type=int, help="of the CPU; default: torch's, one a core")
    add("--weights", type=Path, help="miniature's weights; default: miniature/weights, random ones where it is missing")
    add("--keep", type=Path, help="folder where random weights are kept for the next run; default: they are not")
    add("--out", type=Path, default=Path("out/bench"), help="folder for the .json and the .md")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, default="auto", help="of the frozen weights; auto: bf16 on a GPU, else fp32")
    add(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of this process alone, where others run too"
    )
    add("--force", action="store_true", help="the full size without a GPU too")
    return result


def start(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Check and apply the options."""
    device = pick_device(args.device)
    args.sizes = args.sizes or (*args.usual_sizes, *(("full",) if device.type == "cuda" else ()))
    if "full" in args.sizes and device.type == "cpu" and not args.force:
        raise ValueError("--sizes full takes hours and 60 GB without a GPU; --force does it all the same")
    if args.rounds < 1 or (args.threads is not None and args.threads < 1):
        raise ValueError("--rounds and --threads must be at least 1")
    if args.clock == "cpu" and device.type != "cpu":
        raise ValueError("--clock cpu tells nothing about a GPU")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # as in training; without effect on a CPU
    torch.manual_seed(0)  # of what is untrained
    return device, DTYPES[args.dtype] or (torch.float32 if device.type == "cpu" else torch.bfloat16)


def hardware(device: torch.device) -> dict:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {}
    for name in ("torch", "transformers", "diffusers", "pillow", "webdataset"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load": os.getloadavg()[0],  # what runs beside us
        "python": platform.python_version(),
        "versions": versions,
    }


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds_of(call: Callable, device: torch.device, number: int = 1, clock: str = "wall") -> float:
    """Seconds of one of `number` calls, until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = CLOCKS[clock]()
    for _ in range(number):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (CLOCKS[clock]() - begin) / number


def alternate(
    contenders: dict[str, Callable], rounds: int, device: torch.device, clock: str = "wall"
) -> dict[str, list[float]]:
    """{name: call} -> {name: seconds of a call, one a round}, after a warm-up that is not counted."""
    numbers = []
    for call in contenders.values():
        call()
        numbers.append(max(1, math.ceil(SHORTEST / seconds_of(call, device))))
    timers = {
        name: partial(seconds_of, call, device, number, clock)
        for (name, call), number in zip(contenders.items(), numbers, strict=True)
    }
    return in_turn(timers, rounds)


def in_turn(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """{name: what measures itself} -> {name: what it said in every round}."""
    gc.collect()
    times = {name: [] for name in timers}
    for i in range(rounds):
        for name in list(timers)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(timers[name]())
    return times


def peak_memory_of(call: Callable, device: torch.device) -> float:
    """GB that a call needs at its worst, above what lies in memory before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e9
    ctypes.CDLL(None).malloc_trim(0)  # Linux: give back what is free, and let the peak start anew
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    call()
    return max(resident("VmHWM") - before, 1e-3)


def resident(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024 / 1e9


def rows_of(
    what: str, size: str, times: dict[str, list[float]], work: float = 0, unit: str = "s", **more
) -> list[dict]:
    """A row of the table for every peer of ours, which is the first of `times`. With `work`, how many of something a
    call does, speeds are shown instead of times, in `unit`. `more` goes into the rows as it is."""
    ours, *peers = times
    rows = []
    for peer in peers:
        ratios = [a / b for a, b in zip(times[ours], times[peer], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        medians = [statistics.median(times[name]) for name in (ours, peer)]
        shown = [work / seconds for seconds in medians] if work else medians
        row = {"what": what, "size": size, "ours_is": ours, "ours": shown[0], "peer_is": peer, "peer": shown[1]}
        row |= {"unit": unit, "ratio": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]]}
        rows.append({**row, "rounds": len(ratios), **more})
    return rows


def difference(ours: Tensor, peer: Tensor, order: float) -> float:
    """Norm of their difference relative to the peer's; of order infinity, by their largest values."""
    ours, peer = ours.float().flatten(), peer.float().flatten()
    return ((ours - peer).norm(order) / peer.norm(order).clamp(min=1e-12)).item()


def agree(
    what: str, ours: Tensor | Sequence[Tensor], peer: Tensor | Sequence[Tensor], dtype: torch.dtype, gradients: int = 0
) -> float:
    """Their difference; the last `gradients` tensors are gradients. ValueError where ours and peer do not compute the
    same: then their times tell nothing."""
    ours, peer = ([x] if isinstance(x, Tensor) else list(x) for x in (ours, peer))
    order = math.inf if dtype == torch.float32 else 2  # in 16 bit single values stray far
    figures = [difference(a, b, order) for a, b in zip(ours, peer, strict=True)]
    limits = [TOLERANCE[dtype][i >= len(ours) - gradients] for i in range(len(ours))]
    if not all(figure < limit for figure, limit in zip(figures, limits, strict=True)):  # NaN, too
        raise ValueError(f"{what}: ours and peer differ by {max(figures):.1e}")
    return max(figures)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 in float32: in TF32, as they are timed, gradients of ours and peer may differ by a tenth."""
    before = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = before


# ---- results


def show(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


class Report:
    """NAME.json and NAME.md in a folder, whole after every row that is added."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device):
        self.path = make_folder(args.out) / f"{name}.json"
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        self.record = {"bench": name, "hardware": hardware(device), "arguments": arguments, "rows": [], "left_out": []}

    def add(self, rows: list[dict]) -> None:
        for row in rows:
            print(" | ".join(self.cells(row)), flush=True)
        self.record["rows"] += rows
        self.write()

    def leave_out(self, what: str) -> None:
        print(f"left out: {what}", flush=True)
        self.record["left_out"].append(what)
        self.write()

    def cells(self, row: dict) -> list[str]:
        low, high = row["quartiles"]
        ours, peer = (f"{show(row[who], row['unit'])} {row[f'{who}_is']}" for who in ("ours", "peer"))
        return [row["what"], row["size"], ours, peer, f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]

    def table(self) -> str:
        machine = self.record["hardware"]
        place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        lines = [f"{place}; {versions}. Ratios below 1: ours is faster.", ""]
        lines += ["| what | size | ours | peer | time, ours/peer | half of the rounds |", "| " + "--- | " * 6]
        lines += ["| " + " | ".join(self.cells(row)) + " |" for row in self.record["rows"]]
        lines += [f"\nLeft out: {what}" for what in self.record["left_out"]]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        write_json(self.path, self.record)
        write_text(self.path.with_suffix(".md"), self.table())
