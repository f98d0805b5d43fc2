"""Bad input into MiniGPT-5's own readers: none may end in a traceback, hang, fill the memory or give a wrong result.

    python tests/stress/fuzz.py --count 10000 --seed 0
    python tests/stress/fuzz.py --family tars pictures --count 500
    python tests/stress/fuzz.py --family tars --only 123         # one input again, with the traceback if there is one

Input n of a family is a function of (family, seed, n). It ends in one of

    used       read whole, and what was read is right as far as can be told
    skipped    what is bad in it was counted and left out, or a note says what is missing
    refused    one clear line (ValueError, WeightsError, ImageError) that names the file
    failed     traceback: any other exception; unclear: an error of several lines, or one that does not name the file;
               hang: over 10 s of computing, so that a busy machine does not count, or a minute of waiting;
               memory: over 1 GiB more than before; crash: the process ended; wrong: a result that is not right,
               without a word

Each family runs in a process of its own, which is started again after a crash. Exit status 1 if anything failed.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from data_families import DATA_FAMILIES, Wrong
from run_families import RUN_FAMILIES
from weight_families import WEIGHT_FAMILIES

from common.images import ImageError
from published.loading import WeightsError

SECONDS, WAITING, BYTES = 10.0, 60.0, 1 << 30  # bounds for one input: of computing, with waiting, of memory
FAMILIES = DATA_FAMILIES | WEIGHT_FAMILIES | RUN_FAMILIES
GOOD, BAD = ("used", "skipped", "refused"), ("traceback", "unclear", "hang", "memory", "crash", "wrong")


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for a broken file."""


def on_alarm(*_) -> None:
    raise Hang


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is no such file."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        return next((1024 * int(line.split()[1]) for line in file if line.startswith(field + ":")), 0)
    return 0


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM to VmRSS


def set_alarms(seconds: float, waiting: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, waiting)


def attempt(family: str, seed: int, number: int, folder: Path, limited: bool = True) -> dict:
    """Read input `number`: {"outcome", "message", "bytes": memory it took at most, "seconds", "what": is wrong}."""
    cases, read = FAMILIES[family]
    what = cases[number % len(cases)]
    forget_peak()
    before, start, text = memory("VmRSS"), time.process_time(), ""
    set_alarms(SECONDS * limited, WAITING * limited)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            outcome, text = read(what, Random(f"{family} {seed} {number}"), folder), ""
    except Wrong as error:
        outcome, text = "wrong", str(error)
    except Hang:
        outcome, text = "hang", traceback.format_exc()
    except MemoryError:
        outcome, text = "memory", traceback.format_exc()
    except Exception as error:
        outcome, text = judged(error, folder), traceback.format_exc()
        if outcome == "refused" and what.endswith("nothing"):
            outcome = "wrong"  # nothing is bad in it
    finally:
        set_alarms(0, 0)
    used, seconds = max(0, memory("VmHWM") - before), time.process_time() - start
    if used > BYTES and outcome in GOOD:
        outcome, text = "memory", f"{used / 1e9:.1f} GB"
    return {"number": number, "what": what, "outcome": outcome, "message": text, "bytes": used, "seconds": seconds}


def judged(error: Exception, folder: Path) -> str:
    if type(error) not in (ValueError, WeightsError, ImageError):
        return "traceback"
    message = str(error)
    named = str(folder) in message or isinstance(error, ImageError)
    return "refused" if named and "\n" not in message and len(message) < 600 else "unclear"


def work(family: str, seed: int, numbers: Iterable[int], pipe) -> None:
    """In a process of its own: read the inputs, tell of each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, on_alarm)
    signal.signal(signal.SIGPROF, on_alarm)
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        for number in numbers:
            place = Path(folder) / "input"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            if number == numbers[0]:
                attempt(family, seed, 0, place, limited=False)  # what is made once is no input's time and memory
                virtual = memory("VmSize") + 8 * BYTES
                resource.setrlimit(resource.RLIMIT_AS, (virtual, virtual))  # rather than take all that the machine has
                shutil.rmtree(place)
                place.mkdir()
            pipe.send(attempt(family, seed, number, place))
    pipe.close()


def run_family(family: str, seed: int, numbers: range) -> Iterable[dict]:
    """Results in order; a process that died or does not answer is replaced."""
    context = multiprocessing.get_context("fork")
    while numbers:
        pipe, end = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(family, seed, numbers, end), daemon=True)
        process.start()
        end.close()
        try:
            while numbers:
                if not pipe.poll(5 * WAITING):  # Python is not reached by the alarm
                    yield lost(family, numbers[0], "hang")
                    break
                yield pipe.recv()
                numbers = numbers[1:]
        except EOFError:
            yield lost(family, numbers[0], "crash")
        if numbers:
            process.kill()
            numbers = numbers[1:]
        process.join()


def lost(family: str, number: int, outcome: str) -> dict:
    cases = FAMILIES[family][0]
    return {
        "number": number,
        "what": cases[number % len(cases)],
        "outcome": outcome,
        "message": "",
        "bytes": 0,
        "seconds": 0,
    }


def fuzz(families: list[str], count: int, seed: int, only: int | None = None) -> list[tuple[str, dict]]:
    """Run `count` inputs, shared among the families; print failures as they come and the table; return the failures."""
    counts, most, failures = {}, {}, []
    for i, family in enumerate(families):
        share = range(count * i // len(families), count * (i + 1) // len(families))
        numbers = range(len(share)) if only is None else range(only, only + 1)
        counts[family], most[family], start = Counter(), [0, 0.0], time.perf_counter()
        for result in run_family(family, seed, numbers):
            counts[family][result["outcome"]] += 1
            most[family] = [max(most[family][0], result["bytes"]), max(most[family][1], result["seconds"])]
            if result["outcome"] in BAD:
                failures.append((family, result))
                what = f"{result['what']}, --family {family} --seed {seed} --only {result['number']}"
                print(f"{result['outcome']}: {what}: {last_line(result['message'])}", flush=True)
            if only is not None:
                print(json.dumps({**result, "message": None}), result["message"], sep="\n")
        most[family].append(time.perf_counter() - start)
    print(table(counts, most))
    return failures


def last_line(message: str) -> str:
    return message.strip().splitlines()[-1][:300] if message.strip() else ""


def table(counts: dict[str, Counter], most: dict[str, list]) -> str:
    kinds = [*GOOD, *BAD]
    rows = [("family", "inputs", *kinds, "peak MB", "longest s", "in all s")]
    for family, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        of = most.get(family) or [max(column) for column in zip(*most.values(), strict=True)]
        figures = f"{of[0] / 1e6:.0f}", f"{of[1]:.1f}", f"{of[2]:.0f}"
        rows.append((family, f"{count.total():,}", *(f"{count[kind]:,}" for kind in kinds), *figures))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--only", type=int, help="this input of each family alone, and what came of it")
    args = parser.parse_args()
    failures = fuzz(args.family, args.count, args.seed, args.only)
    print(f"{len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
