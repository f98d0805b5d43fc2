"""Where the samples lie in webdataset tars: a tar is indexed once, then its members can be read at random.

Members that share the path up to the last dot are one sample: `KEY.jpg|jpeg|png|webp ...` its picture, `KEY.txt` its
caption, `KEY.json` more about it, `KEY.safetensors` its precomputed tensors (precomputed.py). A story or dialogue has
`KEY.json` with a list of "turns" and the pictures `KEY.0.jpg`, `KEY.1.png` ... KEY may hold dots, too, but half a
sample `KEY.more.jpg` beside a sample KEY is none: a note counts these. Only regular members count, and nothing is ever
unpacked to disk.

    expand(["cc3m-train-{0000..0575}.tar", "more/"])  -> list of paths
    read_index("x.tar")                               -> TarIndex: where the n samples lie, table (n, 4 or more)
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
from typing import BinaryIO, NamedTuple

import numpy as np

from common.files import fingerprint, written_whole

HOME = os.path.expanduser("~")  # "~" where there is none
CACHE = Path(tempfile.gettempdir() if HOME == "~" else HOME, ".cache", "minigpt5", "index")  # where tars lie read-only
INDEX_VERSION, STAMP_PAGES = 7, 8
UNDECODABLE = "surrogateescape"  # keeps member names that are not UTF-8 different from each other
MAX_TARS = 100_000  # of one brace list
MAX_PICTURES = 100  # of a story or dialogue: NAME has numbers of two digits
MAX_MEMBER_BYTES, MAX_HEADER_BYTES = 64 << 30, 16 << 10  # of any member, and of a header that extends the next one
MAX_END_BYTES = 1 << 20  # of the zeros that a tar may end with


class Member(IntEnum):
    """What a member of a tar is to its sample. The picture KEY.k.jpg is NUMBERED + k."""

    PICTURE, TEXT, JSON, TENSORS, NUMBERED = range(5)


PAIR, STORY, DIALOG = range(3)  # what a sample is; a pair is whatever has no turns
ENDINGS = dict.fromkeys(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"), Member.PICTURE)
ENDINGS |= dict.fromkeys(("avif", "heic", "jp2"), Member.PICTURE)  # not read, but counted
ENDINGS |= {"txt": Member.TEXT, "json": Member.JSON, "safetensors": Member.TENSORS}
NAME = re.compile(r"((?:.*/)?[^/.](?:[^/]*?[^/.])??)(?:\.(0|[1-9][0-9]?))?\.([^/.]+)", re.DOTALL)  # key, number, ending
MAX_BYTES = {Member.PICTURE: 64 << 20, Member.TEXT: 64 << 10, Member.JSON: 1 << 20, Member.TENSORS: 128 << 20}
MAX_BYTES[Member.NUMBERED] = MAX_BYTES[Member.PICTURE]  # also that of all members after it


class Unusable(Exception):
    """A member that cannot be used. The only argument is a short reason to count it under."""


# ---- which tars


def expand(data: list[str]) -> list[str]:
    """What the user names -> paths of tars in order, each once.

    A value is a tar, a folder of tars or a glob, perhaps with the shell's lists {0000..0575} and {a,b}. Raises
    ValueError where a value matches nothing or is an address.
    """
    found = [path for value in data for item in braces(value) for path in tars_of(item)]
    if not found:
        raise ValueError("no data given: name a tar or a folder of tars")
    return list(dict.fromkeys(found))


def braces(text: str) -> Iterator[str]:
    """The shell's brace lists; braces that hold no list stay as they are."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        yield text
        return
    first, last, options = match.groups()
    if options is None:
        width = len(first) if first.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        if len(numbers) > MAX_TARS:
            raise ValueError(f"{text}: more than {MAX_TARS:,} tars")
        options = ",".join(f"{i:0{width}}" for i in numbers)
    for option in options.split(","):
        yield from braces(text[: match.start()] + option + text[match.end() :])


def tars_of(item: str) -> list[str]:
    if "://" in item:
        download = f"`curl -LO {item}` or `huggingface-cli download`"
        raise ValueError(f"{item}: tars are read from disk; download them first, as with {download}")
    path = Path(os.path.expanduser(item))
    if item and path.is_dir():
        found = sorted(str(tar) for tar in path.glob("[!.]*.tar") if tar.is_file())  # without macOS's ._x.tar
        if not found:
            raise ValueError(f"{item}: no .tar file in this folder")
        return found
    found = [str(path)] if path.is_file() else sorted(filter(os.path.isfile, glob.glob(str(path))))
    found = [tar for tar in found if not tar.endswith(".index.npz")]  # our own caches, beside the tars
    if not item or not found:
        raise ValueError(f"{item or 'empty name'}: no such tar, folder or pattern")
    return found


# ---- headers


