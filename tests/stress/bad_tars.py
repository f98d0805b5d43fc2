"""Bad tars: valid ones, written header by header, with one thing wrong. Used by fuzz.py.

Every pair says in its caption which colour its picture has, so that a mix-up is seen. `BAD_TARS` maps what is wrong to
a function of (random numbers, members as bytes) that returns the tar.
"""

import bz2
import gzip
import io
import json
from collections.abc import Callable
from random import Random

from PIL import Image

END = bytes(1024)
COUNT = 6  # samples of a valid tar


def picture(number: int, kind: str = "PNG", side: int = 8) -> bytes:
    """A picture whose colour says which it is."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number * 40, 255 - number * 40, 0)).save(file, kind)
    return file.getvalue()


def size_field(size: int) -> bytes:
    """Octal, or in base 256 what octal digits cannot hold."""
    if 0 <= size < 8**11:
        return b"%011o\0" % size
    return bytes([255 if size < 0 else 128]) + size.to_bytes(11, "big", signed=True)


def header(name: bytes, size: int, kind: bytes = b"0", link: bytes = b"") -> bytes:
    block = name.ljust(100, b"\0")[:100] + b"0000644\0" + b"0000000\0" * 2 + size_field(size) + b"00000000000\0"
    block += b" " * 8 + kind + link.ljust(100, b"\0") + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)
    return block[:148] + b"%06o\0 " % sum(block[:512]) + block[156:512]


def member(name: str | bytes, content: bytes, kind: bytes = b"0", size: int | None = None) -> bytes:
    name = name.encode() if isinstance(name, str) else name
    length = len(content) if size is None else size
    return header(name, length, kind) + content + bytes(-len(content) % 512)


def pax(records: dict[bytes, bytes]) -> bytes:
    lines = []
    for key, value in records.items():
        line = b" " + key + b"=" + value + b"\n"
        length = len(line) + len(str(len(line)))
        lines.append(str(length + (len(str(length)) > len(str(len(line))))).encode() + line)
    return b"".join(lines)


def pair_members() -> list[bytes]:
    texts = [member(f"{i:05}.txt", f"Number {i}.".encode()) for i in range(COUNT)]
    pictures = [member(f"{i:05}.{('png', 'webp')[i % 2]}", picture(i, ("PNG", "WEBP")[i % 2])) for i in range(COUNT)]
    return [m for pair in zip(pictures, texts, strict=True) for m in pair]


def story_members() -> list[bytes]:
    members = []
    for i in range(COUNT):
        turns = [{"text": f"step {k}", "image": f"{i:05}.{k}.png"} for k in range(3)]
        kind = "dialog" if i % 2 else "story"
        members.append(member(f"{i:05}.json", json.dumps({"kind": kind, "id": "x", "turns": turns}).encode()))
        members += [member(f"{i:05}.{k}.png", picture((i + k) % COUNT)) for k in range(3)]
    return members


def whole(members: list[bytes]) -> bytes:
    return b"".join(members) + END


# ---- what can be wrong


def flip(rng: Random, content: bytes, count: int = 0, first: int = 0, last: int | None = None) -> bytes:
    """`count` bytes of content[first:last] set to random values."""
    changed = bytearray(content)
    for _ in range(count or rng.choice((1, 2, 8, 64))):
        changed[rng.randrange(first, max(first + 1, min(len(changed), last or len(changed))))] = rng.randrange(256)
    return bytes(changed)


def in_a_header(rng: Random, members: list[bytes]) -> bytes:
    """One member's header changed, mostly with the right checksum: the lie itself must be seen."""
    i = rng.randrange(len(members))
    block = flip(rng, members[i][:512], rng.choice((1, 2, 8)))
    if rng.random() < 0.8:
        block = block[:148] + b" " * 8 + block[156:]
        block = block[:148] + b"%06o\0 " % sum(block) + block[156:]
    return whole([*members[:i], block + members[i][512:], *members[i + 1 :]])


