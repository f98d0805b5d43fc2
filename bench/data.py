"""Reading and decoding: pictures a second through tars/'s batches against a plain loop of Pillow over the same bytes.

    python bench/data.py                                    # random pictures, as large as CC3M's
    python bench/data.py --data cc3m-train-0000.tar         # a real tar
    python bench/data.py --workers 0 4

| row                | what is done with a picture                                                              |
| ------------------ | ---------------------------------------------------------------------------------------- |
| decode             | read from the tar, decoded to RGB                                                        |
| decode and resize  | the same, then padded to a square, 512 x 512, a tensor of bytes, as training takes it   |

The loop has all bytes in memory and does nothing but the row's work; the pipeline finds them in the tar in random
order, reads captions, skips broken samples and stacks batches. Without workers both run on one core. With workers the
clock is the wall's, and prefetched batches are used up before it starts. A webdataset pipeline takes part where that
package can be imported.
"""

import importlib
import io
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: not bench/, whose sample.py would hide the product's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from bench.common import CLOCKS, Report, in_turn, parser, rows_of, start
from common.cli import read_arguments, run
from common.images import preprocess_output
from tars.batches import Batches, PairData

BATCH = 8


def write_tar(path: Path, pairs: int, width: int = 640, height: int = 480) -> Path:
    """Smooth random pictures with some grain, about 100 KB each as CC3M's are, and captions."""
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(pairs):
            coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
            picture = (smooth + random.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
            content = io.BytesIO()
            Image.fromarray(picture).save(content, "JPEG", quality=85)
            for name, data in ((f"{i:08}.jpg", content.getvalue()), (f"{i:08}.txt", b"a picture of something")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def pictures_in(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        return [tar.extractfile(m).read() for m in tar if m.name.endswith((".jpg", ".jpeg", ".png", ".webp"))]


def decoded(image: Image.Image) -> torch.Tensor:
    """A picture is decoded when its pixels are asked for; nothing else is done with it."""
    image.load()
    return torch.zeros(())


WORK = {"decode": decoded, "decode and resize": partial(preprocess_output, size=512)}


def plain_loop(contents: list[bytes], work: Callable, clock: str) -> float:
    """Seconds a picture."""
    begin = CLOCKS[clock]()
    for content in contents:
        work(Image.open(io.BytesIO(content)).convert("RGB"))
    return (CLOCKS[clock]() - begin) / len(contents)


def through(batches: Iterator, workers: int, clock: str, pictures: int) -> float:
    """Seconds a picture of endless batches, once those that the workers prefetched are used up."""
    for _ in range(2 * workers + 1):
        next(batches)
    number = -(-pictures // BATCH)
    begin = CLOCKS[clock]()
    for _ in range(number):
        next(batches)
    return (CLOCKS[clock]() - begin) / (number * BATCH)


def webdataset_batches(webdataset, tar: Path, work: Callable, workers: int) -> Iterator:
    urls = [str(tar)] * max(workers, 1)  # a tar is one worker's: each gets the whole
    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).repeat().shuffle(100)
    data = data.decode("pil").to_tuple("jpg;png;jpeg;webp", "txt").map_tuple(work, str)
    return iter(DataLoader(data.batched(BATCH), batch_size=None, num_workers=workers))


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, (), rounds=5)
    options.add_argument("--data", type=Path, help="a tar of pairs; default: one of random pictures")
    options.add_argument("--pictures", type=int, default=128, help="pictures of one timing")
    options.add_argument("--workers", nargs="+", type=int, default=(0, 1, 2), help="processes; 0: none")
    args = read_arguments(options, argv)
    if args.pictures < 1 or min(args.workers) < 0:
        options.error("--pictures is at least 1, --workers at least 0")
    device, _ = start(args)
    report = Report("data", args, device)
    try:
        webdataset = importlib.import_module("webdataset")
    except ImportError:
        webdataset = None
        report.leave_out("webdataset, which is not installed")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        tar = args.data or write_tar(Path(folder) / "pairs.tar", args.pictures)
        contents = pictures_in(tar)[: args.pictures]
        for what, work in WORK.items():
            measure(report, what, work, tar, contents, webdataset, args)


def measure(report: Report, what: str, work: Callable, tar: Path, contents: list[bytes], webdataset, args) -> None:
    kilobytes = round(sum(map(len, contents)) / len(contents) / 1000)
    more = {"work": 1, "unit": "pictures/s", "batch": BATCH, "kilobytes": kilobytes}
    ours = {workers: Batches(PairData([str(tar)], work), BATCH, workers=workers) for workers in args.workers}
    for workers, batches in ours.items():
        clock = "wall" if workers else args.clock
        timers = {"ours": partial(through, batches, workers, clock, len(contents))}
        if workers == 0:
            timers["Pillow loop"] = partial(plain_loop, contents, work, clock)
        elif workers > 1 and 1 in ours:
            timers["ours, 1 worker"] = partial(through, ours[1], 1, clock, len(contents))
        if webdataset:
            peer = webdataset_batches(webdataset, tar, work, workers)
            timers["webdataset"] = partial(through, peer, workers, clock, len(contents))
        if len(timers) > 1:
            report.add(rows_of(what, f"{workers} workers", in_turn(timers, args.rounds), **more))
    for batches in ours.values():
        batches.close()


if __name__ == "__main__":
    run(main)
