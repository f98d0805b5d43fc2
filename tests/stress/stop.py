"""Training runs on several ranks that are asked to stop (SIGTERM) must save and end in time, all with exit status 0.

    python tests/stress/stop.py --count 20 --seed 0

Runs of both stages by turns are started on two gloo ranks; at a random time in its steps one of them gets the signal,
or all of them do, as from a scheduler. Printed is the time from the signal to the end of the last rank: the rest of the
step, saving, and the end of the process group. Exit status 1 where one takes more than 10 s, where a rank ends with
another status than 0, and where the one checkpoint is not of the step after which the run says it stopped.
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent))

from runs import Run, prepare, ranks

from published.loading import checkpoint_folders
from trainer.log import read_log

SECONDS = 10.0  # from the signal to the end, at most
STARTING, GIVEN_UP = 300.0, 60.0


def stopped(stage: str, out: Path, arguments: list[str], rng: Random, count: int) -> tuple[float, str]:
    """One run: seconds from the signal to the end, and what is wrong, if anything."""
    own = ["--steps", "10000", "--save-every", "10000", "--log-every", "1", "--workers", rng.choice("01")]
    processes = [Run(stage, out, [*arguments, *own], environment) for environment in ranks(count)]
    until = time.monotonic() + STARTING
    while not read_log(out / "log.jsonl") and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 2))
    asked = rng.choice([*([process] for process in processes), processes])
    start, statuses = time.monotonic(), [None] * count
    for process in asked:
        os.kill(process.pid, signal.SIGTERM)
    while None in statuses and time.monotonic() < start + GIVEN_UP:
        for i, process in enumerate(processes):
            statuses[i] = process.status() if statuses[i] is None else statuses[i]
        time.sleep(0.005)
    seconds = time.monotonic() - start
    for process, status in zip(processes, statuses, strict=True):
        if status is None:
            process.kill()
        process.close()
    if any(statuses) or None in statuses:
        return seconds, f"exit statuses {statuses}: {(out / 'printed-0').read_text()[-1500:]}"
    said = re.search(r"stopped after step (\d+) of", (out / "printed-0").read_text())
    saved = [folder.name for folder in checkpoint_folders(out)]
    if not said or saved != [f"step-{int(said[1]):08d}"]:
        return seconds, f"said {said and said[0]!r}, saved {saved}"
    return seconds, "" if seconds < SECONDS else "too late"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="runs in all")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, times, good = Random(args.seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        arguments = prepare(Path(folder))
        for i in range(args.count):
            stage = list(arguments)[i % 2]
            seconds, wrong = stopped(stage, Path(folder) / f"run-{i}", arguments[stage], rng, args.ranks)
            times.append(seconds)
            good += not wrong
            print(f"{stage}, run {i + 1}: {seconds:.2f} s {wrong}", flush=True)
    print(f"{good} of {args.count} runs end with status 0 on all {args.ranks} ranks, {max(times):.2f} s at most")
    sys.exit(good < args.count)


if __name__ == "__main__":
    main()
