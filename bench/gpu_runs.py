"""The parts of bench/gpu.py that call other commands, and `draw`, which makes data for one of them.

| part      | what                                                                                     |
| --------- | ---------------------------------------------------------------------------------------- |
| draw      | the miniature's training pictures; on the CPU, beside the parts before                   |
| tests     | the tests that need a GPU                                                                |
| miniature | stage 1 of the miniature for as long as there is time, then the exam on people's prompts |
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu_rows import Setup
from miniature.world import write_pairs
from trainer.log import read_log

ROOT = Path(__file__).resolve().parents[1]
PAIRS = "pairs.tar"  # what the part draw writes, for the part miniature
EXAM, START = 35.0, 20.0  # seconds that the miniature's exam takes, and a start of train_uas.py with its compiling


def draw(setup: Setup) -> None:
    count = 16 if setup.is_tiny else 20_000
    write_pairs(setup.folder / PAIRS, count, 0, size=64)
    setup.rows.add("training pictures drawn", count, "pictures")


def command(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def tests(setup: Setup) -> None:
    """pytest's verdict on each test that needs a GPU."""
    has_gpu = setup.device.type == "cuda"
    files = ("--gpu", "tests/test_gpu.py", "tests/test_steps.py") if has_gpu else ("--rehearse", "tests/test_gpu.py")
    call = command("-m", "pytest", *files, "-k", "gpu", "-v", "-s", "-p", "no:cacheprovider", "--no-header")
    with setup.rows.attempt("tests"), subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        name, printed, verdicts = None, [], 0
        for line in process.stdout:  # verdicts come one by one: a part that is cut off keeps those so far
            print(line, end="", flush=True)
            if re.match(r"=+ .*(FAILURES|ERRORS|summary)", line):  # all verdicts are given: details follow
                name = None
                break
            name = match[1] if (match := re.search(r"::(test_\S+)", line)) else name
            printed += re.findall(r"largest relative difference \S+", line)
            verdict = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
            if verdict and name:
                note = f"{verdict[1].lower()}; {printed[-1]}" if printed else verdict[1].lower()
                setup.rows.add(f"test: {name}", float(verdict[1] == "PASSED"), "passed", note=note)
                name, printed, verdicts = None, [], verdicts + 1
        print(process.stdout.read(), flush=True)
        if not verdicts:
            raise ValueError("pytest ran no test, see gpu.log")


def train_miniature(setup: Setup, out: Path, steps: int, limit: float) -> list[dict]:
    """The log of a run of stage 1, which is stopped with a checkpoint after `limit` seconds. Empty where even that
    takes too long, as while it compiles."""
    options = ["--data", setup.folder / PAIRS, "--out", out, "--steps", steps, "--log-every", 20, "--sample-every", 0]
    options += ["--workers", 0 if setup.is_tiny else min(8, os.cpu_count() or 1), "--device", setup.device.type]
    options += ["--save-every", 10**6, *(["--batch-size", 2] if setup.is_tiny else [])]
    with subprocess.Popen(command("train_uas.py", *options), cwd=ROOT) as process:
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                return []
    if process.returncode:
        raise ValueError(f"train_uas.py ended with {process.returncode}")
    return read_log(out / "log.jsonl")


def miniature(setup: Setup) -> None:
    rows, run = setup.rows, setup.folder / "run"
    left = setup.end - time.monotonic() - EXAM
    with rows.attempt("miniature, stage 1"):
        if not (setup.folder / PAIRS).exists():
            raise ValueError("the training pictures are not drawn yet")
        steps = 2
        if not setup.is_tiny:
            probe = train_miniature(setup, setup.folder / "probe", 100, left / 3)
            speed = probe[-1]["samples_per_s"] if probe else 500  # of its last 20 steps; without any, a guess
            left = setup.end - time.monotonic() - EXAM
            steps = int(min(max(left - START, 5), 180) * 0.9 * speed / 32)  # the miniature's batch
        begin = time.perf_counter()
        log = train_miniature(setup, run, steps, max(left, 10))
        seconds = time.perf_counter() - begin
        if not log:
            raise ValueError(f"no step within {seconds:.0f} s")
        last = log[-1]
        rows.add(
            "miniature, stage 1", last["samples_per_s"], "samples/s", note=f"{last['step']:,} steps, {seconds:.0f} s"
        )
        for name in ("ldm_loss", "cap_loss", *(["memory_gb"] if "memory_gb" in last else [])):  # that of a GPU
            rows.add(f"miniature, stage 1: {name}", last[name], "GB" if name == "memory_gb" else "")
    with rows.attempt("miniature, people's exam"):
        scores, people = setup.folder / "scores.json", ROOT / "miniature" / "people"
        short = ["--seeds", 0] if setup.is_tiny or setup.end - time.monotonic() < EXAM else []
        for name in ("prompts", "chats") if setup.is_tiny else ():
            first = (people / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[0]
            (setup.folder / f"{name}.jsonl").write_text(first, encoding="utf-8")
            short += [f"--{name}", setup.folder / f"{name}.jsonl"]
        call = ["miniature/score.py", "people", "--checkpoint", run, "--device", setup.device.type, "--out", scores]
        subprocess.run(command(*call, *short), cwd=ROOT, check=True)
        for what, figures in json.loads(scores.read_text(encoding="utf-8"))["figures"]["people"].items():
            rows.add(f"miniature, people's {what}: all right", 100 * figures["all right"], "%")
