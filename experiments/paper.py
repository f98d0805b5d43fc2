"""The paper's experiments, in the miniature's drawn world or on real data: runs what is missing, then writes a report.

    python experiments/paper.py                                # all tables and figures, three seeds, two jobs at a time
    python experiments/paper.py --only table6 figure7          # of these what is missing
    python experiments/paper.py --list                         # what would run, in order
    python experiments/paper.py --report-only                  # write the report from what there is
    python experiments/paper.py --steps 40 --n 12 --seeds 0 --out runs/small --report runs/small/report
    python experiments/paper.py --data DIR --weights weights --out runs/real --report runs/real/report --clip ... --list

DIR has the user's tars: pairs.tar, stories.tar and dialogues.tar to train on, pairs-test.tar and so on to test on, or
folders of tars of these names; and captions.jsonl and captions-test.jsonl, what the dialogues' pictures show, for
Divter. What needs one that is not there is left out. The sizes are then the paper's, unless others are given.

Every training and scoring is a command of this repository (systems.py has the list). A job is finished when its last
file is there, and files are written under other names first; so after Ctrl-C, a kill or a crash the same command goes
on where it was. A job that fails is named, what needs it is left out, and all else is run. In OUT:

    data/ runs/ answers/ scores/     drawn tars, trainings, what the systems answered, figures
    study/                           on real data: pages on which people compare (Table 4)
    logs/ times.jsonl                what each job printed; its seconds
    settings.json                    budget and weights: going on with others is an error
"""

import argparse
import fcntl
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import add_weights_option, make_folder, read_arguments, run
from common.files import fingerprint, read_json, write_json
from experiments.report import write_report
from experiments.systems import PAPER_SIZES, PARTS, SIZES, Job, Options, data_that_lack, plan
from trainer.log import append_log
from trainer.processes import stop_signals

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
NETWORKS = ("inception", "clip", "hps", "sbert", "meteor")
WAIT = 0.2  # seconds between looks at the running jobs


def check_settings(options: Options) -> None:
    """ValueError where OUT holds jobs of another budget or of other weights."""
    files = [path for path in options.weights.rglob("*") if path.is_file()]
    # No experiment starts from the checkpoints that are there, but all take the options in minigpt5/config.json.
    checkpoints = "minigpt5", "smollm2"
    files = sorted(path for path in files if path.parent.name not in checkpoints or path.name == "config.json")
    now = {name: value for name, value in asdict(options).items() if name in SIZES}
    now |= {"weights": fingerprint(files), "networks": list(options.networks), "data": str(options.data or "drawn")}
    path = options.out / "settings.json"
    there = read_json(path) if path.is_file() else now
    other = [f"{name} {there.get(name)}, not {value}" for name, value in now.items() if there.get(name) != value]
    if other:
        raise ValueError(f"{options.out} holds experiments with {'; '.join(other)}: name another --out")
    write_json(path, now)


@contextmanager
def alone(out: Path) -> Iterator[int]:
    """A lock, to be passed on to the jobs: what outlives a runner that was killed still holds it. ValueError where
    another process works in `out`."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{out}: another process runs experiments there, or a job of one that was killed"
            ) from None
        yield file.fileno()


def start(job: Job, command: int, log: Path, threads: int, lock: int) -> subprocess.Popen:
    """In a session of its own: a Ctrl-C in the terminal reaches the runner alone, which then asks the jobs to stop."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    line = [sys.executable, *job.commands[command]]
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(line[1:])}\n")
        file.flush()
        options = {"stdout": file, "stderr": file, "start_new_session": True, "pass_fds": [lock]}
        return subprocess.Popen(line, cwd=ROOT, env=environment, **options)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].rpartition("\r")[2] if lines else ""


