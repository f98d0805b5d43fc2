"""How tars/ bears CC3M's real size: as many tars and pairs, with pictures so tiny that no download is needed.

    python bench/scale.py                                     # 576 tars, 2,905,954 pairs: 6 GB in a temporary folder
    python bench/scale.py --tars 58 --pairs 290595            # a tenth of it
    python bench/scale.py --tars 4 --pairs 2000 --ranks 2 --workers 1

| row               | what is measured                                                                         |
| ----------------- | ---------------------------------------------------------------------------------------- |
| index             | all tars are scanned for the first time, one after the other                             |
| open              | the same data with the cached indices, as every later start has them                     |
| order             | one epoch's permutation is drawn                                                         |
| resume            | a new process opens the data, goes on at pair --resume-at and has its first batch        |
| reader            | pairs that one process reads in random order, their 8 x 8 pixels decoded                 |
| ranks and workers | --ranks processes start at once, each with --workers readers, until all have a batch     |

Each row runs in a process of its own, forked from one that has imported torch. Memory (MB) is what such a process has
beyond that, at its worst. Workers share their rank's, so of a worker only what it shares with no other counts. CPU
seconds are those of the process alone, about what an idle machine would take. The tars were written just before, so
they are read from the page cache: the time of a disk comes on top. Goals are for CC3M's size; a smaller run shows them
and does not judge them.
"""

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

if __package__ in (None, ""):  # run as a script: not bench/, whose data.py and sample.py would hide the product's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image

from bench.common import hardware, resident
from common.cli import make_folder, read_arguments, run
from common.files import write_json, write_text
from tars.batches import Batches, PairData, epoch_order

TARS, PAIRS = 576, 2_905_954  # of pixparse/cc3m-wds, its training part
BLOCK = 512  # bytes: a tar is made of such blocks
CAPTION = b"a very typical picture of something"
BATCH = 8
# (row, figure): the most that it may be at CC3M's size. CPU seconds are those of an idle machine.
GOALS = {("index", "CPU seconds"): 600.0, ("resume", "CPU seconds"): 5.0}
GOALS |= {(row, "MB"): 300.0 for row in ("open", "resume", "ranks and workers")}


# ---- tars


def tar_header(name: bytes, size: int) -> np.ndarray:
    """(512,) bytes of a ustar header whose checksum is still missing."""
    fields = (name.ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size, b"%011o\0" % 0)
    header = b"".join(fields) + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000"
    return np.frombuffer(header.ljust(BLOCK, b"\0"), np.uint8)


def pair_template() -> np.ndarray:
    """(4, 512) bytes: header and content of a picture, header and content of its caption, with keys of nine zeros."""
    picture = BytesIO()
    Image.new("RGB", (8, 8), "orange").save(picture, "PNG")
    blocks = []
    for ending, content in ((b"png", picture.getvalue()), (b"txt", CAPTION)):
        assert len(content) <= BLOCK
        blocks += [tar_header(b"000000000." + ending, len(content))]
        blocks += [np.frombuffer(content.ljust(BLOCK, b"\0"), np.uint8)]
    return np.stack(blocks)


