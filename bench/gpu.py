"""Everything that wants to be known of a GPU, in one run of nine minutes, the most important first.

    python bench/gpu.py                                      # needs a GPU, better of 80 GB; writes gpu.json and gpu.md
    python bench/gpu.py --parts stage-1 --minutes 5          # one part, with all the time
    python bench/gpu.py --dry-run                            # on a CPU, tiny: does every line of it run?

| part      | what                                                                                              |
| --------- | ------------------------------------------------------------------------------------------------- |
| words     | tokens per second of the published size in bfloat16: not compiled, compiled, with 8-bit matrices  |
| picture   | 512 x 512 pixels, 50 and 20 guided steps: not compiled, compiled, the diffusers pipeline          |
| stage-1   | training from precomputed tensors: batch 8 in 22 GB, batch 48, compiled; the released recipe      |
| stage-2   | training on sequences of 1,024 tokens                                                             |
| tests     | the tests that need a GPU (`pytest --gpu -k gpu`)                                                 |
| miniature | stage 1 of the miniature, three minutes or as long as there is time, and its exam                 |

Weights are random and are made on the GPU (unfiled.py). Each part is a process of its own, so that an error, too little
memory or a part that takes too long costs no more than its own remaining figures; they are written down one by one.
Time that a part leaves over is the next one's. The libraries may be missing: their figures are then noted as not
measured. Beside the figures stand the targets, with the hardware that they were set for.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

if __package__ in (None, ""):  # run as a script: not bench/, whose data.py and sample.py would hide the product's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import make_folder, read_arguments, run  # isort: skip

import torch

from bench import gpu_parts, gpu_runs
from bench.common import hardware, show
from bench.gpu_rows import Rows, Setup
from common.files import write_json, write_text

# Shares of the time. In nine minutes they are seconds, less what starting and reporting takes.
SHARES = {"words": 115, "picture": 140, "stage-1": 130, "stage-2": 20, "tests": 35, "miniature": 100}
BESIDE = {"reckon": gpu_parts.MEMORY_PARTS, "draw": ("miniature",)}  # started first: the parts that need its results
PARTS = {
    "reckon": gpu_parts.count_memory,
    "draw": gpu_runs.draw,
    "words": gpu_parts.words,
    "picture": gpu_parts.picture,
    "stage-1": gpu_parts.stage_1,
    "stage-2": gpu_parts.stage_2,
    "tests": gpu_runs.tests,
    "miniature": gpu_runs.miniature,
}
RESERVE = 12.0  # seconds that are left for the report
LEAST = 8.0  # seconds under which no part is started

# figure -> (whether more is better, {GPU: target}); "": any GPU
TARGETS = {
    "decoding, compiled": (True, {"H100": 150.0, "H200": 200.0}),
    "picture, PNDM, 50 steps, compiled": (False, {"H100": 0.76, "H200": 0.76}),
    "picture: speed against diffusers, compiled": (True, {"": 1.0}),
    "stage 1, batch 48, compiled": (True, {"H100": 100.0, "H200": 100.0}),
    "stage 1, batch 48, compiled: speed against the released recipe": (True, {"": 3.0}),
}
MEMORY_TARGET = 0.25  # measured memory may be so far from the counted


# ---- a part


def not_compiled(function: Callable, **_) -> Callable:
    """Takes the place of torch.compile in a dry run: tracing and making code would take minutes."""
    return function


def run_part(name: str, work: Path, out: Path, seconds: float, is_dry: bool) -> None:
    """One part, in this process."""
    rows = Rows(work / f"{name}.jsonl")
    on_cpu = is_dry or name in BESIDE
    device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
    size, dtype = ("tiny", torch.float32) if is_dry else ("full", torch.bfloat16)
    torch.set_float32_matmul_precision("high")  # as in training
    if name not in BESIDE:
        rows.write({"machine": hardware(device)})
    dry = patch.object(torch, "compile", not_compiled) if is_dry else nullcontext()
    with dry, rows.attempt(name):
        PARTS[name](Setup(rows, work, out, device, dtype, size, time.monotonic() + seconds))


class Process:
    """A part in a process of its own, and whatever that starts."""

    def __init__(self, name: str, work: Path, out: Path, seconds: float, is_dry: bool):
        words = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--work", str(work), "--out", str(out)]
        words += ["--seconds", str(seconds), *(["--dry-run"] if is_dry else [])]
        self.name, self.path, self.seconds, self.ended = name, work / f"{name}.jsonl", seconds, False
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if name in BESIDE else {}
        with open(work / f"{name}.log", "wb") as log:
            self.process = subprocess.Popen(
                words, stdout=log, stderr=log, start_new_session=True, env=os.environ | hidden
            )

    def finish(self, seconds: float) -> None:
        """Wait so long at most, then end it and all that it has started."""
        if self.ended:
            return
        try:
            code = self.process.wait(max(seconds, 0.1))
            if code:
                Rows(self.path).write({"what": self.name, "error": f"the process ended with {code}, see gpu.log"})
        except subprocess.TimeoutExpired:
            Rows(self.path).write({"what": self.name, "error": f"cut off after {self.seconds:.0f} s"})
        self.kill()

    def kill(self) -> None:
        """Its children, too, which stay in its group when it has ended itself."""
        if not self.ended:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.ended = True


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


# ---- the report


def target_of(row: dict, machine: dict, counted: dict[str, float]) -> tuple[str, bool] | None:
    """The target of a figure in words, and whether it is met; None where there is none for this GPU."""
    gpu = machine.get("gpu") or "no GPU"
    if row["what"] in counted:
        share = row["value"] / counted[row["what"]]
        text = f"{counted[row['what']]:.1f} GB by reckon.py, within {100 * MEMORY_TARGET:.0f} %"
        return text, abs(share - 1) <= MEMORY_TARGET
    more, targets = TARGETS.get(row["what"], (True, {}))
    for name, target in targets.items():
        if name in gpu:
            met = row["value"] >= target if more else row["value"] <= target
            return f"{'at least' if more else 'at most'} {show(target, row['unit'])}", met
    return None


def judge(record: dict) -> None:
    """Write the targets beside the figures."""
    counted = {row["what"]: row["value"] for row in record["parts"].get("reckon", []) if "value" in row}
    for name, rows in record["parts"].items():
        for row in rows if name not in BESIDE else ():
            found = target_of(row, record["machine"], counted) if "value" in row and not record["dry_run"] else None
            if found:
                row["target"], row["met"] = found


def report(record: dict) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [f"{machine.get('gpu') or 'No GPU: a dry run, whose figures mean nothing'}; {versions}."]
    lines += [f"Random weights, {record['seconds']:.0f} s in all.", ""]
    lines += ["| part | what | measured | target | | |", "| --- | --- | ---: | --- | --- | --- |"]
    profiles = []
    for name, rows in record["parts"].items():
        for row in rows:
            met = {True: "met", False: "missed"}.get(row.get("met"), "")
            if "error" in row:
                cells = [row["what"], "not measured", "", "", row["error"].replace("|", "/")]
            else:
                cells = [row["what"], show(row["value"], row["unit"]).strip(), row.get("target", ""), met]
                cells += [row.get("note", "")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
            profiles += [row] if "kernels" in row else []
    for row in profiles:
        lines += ["", f"{row['what']}, {show(row['value'], 's')}:", "", "| kernel | time | calls |"]
        lines += ["| --- | ---: | ---: |"]
        lines += [f"| `{kernel.replace('|', '/')}` | {show(s, 's')} | {calls} |" for kernel, s, calls in row["kernels"]]
    return "\n".join(lines) + "\n"


def write_report(record: dict, work: Path, out: Path, began: float) -> None:
    """What there is so far, under temporary names first."""
    record["seconds"] = time.monotonic() - began
    for name in record["parts"]:
        rows = read_rows(work / f"{name}.jsonl")
        record["machine"] = next((row["machine"] for row in rows if "machine" in row), record["machine"])
        record["parts"][name] = [row for row in rows if "machine" not in row]
    judge(record)
    write_json(out / "gpu.json", record)
    write_text(out / "gpu.md", report(record))
    logs = [(name, path) for name in record["parts"] if (path := work / f"{name}.log").exists()]
    texts = [f"==== {name}\n{path.read_text(encoding='utf-8', errors='replace')}" for name, path in logs]
    write_text(out / "gpu.log", "\n".join(texts))


# ---- the command


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="in which everything has ended")
    add("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="in this order; default: all")
    add("--out", type=Path, default=Path("out/bench"), help="folder for gpu.json, gpu.md and gpu.log")
    add("--dry-run", action="store_true", help="everything at its smallest on the CPU; an error ends it")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)  # of a process that this one has started
    add("--work", type=Path, help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    args = read_arguments(parser, argv)
    if args.minutes < 0.5:
        parser.error("--minutes is at least 0.5")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    out = make_folder(args.out)
    if args.part:
        return run_part(args.part, args.work, out, args.seconds, args.dry_run)
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("this torch sees no GPU; --dry-run tries everything on the CPU")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        record = {"bench": "gpu", "dry_run": args.dry_run, "machine": {}, "parts": {}}
        measure(args, Path(folder), out.resolve(), began, record)
    print((out / "gpu.md").read_text(encoding="utf-8"))
    errors = [row for rows in record["parts"].values() for row in rows if "error" in row]
    if args.dry_run and errors:
        raise ValueError(f"not measured: {len(errors)}, the first: {errors[0]['what']}: {errors[0]['error']}")


def measure(args: argparse.Namespace, work: Path, out: Path, began: float, record: dict) -> None:
    end = began + (3600 if args.dry_run else 60 * args.minutes - RESERVE)
    parts = list(dict.fromkeys(args.parts))
    names = [name for name, users in BESIDE.items() if set(users) & set(parts)]
    beside = {name: Process(name, work, out, end - began, args.dry_run) for name in names}
    started, due = list(beside.values()), began
    record["parts"] = {name: [] for name in (*parts, *names)}
    try:
        for name in parts:
            due += (end - began) * SHARES[name] / sum(SHARES[part] for part in parts)
            if name == "miniature":
                beside["draw"].finish((due - time.monotonic()) / 2)
            seconds = due - time.monotonic()
            print(f"{name}: {seconds:.0f} s at most", flush=True)
            if args.dry_run:
                run_part(name, work, out, seconds, is_dry=True)
            elif seconds < LEAST:
                Rows(work / f"{name}.jsonl").write({"what": name, "error": "no time left"})
            else:
                started.append(Process(name, work, out, seconds, False))
                started[-1].finish(seconds)
            write_report(record, work, out, began)
        for process in beside.values():
            process.finish(end - time.monotonic())
    finally:
        for process in started:
            process.kill()
        write_report(record, work, out, began)


if __name__ == "__main__":
    run(main)
