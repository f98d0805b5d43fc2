"""Where the samples lie in webdataset tars: a tar is indexed once, then its members can be read at random.

Members that share the path up to the last dot are one sample: `KEY.jpg|jpeg|png|webp ...` its picture, `KEY.txt` its
caption, `KEY.json` more about it, `KEY.safetensors` its precomputed tensors (precomputed.py). A story or dialogue has
`KEY.json` with a list of "turns" and the pictures `KEY.0.jpg`, `KEY.1.png` ... KEY may hold dots, too. Only regular
members count, and nothing is ever unpacked to disk.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import atomic_write, fingerprint

HOME = os.path.expanduser("~")  # "~" where there is none
CACHE = Path(tempfile.gettempdir() if HOME == "~" else HOME, ".cache", "minigpt5", "index")  # where tars lie read-only
INDEX_VERSION, STAMP_PAGES = 8, 8
UNDECODABLE = "surrogateescape"  # keeps member names that are not UTF-8 different from each other
MAX_PICTURES = 100  # of a story or dialogue: NAME has numbers of two digits
MAX_HEADER_BYTES, MAX_END_BYTES = 16 << 10, 1 << 20  # of a header that extends the next one; of the zeros at the end


class Member(IntEnum):
    """What a member of a tar is to its sample. The picture KEY.k.jpg is NUMBERED + k."""

    PICTURE, TEXT, JSON, TENSORS, NUMBERED = range(5)


PAIR, STORY, DIALOG = range(3)  # what a sample is; a pair is whatever has no turns
ENDINGS = dict.fromkeys(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"), Member.PICTURE)
ENDINGS |= {"txt": Member.TEXT, "json": Member.JSON, "safetensors": Member.TENSORS}
NAME = re.compile(r"((?:.*/)?[^/.](?:[^/]*?[^/.])??)(?:\.(0|[1-9][0-9]?))?\.([^/.]+)", re.DOTALL)  # key, number, ending
MAX_BYTES = {Member.PICTURE: 64 << 20, Member.TEXT: 64 << 10, Member.JSON: 1 << 20, Member.TENSORS: 128 << 20}
MAX_BYTES[Member.NUMBERED] = MAX_BYTES[Member.PICTURE]  # also that of all members after it


class Unusable(Exception):
    """A member that cannot be used. The only argument is a short reason to count it under."""


def expand(data: list[str]) -> list[str]:
    """What the user names (tars, folders of tars, globs) -> paths of tars in order, each once. ValueError where
    something matches nothing."""
    tars = {}
    for item in data:
        path = Path(os.path.expanduser(item))
        if item and path.is_dir():
            paths = path.glob("[!.]*.tar")  # without macOS's ._x.tar
        else:
            paths = [path] if path.is_file() else map(Path, glob.glob(str(path)))
        paths = sorted(str(tar) for tar in paths if tar.is_file() and tar.suffix != ".npz")  # our indices lie beside
        if not paths:
            raise ValueError(f"{item or 'empty name'}: no such tar, or no tar in this folder or pattern")
        tars |= dict.fromkeys(paths)
    return list(tars)


# ---- headers


def member_of(name: str) -> tuple[str, int] | None:
    """Member name -> (key, member), None for one that is no part of a sample."""
    match = NAME.fullmatch(name)
    if not match or match[3].lower() not in ENDINGS:
        return None
    key, number, member = match[1], match[2], ENDINGS[match[3].lower()]
    if number and member != Member.PICTURE:
        return f"{key}.{number}", member
    return key, Member.NUMBERED + int(number) if number else member


class Header(tarfile.TarInfo):
    """A tar header. InvalidHeaderError for a long one that extends the next (pax, long names): it can take hours."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in (b"x", b"g", b"X", b"L", b"K") and header.size > MAX_HEADER_BYTES:
            raise tarfile.InvalidHeaderError("a long extended header")
        return header


def walk(tar: tarfile.TarFile) -> Iterator[tuple[str, int, tarfile.TarInfo]]:
    """(key, member, header) of the regular members that count, in order. Raises ReadError at a header that leads back,
    and where tarfile stops before the tar ends: at a damaged header, or at the first block of zeros."""
    last = -1
    while header := tar.next():
        if header.offset <= last or header.issparse():
            raise tarfile.ReadError("bad header, or a sparse member")
        last = header.offset
        tar.members.clear()  # tarfile would collect them all
        place = member_of(header.name)
        if place and header.isreg():
            yield *place, header
    tar.fileobj.seek(tar.offset)
    rest = tar.fileobj.read(MAX_END_BYTES)
    if not rest or rest.strip(b"\0") or len(rest) == MAX_END_BYTES:
        raise tarfile.ReadError("damaged header, no end mark, or more after it")