def work(jobs: dict[str, Job], out: Path, at_a_time: int, lock: int) -> tuple[list[str], bool]:
    """Run the jobs that are not done; returns the names of those that failed, and whether all was stopped by a signal.
    `jobs` are in an order in which they can be run."""
    threads = max(1, (os.cpu_count() or 1) // at_a_time)
    waiting = [name for name, job in jobs.items() if not job.done.exists()]
    total, failed, running = len(waiting), [], {}  # running: name -> (process, which of its commands, when it began)
    logs = {name: out / "logs" / f"{name.replace('/', '-')}.txt" for name in waiting}
    print(f"{len(jobs) - total} of {len(jobs)} jobs are done", flush=True)

    def launch(name: str, command: int, begun: float) -> None:
        running[name] = (start(jobs[name], command, logs[name], threads, lock), command, begun)

    with stop_signals() as asked:
        while running or (waiting and not asked):
            ready = [n for n in waiting if all(jobs[need].done.exists() for need in jobs[n].needs)]
            for name in ready[: 0 if asked else at_a_time - len(running)]:
                waiting.remove(name)
                launch(name, 0, time.time())
            if not running:  # what is left needs something that failed
                break
            time.sleep(WAIT)
            for name, (process, command, begun) in list(running.items()):
                if asked and process.poll() is None:
                    process.terminate()  # a training saves and ends; repeated signals do no harm
                    time.sleep(WAIT)
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode == 0 and not asked and command + 1 < len(jobs[name].commands):
                    launch(name, command + 1, begun)
                elif process.returncode == 0 and jobs[name].done.exists():
                    seconds = round(time.time() - begun, 1)
                    append_log(out / "times.jsonl", {"job": name, "seconds": seconds})
                    left = len(waiting) + len(running)
                    print(f"{name}: {seconds:g} s, {left} of {total} jobs left", flush=True)
                elif not asked:
                    failed.append(name)
                    print(f"{name}: failed, see {logs[name]}: {last_line(logs[name])}", flush=True)
    for name in [] if asked else waiting:
        print(f"{name}: left out, it needs what failed")
    return failed + ([] if asked else waiting), bool(asked)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/paper"), help="folder of all jobs")
    add("--report", type=Path, default=ROOT / "experiments" / "report", metavar="DIR", help="folder of the report")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--seeds", nargs="+", type=int, default=list(SEEDS), help="of trainings and answers; a claim needs two or more")
    add("--data", type=Path, metavar="DIR", help="the user's tars, in the place of the drawn world")
    for name, about in (
        ("steps", "of each training of stage 1; systems.py has the others' share"),
        ("batch_size", "of stage 1; systems.py has stage 2's"),
        ("n", "test pairs, stories' steps or dialogues' turns of a scoring; with --data 0: all"),
        ("samples", "drawn training pairs; a quarter of stories and of dialogues"),
        ("denoise", "denoising steps of a picture"),
    ):
        about += f"; default: {getattr(Options, name)}, with --data {PAPER_SIZES[name]}"
        add(f"--{name.replace('_', '-')}", type=int, help=about)
    add("--jobs", type=int, default=2, help="processes at a time, which share the cores")
    add_weights_option(parser)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    for name in NETWORKS:
        add(f"--{name}", type=Path, metavar="PATH", help="as evaluation's; without it the miniature's own, or none")
    add("--list", action="store_true", help="print the jobs that are missing, run none")
    add("--report-only", action="store_true", help="run none")
    args = read_arguments(parser)
    for name in SIZES:
        if getattr(args, name) is None:
            setattr(args, name, PAPER_SIZES[name] if args.data else getattr(Options, name))
    least = dict.fromkeys(SIZES, 1) | ({"n": 0, "samples": 0} if args.data else {"n": 2})
    wrong = [name for name in SIZES if getattr(args, name) < least[name]]
    if wrong or args.n == 1 or args.jobs < 1 or min(args.seeds) < 0:
        parser.error("--n is at least 2, seeds are at least 0, all other numbers at least 1")
    if args.data and not args.data.is_dir():
        parser.error(f"--data {args.data}: no such folder")
    return args


def main() -> None:
    args = arguments()
    out, weights, seeds = args.out.resolve(), args.weights.resolve(), sorted(set(args.seeds))
    paths = {name: getattr(args, name) for name in NETWORKS}
    networks = tuple(word for name, path in paths.items() if path for word in (f"--{name}", str(path.resolve())))
    sizes = {name: getattr(args, name) for name in SIZES}
    data = args.data.resolve() if args.data else None
    options = Options(out, weights, device=args.device, networks=networks, data=data, **sizes)
    for path in data_that_lack(options):
        print(f"{path}: not there, so what needs it is left out")
    jobs = plan(options, seeds, args.only)
    if args.list:
        for name, job in jobs.items():
            if not job.done.exists():
                print(f"{name}:", *(f"python {shlex.join(command)}" for command in job.commands), sep="\n    ")
        return
    for name in (".", "data", "scores", "logs"):
        make_folder(out / name)
    failed, stopped = [], False
    with alone(out) as lock:
        check_settings(options)
        if not args.report_only:
            failed, stopped = work(jobs, out, args.jobs, lock)
        if stopped:
            print(f"stopped; to go on: python {shlex.join(sys.argv)}")
            return
        write_report(options, seeds, make_folder(args.report))
    print(f"see {args.report / 'README.md'}")
    if failed:
        raise ValueError(f"{len(failed)} jobs did not finish, {failed[0]} the first of them; the report has gaps")


if __name__ == "__main__":
    run(main)
