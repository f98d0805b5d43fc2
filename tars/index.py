"""Samples out of webdataset tars as raw bytes: local tars at random through an index, http(s) tars as a stream.

Members that share the path up to the first dot of the base name are one sample: `KEY.jpg|jpeg|png|webp` its picture,
`KEY.txt` its caption, `KEY.json` more about it, `KEY.safetensors` what was precomputed of it (features.py). An
interleaved sample has `KEY.json` with a list of "turns" and the pictures `KEY.0.jpg`, `KEY.1.png` ... Only regular
members count and nothing is ever unpacked to disk.

    expand(["cc3m-train-{0000..0575}.tar", "more/"])  -> list of paths and URLs
    read_index("x.tar")                               -> TarIndex: where the n samples lie, table (n, 8 or more)
    read_member("x.tar", table[i], PICTURE)           -> bytes
    stream_tar("https://.../x.tar")                   -> (key, {PICTURE: bytes, TEXT: bytes}, next byte), in order
"""

import glob
import hashlib
import http.client
import json
import os
import re
import tarfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

CACHE = Path.home() / ".cache" / "minigpt5" / "index"  # for the indices of tars in folders that cannot be written
INDEX_VERSION = 4
PICTURE, TEXT, JSON, FEATURES, NUMBERED = range(5)  # kinds of members; the picture KEY.k.jpg has kind NUMBERED + k
MOST_NUMBERED = 100  # pictures of an interleaved sample
KINDS = dict.fromkeys(("jpg", "jpeg", "png", "webp"), PICTURE)  # endings
KINDS |= {"txt": TEXT, "json": JSON, "safetensors": FEATURES}
ERRORS = "surrogateescape"  # member names that are not UTF-8 stay apart from each other
MAX_BYTES = (64 << 20, 64 << 10, 1 << 20, 128 << 20)  # of a member of the first four kinds; see most_bytes
LARGEST, LONGEST_HEADER = 64 << 30, 16 << 10  # bytes of any member, and of a header that extends the next one
PADDING = 1 << 20  # zeros that a tar may end with
BUFFER_BYTES = 256 << 20  # of a shuffle buffer, however few samples that is
TIMEOUT, RETRIES, PAUSE = 60.0, 8, 1.0  # a connection: seconds, new attempts, seconds before the first (then doubled)


class Unusable(Exception):
    """A member that cannot be used. The only argument is a short reason to count it under."""


class StreamCut(Exception):
    """A connection that broke in the middle of a tar and could not be taken up again."""


class StreamRefused(Exception):
    """A tar that the server does not give. The message is one line."""


# ---- which tars


def expand(data: list[str]) -> list[str]:
    """What the user names -> tar paths and URLs in order, each once.

    A value is a tar, a folder of tars, a glob or an http(s) URL, perhaps with the shell's lists {0000..0575} and {a,b}.
    Raises ValueError where a value matches nothing.
    """
    found = [path for value in data for item in braces(value) for path in tars_of(item)]
    if not found:
        raise ValueError("no data given: name a tar, a folder of tars or a URL")
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
        if len(numbers) > 100_000:
            raise ValueError(f"{text}: more than 100,000 tars")
        options = ",".join(f"{i:0{width}}" for i in numbers)
    for option in options.split(","):
        yield from braces(text[: match.start()] + option + text[match.end() :])


def is_url(item: str) -> bool:
    return item.lower().startswith(("http://", "https://"))