def tar_bytes(first: int, pairs: int, template: np.ndarray) -> np.ndarray:
    """A whole tar of pairs whose keys are first, first + 1, ... It is assembled for all pairs at once: tarfile would
    take minutes for millions of members."""
    digits = (np.arange(first, first + pairs)[:, None] // 10 ** np.arange(8, -1, -1)) % 10  # (n, 9)
    blocks = np.repeat(template[None], pairs, axis=0)  # (n, 4, 512)
    for header in (0, 2):
        blocks[:, header, :9] += digits.astype(np.uint8)
        total = int(template[header].sum(dtype=np.int64)) + digits.sum(1)  # with spaces in the checksum's place
        octal = (total[:, None] // 8 ** np.arange(5, -1, -1)) % 8
        blocks[:, header, 148:154] = ord("0") + octal
        blocks[:, header, 154:156] = 0, ord(" ")
    return np.concatenate([blocks.reshape(-1), np.zeros(2 * BLOCK, np.uint8)])


def write_tars(folder: Path, tars: int, pairs: int) -> list[str]:
    paths, first, template = [], 0, pair_template()
    for i in range(tars):
        own = pairs // tars + (i < pairs % tars)
        path = folder / f"scale-{i:04}.tar"
        tar_bytes(first, own, template).tofile(path)
        paths, first = [*paths, str(path)], first + own
    return paths


# ---- measuring


def private_megabytes(process: int) -> float:
    """What a process shares with no other. Its parent's memory counts as soon as it is written to."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6


def answer(pipe, function: Callable[..., dict], arguments: tuple) -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts anew
        before, begin, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        own = function(*arguments)
        figures = {"seconds": time.perf_counter() - begin, "CPU seconds": time.process_time() - cpu}
        figures |= {"MB": 1000 * (resident("VmHWM") - before)} | own
        pipe.send(figures)
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


def start_apart(function: Callable[..., dict], *arguments) -> tuple:
    """Run `function` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    return process, receiver


def result_of(process, receiver) -> dict:
    """The figures of `function`, with its seconds and its peak memory in MB. ValueError where it failed."""
    try:
        figures = receiver.recv()
    except EOFError:
        figures = "the process ended without an answer"
    process.join()
    if isinstance(figures, str):
        raise ValueError(f"a measured process failed: {figures.strip().splitlines()[-1]}")
    return figures


def apart(function: Callable[..., dict], *arguments) -> dict:
    return result_of(*start_apart(function, *arguments))


# ---- what is measured


def pixels_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture))


def open_data(paths: list[str]) -> PairData:
    return PairData(paths, pixels_of)


def open_once(paths: list[str]) -> dict:
    return {"pairs": len(open_data(paths))}


def draw_order(pairs: int) -> dict:
    epoch_order(pairs, 0, 0)
    return {}


def resume(paths: list[str], pair: int) -> dict:
    batches = Batches(open_data(paths), BATCH)
    batches.load_state_dict(batches.state_dict() | {"position": pair})
    assert len(next(batches)["keys"]) == BATCH
    return {}