def block_set(rng: Random, members: list[bytes], block: bytes) -> bytes:
    tar = whole(members)
    at = 512 * rng.randrange(len(tar) // 512 - 2)
    return tar[:at] + block + tar[at + 512 :]


def among(rng: Random, members: list[bytes], *more: bytes) -> bytes:
    """More members between whole samples."""
    at = 2 * rng.randrange(len(members) // 2 + 1)
    return whole([*members[:at], *more, *members[at:]])


def header_of_zeros(rng: Random, members: list[bytes]) -> bytes:
    """What a reader takes for the end."""
    i = rng.randrange(len(members))
    return whole([*members[:i], bytes(512) + members[i][512:], *members[i + 1 :]])


def named(rng: Random, members: list[bytes], name: bytes) -> bytes:
    return among(rng, members, member(name + b".png", picture(1)), member(name + b".txt", b"Number 1."))


def huge(rng: Random) -> int:
    return rng.choice((2**33, 2**40, 2**50, 2**62, 2**63, 2**80, 8**11 - 1, 513, 65 << 20))


def huge_size(rng: Random, members: list[bytes]) -> bytes:
    """A member that says it is huge, where its data are not."""
    name = rng.choice((b"x.png", b"x.txt", b"x.json", b"x.safetensors", b"x.0.png", b"readme"))
    return among(rng, members, member(name, b"abc", rng.choice((b"0", b"7", b"9", b"1", b"5")), huge(rng)))


def links(rng: Random, members: list[bytes]) -> bytes:
    name = rng.choice((b"x.png", b"00001.png", b"x.json"))
    target = rng.choice((b"/etc/passwd", b"../../etc/passwd", name, b""))
    return among(
        rng, members, header(name, rng.choice((0, 0, 512)), rng.choice((b"1", b"2", b"3", b"4", b"5", b"6")), target)
    )


def pax_size(rng: Random, members: list[bytes]) -> bytes:
    value = rng.choice((b"-1", b"-512", b"1" * 30, b"9" * 5000, b"x", b"", b"3", b"1e9", b"%d" % huge(rng)))
    return among(rng, members, member("h", pax({b"size": value}), b"x"), member("x.png", b"abc"))


def pax_odd(rng: Random, members: list[bytes]) -> bytes:
    """Extended headers that are damaged, or that name what nobody should."""
    content = rng.choice(
        (
            pax({b"path": b"../../../etc/cron.d/x.png"}),
            pax({b"path": b"a" * 5000 + b".png"}),
            pax({b"path": b"\xff\xfe.png"}),
            pax({b"path": b"x\0y.png"}),
            pax({b"hdrcharset": b"BINARY", b"path": b"\xff.png"}),
            pax({b"hdrcharset": b"utf-7\xff"}),
            pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"99999999999"}),
            pax({b"GNU.sparse.map": b"0,1,5"}),
            pax({b"GNU.sparse.size": b"5", b"GNU.sparse.offset": b"x"}),
            b"0 path=x\n",
            b"99999999999999 path=x\n",
            b"12 path=x.png",
            b"5" * 9000,
            b"\0" * 512,
            flip(rng, pax({b"path": b"x.png", b"mtime": b"1.5"})),
        )
    )
    return among(rng, members, member("h", content, rng.choice((b"x", b"g", b"X"))), member("x.png", picture(1)))


def sparse(rng: Random, members: list[bytes]) -> bytes:
    if rng.random() < 0.5:  # GNU's old form with a list that goes on and on
        block = bytearray(header(b"x.png", 512, b"S"))
        block[257:265], block[482] = b"ustar  \0", 1
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return among(rng, members, bytes(block), (b"00000000001\0" * 42 + b"\1" * 8) * rng.choice((1, 5000)))
    head = pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"})
    return among(rng, members, member("h", head, b"x"), member("x.png", b"9" * 15 + b"\n" + b"0\n" * 200_000))