def member_of(name: str) -> tuple[str, int] | None:
    """Member name -> (key, member), None for one that is no part of a sample."""
    found = NAME.fullmatch(name)
    key, number, ending = found.groups() if found else (None, None, "")
    member = ENDINGS.get(ending.lower())
    if member is None:
        return None
    if number and member != Member.PICTURE:
        return f"{key}.{number}", member
    return key, Member.NUMBERED + int(number) if number else member


EXTENDED_HEADERS = (b"x", b"g", b"X", b"L", b"K")  # pax headers, a long name, a long link


class Header(tarfile.TarInfo):
    """A header whose damage is a ReadError. tarfile itself takes a damaged one for the end of the tar, believes any
    size, and reads a sparse member's list of any length into memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        if not 0 <= header.size <= (MAX_HEADER_BYTES if header.type in EXTENDED_HEADERS else MAX_MEMBER_BYTES):
            raise tarfile.InvalidHeaderError(f"a header says {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Header":
        try:
            return super().fromtarfile(tar)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # two ways for a tar to end
            raise
        except (tarfile.HeaderError, EOFError, ValueError, OverflowError, LookupError, RecursionError) as error:
            raise tarfile.ReadError(str(error)) from None

    def refuse(self, *_) -> None:
        raise tarfile.InvalidHeaderError("a sparse member")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = refuse


def open_tar(file: BinaryIO) -> tarfile.TarFile:
    """An uncompressed tar whose headers are checked."""
    return tarfile.open(fileobj=file, mode="r:", tarinfo=Header, encoding="utf-8", errors=UNDECODABLE)


def walk(tar: tarfile.TarFile) -> Iterator[tuple[str, int, tarfile.TarInfo]]:
    """(key, member, header) of the regular members that count, in order. Raises ReadError at a damaged header, and
    after the last one where the tar does not end: tarfile stops at the first block of zeros, or without one."""
    last = -1
    while header := tar.next():
        if header.offset <= last or not 0 <= header.size <= MAX_MEMBER_BYTES:  # an extended header may change the size
            raise tarfile.ReadError("bad header")
        last = header.offset
        tar.members.clear()  # tarfile would collect them all
        tar.pax_headers.clear()
        place = member_of(header.name)
        if place and header.isreg():
            yield *place, header
    if tar.fileobj.tell() == tar.offset:
        raise tarfile.ReadError("no end mark")
    rest = tar.fileobj.read(MAX_END_BYTES)
    if rest.strip(b"\0") or len(rest) == MAX_END_BYTES:
        raise tarfile.ReadError("goes on after an end mark")


# ---- the index of a tar


class TarIndex(NamedTuple):
    """Where the members of a tar's n samples lie. All arrays are of numbers, so that the cache needs no pickle. Each
    rank holds the indices of millions of samples in memory: the table has no columns after the last member that occurs,
    and small numbers are of small types."""

    stamp: np.ndarray  # INDEX_VERSION, the tar's size, its time of change in ns, a hash of some of its bytes
    table: np.ndarray  # (n, 2 * members): offset and size of each `Member` up to the last that occurs; -1: none
    kinds: np.ndarray  # (n,) int8: PAIR, STORY or DIALOG
    turns: np.ndarray  # (n,) int32: how many turns the JSON of a story or dialogue has; 0: a pair
    keys: np.ndarray  # the keys one after another, UTF-8
    ends: np.ndarray  # (n + 1,): key i is keys[ends[i] : ends[i + 1]]
    note: np.ndarray  # what is wrong with the tar as a whole, UTF-8, mostly empty

    def key(self, i: int) -> str:
        return self.keys[self.ends[i] : self.ends[i + 1]].tobytes().decode("utf-8", "replace")


def count_turns(content: bytes) -> tuple[int, int]:
    """JSON -> (STORY or DIALOG, its number of turns); (PAIR, 0) for other JSON, which is mostly not even parsed."""
    if b'"turns"' not in content:
        return PAIR, 0
    try:
        sample = json.loads(content)
        kind = {"story": STORY, "dialog": DIALOG}[sample["kind"]]
        return (kind, len(sample["turns"])) if isinstance(sample["turns"], list) and sample["turns"] else (PAIR, 0)
    except (ValueError, LookupError, TypeError, RecursionError):
        return PAIR, 0


def sort_members(places: dict[str, dict], turns: dict[str, tuple[int, int]]) -> tuple[dict[str, dict], list[str]]:
    """Members by key as their names say -> those of samples, and the keys that are no samples but lie beside one. Only
    a story or dialogue has numbered pictures: elsewhere KEY.7.jpg is the picture of a sample KEY.7."""
    for key in [key for key in places if key not in turns]:
        for member in [member for member in places[key] if member >= Member.NUMBERED]:
            places.setdefault(f"{key}.{member - Member.NUMBERED}", {})[Member.PICTURE] = places[key].pop(member)
    samples, others = {}, []
    for key, members in places.items():
        shorter, found = re.sub(r"\.[^/]*\Z", "", key), members.keys()  # to the first dot of the base name
        is_whole = found & {Member.PICTURE, Member.TENSORS} and found & {Member.TEXT, Member.JSON}
        if shorter != key and places.get(shorter) and not is_whole and key not in turns:
            others += [key] if members else []
        elif members:
            samples[key] = members
    return samples, others


def scan_tar(path: str, stamp: np.ndarray) -> TarIndex:
    """Read headers and JSON of an uncompressed tar. The members of a key need not be adjacent; where a key has a member
    twice the later one counts, as when unpacking. A damaged tar ends where it is damaged; ValueError for what is no tar
    at all."""
    places, turns, notes, repeated = {}, {}, [], 0
    try:
        with open(path, "rb") as file:
            if file.peek(6)[:6].startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
                raise ValueError(f"{path}: a compressed tar cannot be read at random; unpack it to a plain .tar")
            with open_tar(file) as tar:
                try:
                    for key, member, header in walk(tar):
                        members = places.setdefault(key, {})
                        repeated += member in members
                        members[member] = header.offset_data, header.size
                        if member == Member.JSON and header.size <= MAX_BYTES[member]:
                            found = count_turns(tar.extractfile(header).read())
                            turns |= {key: found} if found[1] else {}
                except tarfile.TarError as error:
                    notes.append(f"cut short or damaged after {len(places):,} samples ({error})")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path}: not readable as a tar ({error})") from None
    if repeated:
        notes.append(f"{repeated:,} members that their sample already had; the last counts")
    places, others = sort_members(places, turns)
    if others:
        notes.append(f"{len(others):,} members beside a sample are not read, such as those of {others[0]}")
    keys = [key.encode("utf-8", UNDECODABLE) for key in places]
    count = max([Member.TEXT + 1, *(member + 1 for members in places.values() for member in members)])
    table = np.full((len(places), count, 2), -1, np.int64)
    for i, members in enumerate(places.values()):
        table[i, list(members)] = list(members.values())
    kinds_and_turns = np.array([turns.get(key, (PAIR, 0)) for key in places], np.int64).reshape(-1, 2)
    return TarIndex(
        stamp,
        table.reshape(len(places), 2 * count),
        kinds_and_turns[:, 0].astype(np.int8),
        kinds_and_turns[:, 1].astype(np.int32),
        np.frombuffer(b"".join(keys), np.uint8),
        np.cumsum([0, *map(len, keys)], dtype=np.int64),
        np.frombuffer("; ".join(notes).encode("utf-8", "replace"), np.uint8),
    )


def is_consistent(index: TarIndex) -> bool:
    """Whether a cached index could be one of `scan_tar`: it may have come with the tar from anywhere."""
    _, table, kinds, turns, keys, ends, _ = index
    types = (np.int64, 1), (np.int64, 2), (np.int8, 1), (np.int32, 1), (np.uint8, 1), (np.int64, 1), (np.uint8, 1)
    if tuple((array.dtype, array.ndim) for array in index) != types:
        return False
    places = table.reshape(len(turns), table.shape[1] // 2, 2)  # offset and size
    is_place = (places >= 0).all(-1) | (places == -1).all(-1)
    is_cut = len(ends) == len(turns) + 1 and ends[0] == 0 and ends[-1] == len(keys) and (np.diff(ends) >= 0).all()
    is_kind = (kinds >= PAIR) & (kinds <= DIALOG) & (turns >= 0) & (turns <= MAX_BYTES[Member.JSON])
    has_turns = (kinds == PAIR) == (turns == 0)
    return bool(kinds.shape == turns.shape and is_place.all() and is_cut and is_kind.all() and has_turns.all())


def read_index(path: str) -> TarIndex:
    """The index of a tar: cached beside it or in CACHE if that fits the tar's size, time of change and some of its
    bytes, else scanned."""
    try:
        stat, contents = os.stat(path), int(fingerprint([path], pages=STAMP_PAGES), 16) >> 1
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns, contents], np.int64)
    name = hashlib.sha256(os.path.abspath(path).encode("utf-8", UNDECODABLE)).hexdigest()[:32]
    caches = Path(f"{path}.index.npz"), CACHE / f"{name}.npz"
    for cache in caches:
        with suppress(Exception):  # whatever is wrong with a cache, the tar itself is at hand
            with np.load(cache, allow_pickle=False) as file:
                if any(member.compress_type for member in file.zip.infolist()):
                    continue  # not written here, and could be of any size
                index = TarIndex(*(file[field] for field in TarIndex._fields))
            if np.array_equal(index.stamp, stamp) and is_consistent(index):
                return index
    index = scan_tar(path, stamp)
    for cache in caches:
        with suppress(OSError):  # where it cannot be written: try the other place, or go without
            cache.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(cache) as temporary, open(temporary, "wb") as file:
                np.savez(file, **index._asdict())
            break
    return index
