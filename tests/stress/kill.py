"""Training runs that are killed (SIGKILL) again and again must end as if nothing had happened, bit for bit.

    python tests/stress/kill.py --count 100 --seed 0

A whole run of each stage comes first. Then runs of the same arguments, of both stages by turns: each is killed a few
times, half of them at a random time of its life and half soon after it began to save a checkpoint, and resumed each
time, with or without a process that reads pictures. After a kill no checkpoint that was saved is missing, and each is
the whole run's of that step; in the end the log, the weights, the moments and the position in the data are the whole
run's. Ends with exit status 1 at the first run of which this is not true.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent))

from runs import SCRIPTS, Run, prepare

from published.loading import checkpoint_folders
from trainer import checkpoint
from trainer.log import read_log

LIMIT = 600.0  # seconds after which a run that should end by itself is given up
KILLS = range(2, 8)  # of one run
SAVE_EVERY = 2
OPTIONS = ["--save-every", str(SAVE_EVERY), "--log-every", "3", "--resume"]


@dataclass
class Whole:
    """A run without a kill: its log and checkpoints, the seconds that it takes, and those of its slowest saving."""

    log: list[dict]
    checkpoints: dict[str, dict]
    seconds: float
    saving: float


def contents(folder: Path) -> dict:
    """A checkpoint: all bytes of weights and moments, what their headers say (which safetensors writes in any order),
    and the state but for the command's arguments."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    del state["arguments"]
    content = {"state": state}
    for file in folder.glob("*.safetensors"):
        whole = file.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        content[file.name] = json.loads(whole[8:end]), whole[end:]
    return content


def log_of(out: Path) -> list[dict]:
    changing = ("samples_per_s", "memory_gb")
    return [{k: v for k, v in record.items() if k not in changing} for record in read_log(out / "log.jsonl")]


def live(run: Run, seconds: float = LIMIT, saves: int = 0) -> tuple[int, list[tuple[str, float]]]:
    """Kill the run `seconds` after it began to save for the `saves`-th time (0: after its start), unless it has ended
    before. Its exit status; what it told of its saving, and when."""
    told, start = [], time.monotonic()
    clock = start
    while (status := run.status()) is None:
        now = time.monotonic()
        told += [(letter, now) for letter in run.saved()]
        if sum(letter == "b" for letter, _ in told) < saves:
            clock = now
        if now >= min(clock + seconds, start + LIMIT):
            status = run.kill()
            break
        time.sleep(0.002)
    told += [(letter, time.monotonic()) for letter in run.saved()]
    run.close()
    return status, told


def whole_run(stage: str, out: Path, arguments: list[str]) -> Whole:
    start, kept, checkpoint.MAX_CHECKPOINTS = time.monotonic(), checkpoint.MAX_CHECKPOINTS, 1000
    run = Run(stage, out, [*arguments, "--workers", "0"])
    checkpoint.MAX_CHECKPOINTS = kept
    status, told = live(run)
    seconds = time.monotonic() - start
    if status:
        sys.exit(f"{stage}: the whole run ends with {status}: {printed(out)}")
    saving = max(end - begin for (_, begin), (_, end) in zip(told[::2], told[1::2], strict=True))
    return Whole(log_of(out), {folder.name: contents(folder) for folder in checkpoint_folders(out)}, seconds, saving)


def killed_run(
    stage: str, out: Path, arguments: list[str], whole: Whole, most: int, rng: Random
) -> tuple[Counter, list[str]]:
    """Kill a run `most` times, or until it ends before it is killed; then let it end. What it was doing at the kills,
    and what is wrong."""
    kills, saved = Counter(), 0
    while True:
        run = Run(stage, out, [*arguments, "--workers", rng.choice("0001")])
        last = kills.total() == most
        if last:
            status, told = live(run)
        elif rng.random() < 0.5:
            status, told = live(run, rng.uniform(0, whole.saving), saves=rng.choice((1, 2)))
        else:
            status, told = live(run, rng.uniform(0, 0.5 * whole.seconds))
        letters = Counter(letter for letter, _ in told)
        ended = last or status != -signal.SIGKILL
        folders = checkpoint_folders(out)
        newest = int(folders[0].name.removeprefix("step-")) if folders else 0
        wrong = [f"ends with {status}"] if ended and status else differences(out, whole, ended)
        if not saved + SAVE_EVERY * letters["e"] <= newest <= saved + SAVE_EVERY * letters["b"]:
            wrong.append(f"newest checkpoint of step {newest}, before of {saved}, and saving {dict(letters)} since")
        if ended or wrong:
            return kills, wrong
        kills["saving" if letters["b"] > letters["e"] else "working"] += 1
        saved = newest


def differences(out: Path, whole: Whole, ended: bool) -> list[str]:
    """What of a run's folder is not the whole run's."""
    folders, wrong = checkpoint_folders(out), []
    for folder in folders:
        expected = whole.checkpoints.get(folder.name, {})
        try:
            ours = contents(folder)
        except (OSError, ValueError) as error:  # of half a one
            wrong.append(f"{folder.name}: {error}")
            continue
        wrong += [f"{folder.name}: {name}" for name in {**ours, **expected} if ours.get(name) != expected.get(name)]
    if ended:
        wrong += ["the log"] if log_of(out) != whole.log else []
        wrong += [] if folders and folders[0].name == max(whole.checkpoints) else ["the last checkpoint is missing"]
        wrong += [f"{path.name} is left" for path in out.glob(".*")]
    return wrong


def printed(out: Path) -> str:
    return (out / "printed-0").read_text(encoding="utf-8")[-2000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="kills in all")
    parser.add_argument("--stage", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="by turns")
    parser.add_argument("--steps", type=int, default=12, help="of each run; a checkpoint every 2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, start, kills, runs, wrong = Random(args.seed), time.monotonic(), Counter(), 0, []
    with tempfile.TemporaryDirectory() as folder:
        prepared, options = prepare(Path(folder)), [*OPTIONS, "--steps", str(args.steps)]
        arguments = {stage: [*prepared[stage], *options] for stage in args.stage}
        whole = {stage: whole_run(stage, Path(folder) / stage, own) for stage, own in arguments.items()}
        for stage, run in whole.items():
            print(f"{stage}: a whole run takes {run.seconds:.1f} s, a checkpoint {run.saving:.3f} s at most")
        while not wrong and kills.total() < args.count:
            stage, out = args.stage[runs % len(args.stage)], Path(folder) / f"run-{runs}"
            most = min(rng.choice(KILLS), args.count - kills.total())
            own, wrong = killed_run(stage, out, arguments[stage], whole[stage], most, rng)
            runs, kills = runs + 1, kills + own
            result = f"{', '.join(wrong)}\n{printed(out)}" if wrong else "then the whole run's end"
            print(f"{stage}, run {runs}: {own.total()} kills, {result}", flush=True)
    how = f"{kills.total()} kills, {kills['saving']} of them while saving, {time.monotonic() - start:.0f} s"
    print(f"{how}: {runs - bool(wrong)} of {runs} runs end bit-identical")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