def tars_of(item: str) -> list[str]:
    if is_url(item):
        return [item]
    if "://" in item:
        raise ValueError(f"{item}: only http and https addresses can be read")
    path = Path(item).expanduser()
    if item and path.is_dir():
        found = sorted(str(tar) for tar in path.glob("*.tar") if tar.is_file())
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
    """Member name -> (key, kind), None for a member that is no part of a sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    number, dot, last = extension.partition(".")
    kind = KINDS.get((last if dot else extension).lower())
    if dot and (kind != PICTURE or not re.fullmatch("0|[1-9][0-9]?", number)):  # below MOST_NUMBERED
        kind = None
    elif dot:
        kind = NUMBERED + int(number)
    return (folder + slash + stem, kind) if stem and kind is not None else None


def most_bytes(kind: int) -> int:
    """The size from which on a member of that kind is unusable."""
    return MAX_BYTES[PICTURE if kind >= NUMBERED else kind]


class Header(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the tar, believes any size and reads a sparse member's list of any
    length into memory; here all these are a ReadError."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        if not 0 <= header.size <= (LONGEST_HEADER if header.type in EXTENDED else LARGEST):
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


EXTENDED = (b"x", b"g", b"X", b"L", b"K")  # pax headers, a long name, a long link


def open_tar(file: BinaryIO, mode: str) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode=mode, tarinfo=Header, bufsize=1 << 18, encoding="utf-8", errors=ERRORS)


def walk(tar: tarfile.TarFile) -> Iterator[tuple[str, int, tarfile.TarInfo]]:
    """(key, kind, member) of the regular members that count, in order. Raises tarfile.ReadError at a damaged header."""
    last = -1
    while member := tar.next():
        if member.offset <= last or not 0 <= member.size <= LARGEST:  # an extended header gives the size anew
            raise tarfile.ReadError("bad header")
        last = member.offset
        tar.members.clear()  # tarfile would collect them all
        tar.pax_headers.clear()
        place = member_of(member.name)
        if place and member.isreg():
            yield *place, member


def check_end(tar: tarfile.TarFile) -> None:
    """After `walk`: tarfile ends at the first block of zeros, or without one. ReadError if that was not the end."""
    if tar.fileobj.tell() == tar.offset:
        raise tarfile.ReadError("no end mark")
    rest = tar.fileobj.read(PADDING)
    if rest.strip(b"\0") or len(rest) == PADDING:
        raise tarfile.ReadError("goes on after an end mark")


# ---- local tars


class TarIndex(NamedTuple):
    """Where the members of a tar's n samples lie. All arrays are plain numbers, so that the cache needs no pickle."""

    stamp: np.ndarray  # INDEX_VERSION, the tar's size and its time of change in ns
    table: np.ndarray  # (n, 2 * kinds): offset and size of a member, kind by kind; -1: none
    turns: np.ndarray  # (n,): of a story how many turns its JSON has, of a dialogue minus as many, else 0
    keys: np.ndarray  # the keys one after another, UTF-8
    ends: np.ndarray  # (n + 1,): key i is keys[ends[i] : ends[i + 1]]
    note: np.ndarray  # what is wrong with the tar as a whole, UTF-8, mostly empty

    def key(self, i: int) -> str:
        return self.keys[self.ends[i] : self.ends[i + 1]].tobytes().decode("utf-8", "replace")


def count_turns(content: bytes) -> int:
    """The turns of a story in JSON, of a dialogue minus as many; 0 for other JSON, which is mostly seen unparsed."""
    if b'"turns"' not in content:
        return 0
    try:
        sample = json.loads(content)
        sign = {"story": 1, "dialog": -1}[sample["kind"]]
        return sign * len(sample["turns"]) if isinstance(sample["turns"], list) else 0
    except (ValueError, LookupError, TypeError, RecursionError):
        return 0


def scan_tar(path: str, stamp: np.ndarray) -> TarIndex:
    """Read headers and JSON of an uncompressed tar. The members of a key need not be adjacent; of two of one kind the
    later counts, as when unpacking. A damaged tar ends where it is damaged; ValueError for what is no tar at all."""
    rows, turns, notes, twice = {}, {}, [], 0
    try:
        with open(path, "rb") as file:
            if file.peek(6)[:6].startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
                raise ValueError(f"{path}: a compressed tar cannot be read at random; unpack it to a plain .tar")
            with open_tar(file, "r:") as tar:
                try:
                    for key, kind, member in walk(tar):
                        row = rows.setdefault(key, [-1] * 2 * NUMBERED)
                        row += [-1] * (2 * kind + 2 - len(row))
                        twice += row[2 * kind] >= 0
                        row[2 * kind : 2 * kind + 2] = member.offset_data, member.size
                        if kind == JSON and member.size <= most_bytes(JSON):
                            turns[key] = count_turns(tar.extractfile(member).read())
                    check_end(tar)
                except tarfile.TarError as error:
                    notes.append(f"cut short or damaged after {len(rows):,} samples ({error})")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path}: not readable as a tar ({error})") from None
    if twice:
        notes.append(f"{twice:,} members of a kind that their sample already had; the last counts")
    keys = [key.encode("utf-8", ERRORS) for key in rows]
    table = np.full((len(rows), max(map(len, rows.values()), default=2 * NUMBERED)), -1, np.int64)
    for place, row in enumerate(rows.values()):
        table[place, : len(row)] = row
    return TarIndex(
        stamp,
        table,
        np.array([turns.get(key, 0) for key in rows], np.int64),
        np.frombuffer(b"".join(keys), np.uint8),
        np.cumsum([0, *map(len, keys)], dtype=np.int64),
        np.frombuffer("; ".join(notes).encode("utf-8", "replace"), np.uint8),
    )