# ---- the index of a tar


class TarIndex(NamedTuple):
    """Where the members of a tar's n samples lie. All arrays are of plain types: the cache needs no pickle. Each rank
    holds the indices of millions of samples in memory: the table has no columns after the last member that occurs, and
    small numbers are of small types."""

    stamp: np.ndarray  # INDEX_VERSION, the tar's size, its time of change in ns, a hash of some of its bytes
    table: np.ndarray  # (n, members, 2): offset and size of each `Member` up to the last that occurs; -1: none
    kinds: np.ndarray  # (n,) int8: PAIR, STORY or DIALOG
    turns: np.ndarray  # (n,) int32: how many turns the JSON of a story or dialogue has; 0: a pair
    keys: np.ndarray  # (n,) bytes in UTF-8

    def key(self, i: int) -> str:
        return self.keys[i].decode("utf-8", "replace")


def count_turns(content: bytes) -> tuple[int, int]:
    """JSON -> (STORY or DIALOG, its number of turns); (PAIR, 0) for other JSON, which is mostly not even parsed."""
    if b'"turns"' not in content:
        return PAIR, 0
    try:
        sample = json.loads(content)
        return {"story": STORY, "dialog": DIALOG}[sample["kind"]], len(sample["turns"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return PAIR, 0


def scan_tar(path: str, stamp: np.ndarray) -> TarIndex:
    """Read headers and JSON of an uncompressed tar. The members of a key need not be adjacent; where a key has a member
    twice the later one counts, as when unpacking. Only a story or dialogue has numbered pictures: elsewhere KEY.7.jpg
    is the picture of a sample KEY.7. ValueError for a damaged tar."""
    places, turns = {}, {}
    try:
        with tarfile.open(path, "r:", tarinfo=Header, encoding="utf-8", errors=UNDECODABLE) as tar:
            for key, member, header in walk(tar):
                places.setdefault(key, {})[member] = header.offset_data, header.size
                if member == Member.JSON and header.size <= MAX_BYTES[member]:
                    turns[key] = count_turns(tar.extractfile(header).read())
    except Exception as error:  # tarfile raises whatever a damaged header leads it to
        raise ValueError(f"{path}: no uncompressed tar, or damaged after {len(places):,} samples ({error})") from None
    turns = {key: (kind, count) for key, (kind, count) in turns.items() if count}
    for key in [key for key in places if key not in turns]:
        for member in [member for member in places[key] if member >= Member.NUMBERED]:
            places.setdefault(f"{key}.{member - Member.NUMBERED}", {})[Member.PICTURE] = places[key].pop(member)
    places = {key: members for key, members in places.items() if members}
    count = max([Member.TEXT + 1, *(member + 1 for members in places.values() for member in members)])
    table = np.full((len(places), count, 2), -1, np.int64)
    for i, members in enumerate(places.values()):
        table[i, list(members)] = list(members.values())
    kinds, counts = np.array([turns.get(key, (PAIR, 0)) for key in places], np.int32).reshape(-1, 2).T
    keys = np.array([key.encode("utf-8", UNDECODABLE) for key in places], np.bytes_)
    return TarIndex(stamp, table, kinds.astype(np.int8), counts, keys)


def read_index(path: str) -> TarIndex:
    """The index of a tar: the one beside it or in CACHE if that fits the tar's size, time of change and some of its
    bytes, else a new one, which is left there."""
    stat, contents = os.stat(path), int(fingerprint([path], pages=STAMP_PAGES), 16) >> 1
    stamp = [INDEX_VERSION, stat.st_size, stat.st_mtime_ns, contents]
    name = hashlib.sha256(os.path.abspath(path).encode("utf-8", UNDECODABLE)).hexdigest()
    caches = Path(f"{path}.index.npz"), CACHE / f"{name}.npz"
    for cache in caches:
        with suppress(Exception):  # whatever is wrong with a cache, the tar itself is at hand
            with np.load(cache, allow_pickle=False) as file:
                if any(member.compress_type for member in file.zip.infolist()):
                    continue  # not written here, and could be of any size
                index = TarIndex(*(file[field] for field in TarIndex._fields))
            types = [f"{array.dtype.kind}{array.ndim}" for array in index]  # the file may have come from anywhere
            is_whole = types == ["i1", "i3", "i1", "i1", "S1"] and len({*map(len, index[1:])}) == 1
            if index.stamp.tolist() == stamp and is_whole:
                return index
    index = scan_tar(path, np.array(stamp, np.int64))
    for cache in caches:
        with suppress(OSError):  # where it cannot be written: try the other place, or go without
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(cache) as temporary, open(temporary, "wb") as file:
                np.savez(file, **index._asdict())
            break
    return index
