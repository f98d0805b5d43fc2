"""Samples into a tar, and a report that counts every sample of the source once: as kept (perhaps cut short) or as
dropped, and why. datasets.py and precompute.py make the samples."""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common.files import atomic_write, remove_unfinished
from tars.batches import describe


class Sample(NamedTuple):
    """What the tar holds of one sample of the source."""

    members: list[tuple[str, bytes]]  # name, content
    counts: dict[str, int]  # what it adds to the report


class Report(NamedTuple):
    kept: Counter  # how many of each unit (pairs, pictures ...) the tar holds
    dropped: Counter  # how many samples are left out, by the reason

    def __str__(self) -> str:
        kept = ", ".join(f"{count:,} {what}" for what, count in self.kept.items())
        return f"kept: {kept or 'none'}\ndropped: {describe(self.dropped)}"


def write_samples(samples: Iterable[Sample | str], out: Path, total: int | None = None) -> Report:
    """Write the tar `out`, which is there whole or not at all. A str in place of a sample is the reason why it is
    dropped. ValueError where nothing is kept."""
    report = Report(Counter(), Counter())
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out}: " + ("a folder" if out.is_dir() else f"no folder {out.parent}"))
    remove_unfinished(out.parent, re.escape(out.name))
    with atomic_write(out) as temporary, tarfile.open(temporary, "w") as tar:
        for sample in tqdm(samples, total=total, unit=" samples", delay=2, leave=False):
            if isinstance(sample, str):
                report.dropped[sample] += 1
                continue
            report.kept.update(sample.counts)
            for name, content in sample.members:
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
            tar.members.clear()  # tarfile would collect them all
        if not report.kept:
            raise ValueError(f"nothing to keep, {out} not written; dropped: {describe(report.dropped)}")
    return report
