"""What the parts of bench/gpu.py share: where their figures go, and how a call is timed, weighed and profiled."""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import seconds_of
from bench.steps import CAPTION
from bench.unfiled import random_stack
from minigpt5 import MiniGPT5

PROMPT = "a small red boat with a white sail on the calm sea at night"


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class Rows:
    """The figures so far in a file, one JSON object a line, written at once: what is cut off keeps them."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, row: dict) -> None:
        print(json.dumps(row), flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def add(self, what: str, value: float, unit: str, **more) -> None:
        self.write({"what": what, "value": value, "unit": unit, **more})

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An error inside becomes a row, and what comes after it goes on: too little memory, a missing library."""
        try:
            yield
        except Exception as error:
            self.write({"what": what, "error": one_line(error)})
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@dataclass
class Setup:
    rows: Rows
    folder: Path  # for files that other parts read, or nobody
    out: Path  # for files that are kept
    device: torch.device
    dtype: torch.dtype
    size: str  # "full" or "tiny"
    end: float  # time.monotonic() at which the part is cut off

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny"

    def stack(self, captions: bool = False) -> MiniGPT5:
        folder = self.folder / "weights"
        words = f"{PROMPT} {CAPTION}".split()
        begin = time.perf_counter()
        model = random_stack(folder, self.size, self.device, self.dtype, captions, words)
        seconds_of(lambda: None, self.device)
        self.rows.add("random weights made", time.perf_counter() - begin, "s")
        return model

    def time(self, call: Callable, rounds: int = 3) -> float:
        """The median of so many rounds, after one that is not counted."""
        call()
        rounds = 1 if self.is_tiny else rounds
        return statistics.median(seconds_of(call, self.device) for _ in range(rounds))

    def peak(self, call: Callable) -> float:
        """GB that are allocated at the worst moment of a call, whatever lay there before included."""
        if self.device.type != "cuda":
            call()
            return 0.0
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def profile(self, what: str, call: Callable) -> None:
        """Where a call's time goes: the kernels that take the most."""
        with self.rows.attempt(f"profile of {what}"):
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            with torch.profiler.profile(activities=kinds) as profiler:
                seconds = seconds_of(call, self.device)
            name = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            events = profiler.key_averages()
            if self.device.type == "cuda":  # kernels alone, not the operations that start them
                events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
            events = sorted(events, key=lambda event: -getattr(event, name))[:10]
            kernels = [[event.key[:90], getattr(event, name) / 1e6, event.count] for event in events]
            self.rows.add(f"profile of {what}", seconds, "s", kernels=kernels)


def gigabytes(*modules: torch.nn.Module | None) -> float:
    return sum(p.nbytes for module in modules if module for p in module.parameters()) / 1e9