def duplicates(rng: Random, members: list[bytes]) -> bytes:
    """Some samples once more, whole or in part, somewhere: the last counts."""
    start = 2 * rng.randrange(len(members) // 2)
    return among(rng, members, *members[start : start + 2])


def compressed(rng: Random, members: list[bytes]) -> bytes:
    return rng.choice((gzip.compress, bz2.compress))(whole(members))


def other_file(rng: Random, members: list[bytes]) -> bytes:
    page, noise = b"<html>404 not found</html>" * 100, rng.randbytes(rng.choice((1, 511, 512, 5000)))
    return rng.choice((b"", bytes(512), bytes(20_480), page, noise, picture(1), b"PK\3\4" + noise))


def odd_names(rng: Random, members: list[bytes]) -> bytes:
    names = (b"\xff\xfe", b"a\nb", b"-rf", b"a" * 99, b" ", b"..", b"con", b".hidden", b"a.b.c", b"%s%n", b"\x1b[31m")
    return named(rng, members, rng.choice(names))


def traversal(rng: Random, members: list[bytes]) -> bytes:
    return named(
        rng, members, rng.choice((b"../../../tmp/x", b"/etc/x", b"a/../../x", b"C:\\x", b"./x", b"//x", b"~/x"))
    )


def chain(rng: Random, members: list[bytes]) -> bytes:
    """Extended headers of extended headers."""
    kind, content = rng.choice(
        ((b"x", pax({b"a": b"b"})), (b"g", pax({b"a": b"b"})), (b"L", b"x.png\0"), (b"K", b"l\0"))
    )
    return among(rng, members, *[member("h", content, kind)] * rng.choice((2, 400, 3000)), member("y.png", picture(1)))


def long_extension(rng: Random, members: list[bytes]) -> bytes:
    """An extended header that says it is huge: with some data, or with little."""
    content = b"1" * rng.choice((3, 3, 600_000))
    return among(
        rng, members, member("h", content, rng.choice((b"x", b"g", b"L", b"K")), rng.choice((huge(rng), -512, 600_000)))
    )


def negative(rng: Random, members: list[bytes]) -> bytes:
    kind = rng.choice((b"0", b"0", b"x", b"L", b"5"))
    return among(rng, members, member("x.png", b"abc", kind, rng.choice((-1, -512, -1024, -(2**40)))))


def marker(rng: Random, members: list[bytes]) -> bytes:
    """A first member that claims that tensors are precomputed."""
    name = b".precomputed.safetensors"
    first = rng.choice(
        (
            member(name, rng.randbytes(100)),
            member(name, b""),
            member(name, b"abc", size=huge(rng)),
            member(name, b"abc", size=-512),
            header(name, 0, b"2", b"/etc/passwd"),
            header(name, 0, b"1", name),
            header(name, 0, b"5"),
            member(name, (8).to_bytes(8, "little") + b"{}      "),
        )
    )
    return whole([first, *members])


def many_names(rng: Random, members: list[bytes]) -> bytes:
    return among(rng, members, *(header(b"%d.%d.png" % (i, i % 120), 0) for i in range(300)))


BAD_TARS: dict[str, Callable[[Random, list[bytes]], bytes]] = {
    "nothing": lambda rng, members: whole(members),
    "cut anywhere": lambda rng, members: whole(members)[: rng.randrange(len(whole(members)))],
    "cut between members": lambda rng, members: b"".join(members[: rng.randrange(1, len(members))]),
    "bytes changed": lambda rng, members: flip(rng, whole(members)),
    "header changed": in_a_header,
    "header of zeros": header_of_zeros,
    "block of zeros": lambda rng, members: block_set(rng, members, bytes(512)),
    "block of noise": lambda rng, members: block_set(rng, members, rng.randbytes(512)),
    "path traversal": traversal,
    "links and devices": links,
    "huge size": huge_size,
    "negative size": negative,
    "duplicate keys": duplicates,
    "out of order": lambda rng, members: whole(rng.sample(members, len(members))),
    "huge extended header": long_extension,
    "extended header": pax_odd,
    "size in extended header": pax_size,
    "chain of extended headers": chain,
    "sparse": sparse,
    "odd names": odd_names,
    "many numbered pictures": many_names,
    "two tars in one": lambda rng, members: whole(members[:4]) + whole(members[4:]),
    "compressed": compressed,
    "another file": other_file,
    "false marker": marker,
}
CONTENT_CHANGED = {"bytes changed", "header changed", "block of zeros", "block of noise", "chain of extended headers"}
MUST_SAY = {
    "two tars in one",
    "cut between members",
    "header of zeros",
}  # not all samples are there: this has to be said