def read_on(paths: list[str], pairs: int) -> dict:
    batches, rounds = Batches(open_data(paths), BATCH), -(-pairs // BATCH)
    next(batches)
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        next(batches)
    wall, own = time.perf_counter() - begin, time.process_time() - cpu
    return {"samples/s": rounds * BATCH / wall, "samples per CPU second": rounds * BATCH / own}


def run_rank(paths: list[str], rank: int, ranks: int, workers: int) -> dict:
    """One rank of a training, until its first batch; then the memory of one of its workers."""
    batches = Batches(open_data(paths), BATCH, rank=rank, world_size=ranks, workers=workers)
    next(batches)
    figures = {}
    for process in getattr(batches.loader, "_workers", [])[:1]:
        figures["MB of a worker"] = private_megabytes(process.pid)
    batches.close()
    return figures


def all_ranks(paths: list[str], ranks: int, workers: int) -> dict:
    begin = time.perf_counter()
    started = [start_apart(run_rank, paths, rank, ranks, workers) for rank in range(ranks)]
    figures = [result_of(*process) for process in started]
    worst = {name: max(figure[name] for figure in figures) for name in figures[0]}
    return worst | {"seconds": time.perf_counter() - begin}


# ---- results


def rows_of(row: str, figures: dict, is_full: bool) -> list[dict]:
    rows = []
    for name, value in figures.items():
        if name != "pairs":
            goal = GOALS.get((row, name))
            met = value <= goal if goal is not None and is_full else None
            rows.append({"what": row, "figure": name, "measured": value, "goal": goal, "met": met})
    return rows


def table(record: dict) -> str:
    args, machine = record["arguments"], record["hardware"]
    lines = [
        f"{args['pairs']:,} pairs in {args['tars']:,} tars ({record['gigabytes']:.2f} GB); {machine['cpu']}, "
        f"{machine['cores']} cores, load {machine['load']:.1f} at the start.\n",
        "| what | figure | measured | goal | |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for row in record["rows"]:
        goal = "" if row["goal"] is None else f"{row['goal']:,.0f} at most"
        met = {None: "", True: "met", False: "missed"}[row["met"]]
        value = f"{row['measured']:,.3g}" if row["measured"] < 1000 else f"{row['measured']:,.0f}"
        lines.append("| " + " | ".join([row["what"], row["figure"], value, goal, met]) + " |")
    return "\n".join(lines) + "\n"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tars", type=int, default=TARS, help="number of tars")
    add("--pairs", type=int, default=PAIRS, help="pairs in all of them")
    add("--ranks", type=int, default=8, help="processes of a training")
    add("--workers", type=int, default=4, help="readers of each rank")
    add("--resume-at", type=int, help="pair at which a run is resumed; default: 2,500,000 or as far into the data")
    add("--read", type=int, default=4000, help="pairs that the reader alone reads")
    add("--folder", type=Path, help="where the tars are written for the time of the run; default: a temporary folder")
    add("--out", type=Path, default=Path("out/bench"), help="folder for scale.json and scale.md")
    args = read_arguments(parser, argv)
    if min(args.tars, args.ranks, args.read) < 1 or args.workers < 0:
        parser.error("--tars, --ranks and --read are at least 1, --workers at least 0")
    if not args.tars <= args.pairs <= 10**9:
        parser.error("--pairs is at least one a tar and at most 1,000,000,000")
    if args.resume_at is None:
        args.resume_at = args.pairs * 2_500_000 // PAIRS
    if not 0 <= args.resume_at < args.pairs:
        parser.error("--resume-at is a pair of the data")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    out = make_folder(args.out)
    if args.folder:
        make_folder(args.folder)
    needed, free = 4 * BLOCK * args.pairs * 1.1, shutil.disk_usage(args.folder or tempfile.gettempdir()).free
    if needed > free:
        space = f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"
        raise ValueError(f"the tars take {space}; --folder names another place")
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    record = {"bench": "scale", "hardware": hardware(torch.device("cpu")), "arguments": given, "rows": []}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="scale-", dir=args.folder) as folder:
        begin = time.perf_counter()
        paths = write_tars(Path(folder), args.tars, args.pairs)
        record["gigabytes"] = sum(Path(path).stat().st_size for path in paths) / 1e9
        print(f"{record['gigabytes']:.2f} GB written in {time.perf_counter() - begin:.0f} s", flush=True)
        work = {
            "index": partial(apart, open_once, paths),
            "open": partial(apart, open_once, paths),
            "order": partial(apart, draw_order, args.pairs),
            "resume": partial(apart, resume, paths, args.resume_at),
            "reader": partial(apart, read_on, paths, args.read),
            "ranks and workers": partial(all_ranks, paths, args.ranks, args.workers),
        }
        for row, measure in work.items():
            figures = measure()
            if figures.get("pairs", args.pairs) != args.pairs:
                raise ValueError(f"{row}: found {figures['pairs']:,} pairs")
            record["rows"] += rows_of(row, figures, args.pairs >= PAIRS)
            print(f"{row}: " + ", ".join(f"{value:,.4g} {name}" for name, value in figures.items()), flush=True)
            write_json(out / "scale.json", record)
            write_text(out / "scale.md", table(record))
        record["index_megabytes"] = sum(Path(f"{path}.index.npz").stat().st_size for path in paths) / 1e6
        write_json(out / "scale.json", record)
    print(table(record))


if __name__ == "__main__":
    run(main)