def goes_together(index: TarIndex) -> bool:
    """Whether a cached index could be one of `scan_tar`: it may have come with the tar from anywhere."""
    stamp, table, turns, keys, ends, note = index
    places = table.reshape(len(turns), table.shape[1] // 2, 2)  # offset and size
    there = (places >= 0).all(-1) | (places == -1).all(-1)
    numbers = all(array.dtype == np.int64 for array in (stamp, table, turns, ends))
    texts = all(array.dtype == np.uint8 and array.ndim == 1 for array in (keys, note))
    cuts = len(ends) == len(turns) + 1 and ends[0] == 0 and ends[-1] == len(keys) and (np.diff(ends) >= 0).all()
    counts = turns.ndim == 1 and ((turns >= -most_bytes(JSON)) & (turns <= most_bytes(JSON))).all()
    return bool(numbers and texts and cuts and counts and there.all())


def read_index(path: str) -> TarIndex:
    """The index of a tar: cached beside it or in CACHE if that fits the tar's size and time of change, else scanned."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    name = hashlib.sha256(os.path.abspath(path).encode("utf-8", ERRORS)).hexdigest()[:32]
    places = Path(f"{path}.index.npz"), CACHE / f"{name}.npz"
    for place in places:
        with suppress(Exception):  # whatever is wrong with a cache, the tar itself is at hand
            with np.load(place, allow_pickle=False) as file:
                if any(member.compress_type for member in file.zip.infolist()):
                    continue  # not written here, and could be of any size
                index = TarIndex(*(file[field] for field in TarIndex._fields))
            if np.array_equal(index.stamp, stamp) and goes_together(index):
                return index
    index = scan_tar(path, stamp)
    for place in places:
        temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")  # hosts may share the folder
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, **index._asdict())
            os.replace(temporary, place)
            break
        except OSError:  # cannot be written: the next place, or no cache
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    return index


def read_member(path: str, row: np.ndarray, kind: int) -> bytes | None:
    """The bytes of one member of the sample `row` of a table, None where it has none. Raises Unusable, OSError.

    Opens the tar each time (some 20 us): open files could run out, and would be shared between forked workers.
    """
    offset, size = (int(x) for x in row[2 * kind : 2 * kind + 2]) if 2 * kind < len(row) else (-1, -1)
    if offset < 0:
        return None
    if size > most_bytes(kind):
        raise Unusable("too large")
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise Unusable("truncated tar")
    return content


# ---- tars behind http(s)


@cache
def opener() -> urllib.request.OpenerDirector:
    """urllib's for http and https alone: its usual one would also follow a redirection to ftp."""
    made = urllib.request.OpenerDirector()
    names = "ProxyHandler HTTPHandler HTTPSHandler HTTPRedirectHandler"
    for name in f"{names} HTTPDefaultErrorHandler HTTPErrorProcessor UnknownHandler".split():
        made.add_handler(getattr(urllib.request, name)())
    return made


class HttpFile:
    """The bytes of a URL from `start` on, read once in order. A broken connection is taken up again where it broke.

    Raises StreamRefused where the server refuses or cannot be reached, StreamCut where only the rest cannot be had.
    """

    def __init__(self, url: str, start: int = 0):
        self.url, self.position, self.response = url, start, None
        self.end, self.version = None, None  # of the file at the first connection

    def connect(self) -> None:
        headers = {"Range": f"bytes={self.position}-"} if self.position else {}
        self.response = opener().open(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT)
        status, length, headers = self.response.status, self.response.length, self.response.headers
        if status == 206 and not headers.get("Content-Range", "").startswith(f"bytes {self.position}-"):
            raise OSError("the server sends another part than asked for")
        skip = self.position if status == 200 else 0  # a server without ranges starts from the front
        end = None if length is None else self.position - skip + length
        version = end, headers.get("ETag"), headers.get("Last-Modified")
        if self.version not in (None, version):
            raise OSError("the file has changed")
        self.end, self.version = end, version
        while skip and (content := self.receive(min(skip, 1 << 18))):
            skip -= len(content)
        if skip:
            raise OSError("cut")

    def receive(self, size: int) -> bytes:
        """`size` bytes, fewer at the end. TimeoutError also where a server sends drop by drop."""
        content, until = b"", time.monotonic() + TIMEOUT
        while len(content) < size and (more := self.response.read1(size - len(content))):
            content += more
            if time.monotonic() > until:
                raise TimeoutError("too slow")
        return content

    def read(self, size: int) -> bytes:
        for attempt in range(RETRIES + 1):
            time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
            try:
                if self.response is None:
                    self.connect()
                content = self.receive(size if self.end is None else min(size, max(0, self.end - self.position)))
                if content or self.end is None or self.position >= self.end:
                    self.position += len(content)
                    return content
                reason = "cut"  # http.client reports a connection that ended early as the end of the file
            except urllib.error.HTTPError as error:
                if error.code == 416:  # nothing from there on: `start` was the end
                    return b""
                reason = f"{error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = f"cannot be reached ({getattr(error, 'reason', error)})"
            self.close()
        if self.version is None:
            raise StreamRefused(f"{self.url}: {' '.join(reason.split())[:200]}")
        raise StreamCut

    def close(self) -> None:
        if self.response is not None:
            self.response.close()
        self.response = None


def stream_tar(url: str, start: int = 0) -> Iterator[tuple[str, dict, int]]:
    """(key, parts, byte where the next sample starts) of the samples from byte `start` on.

    parts: kind -> bytes, or the reason (str) why they are not there. The members of a key must be adjacent. Raises
    StreamRefused (no tar there at all), StreamCut, tarfile.TarError (damaged or truncated).
    """
    with closing(HttpFile(url, start)) as file:
        try:
            tar = open_tar(file, "r|")
        except tarfile.ReadError as error:
            if start:
                return
            raise StreamRefused(f"{url}: not an uncompressed tar ({error})") from None
        current, parts = None, {}
        for key, kind, member in walk(tar):
            if kind >= NUMBERED:
                continue
            if key != current and parts:
                yield current.encode("utf-8", ERRORS).decode("utf-8", "replace"), parts, start + member.offset
                parts = {}
            current = key
            parts[kind] = tar.extractfile(member).read() if member.size <= most_bytes(kind) else "too large"
        if parts:
            yield current.encode("utf-8", ERRORS).decode("utf-8", "replace"), parts, start + tar.offset
        check_end(tar)


def streamed(parts: dict, kind: int) -> bytes | None:
    """As `read_member`, from what `stream_tar` gave."""
    if isinstance(parts.get(kind), str):
        raise Unusable(parts[kind])
    return parts.get(kind)


def stream_tars(url_of: Callable[[int], str], tar: int, byte: int, step: int) -> Iterator[tuple[int, int, str, dict]]:
    """(tar, next byte, key, parts) from a byte of `tar` on, then of tar + step and so on without end.

    A tar that is empty, cut or damaged gives one more item that says so; its key is the URL. Raises StreamRefused.
    """
    while True:
        url, problem = url_of(tar), "empty tar" if byte == 0 else None
        try:
            for key, parts, end in stream_tar(url, byte):
                problem = None
                yield tar, end, key, parts
        except StreamCut:
            problem = "stream cut"
        except tarfile.TarError:
            problem = "truncated tar"
        if problem:
            yield tar, 0, url, {PICTURE: problem}
        tar, byte = tar + step, 0


def shuffled(items: Iterable[tuple], bits, count: int, tars: int, cursor: list[int]) -> Iterator[tuple]:
    """The items of `stream_tars` in random order out of a buffer of `count`, emptied after each epoch of `tars` tars.

    bits: a numpy bit generator. `cursor`, [tar, next byte], is kept at how far the items were read.
    """
    buffer, held = [], 0
    for item in items:
        new_epoch = buffer and buffer[0][0] // tars != item[0] // tars
        while buffer and (new_epoch or len(buffer) >= count or held > BUFFER_BYTES):
            i = bits.random_raw() % len(buffer)
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            held -= sum(map(len, buffer[-1][3].values()))
            yield buffer.pop()
        buffer.append(item)
        held += sum(map(len, item[3].values()))
        cursor[:] = item[:2]
