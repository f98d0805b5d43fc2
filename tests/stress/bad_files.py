"""Bad pictures, captions, safetensors and config.json: valid ones with one thing wrong. Used by fuzz.py."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
from random import Random

from bad_tars import flip
from PIL import Image, PngImagePlugin

# ---- pictures

LIMIT = 64_000_000  # pixels that a picture may have


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def upright() -> Image.Image:
    """Wider than high, its upper left corner red, all else blue."""
    image = Image.new("RGB", (48, 32), "blue")
    image.paste("red", (0, 0, 16, 16))
    return image


def turned(orientation: int) -> Image.Image:
    """`upright` as a camera stores it that was held so."""
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    back |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    return upright().transpose(Image.Transpose[back[orientation]]) if orientation > 1 else upright()


@cache
def pictures() -> dict[str, bytes]:
    """Valid pictures by name; all show `upright`."""
    rgb, frames = upright(), {"save_all": True, "append_images": [Image.new("RGB", (48, 32), "green")] * 3}
    rgba, grey = rgb.convert("RGBA"), rgb.convert("L")
    sixteen = Image.frombytes("I;16", grey.size, b"".join(struct.pack("<H", 257 * v) for v in grey.tobytes()))
    found = {
        **{f"PNG {mode}": encoded(rgb.convert(mode), "PNG") for mode in ("RGB", "RGBA", "P", "L", "LA", "1")},
        "PNG 16 bit": encoded(sixteen, "PNG"),
        "PNG animated": encoded(rgb, "PNG", **frames),
        "JPEG": encoded(rgb, "JPEG", quality=95),
        "JPEG progressive": encoded(rgb, "JPEG", quality=95, progressive=True),
        "JPEG CMYK": encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        "JPEG grey": encoded(grey, "JPEG", quality=95),
        "WEBP": encoded(rgba, "WEBP", lossless=True),
        "WEBP animated": encoded(rgb, "WEBP", lossless=True, **frames),
        "GIF animated": encoded(rgb, "GIF", **frames),
        "BMP": encoded(rgb, "BMP"),
        "TIFF": encoded(rgb, "TIFF"),
        "TIFF deflate": encoded(rgb, "TIFF", compression="tiff_deflate"),
        "TIFF 16 bit": encoded(sixteen, "TIFF"),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind, options in (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})):
            found[f"{kind} turned {orientation}"] = encoded(turned(orientation), kind, exif=exif, **options)
    return found


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_size(rng: Random) -> bytes:
    """A PNG that says that it is large, with the data of a small one."""
    size = rng.choice(
        ((60_000, 60_000), (2**31 - 1, 1), (8000, 8000), (1, 64_000_000), (0, 5), (10_001, 2), (7999, 7999))
    )
    content = pictures()[rng.choice(("PNG RGB", "PNG RGBA", "PNG 16 bit", "PNG P"))]
    return content[:8] + chunk(b"IHDR", struct.pack(">II", *size) + content[24:29]) + content[33:]


@cache
def large(width: int, height: int, bits: int, colour: int, pixel: int) -> bytes:
    """A PNG of few bytes and many black pixels, and all of them are there."""
    packer, row = zlib.compressobj(1), bytes(1 + width * pixel)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def real_bomb(rng: Random) -> bytes:
    """RGBA, RGB and 16-bit grey of just the size that is allowed, and of more."""
    return large(
        *rng.choice(((8000, 7999, 8, 6, 4), (8000, 7999, 8, 2, 3), (8000, 7999, 16, 0, 2), (8001, 8000, 8, 0, 1)))
    )


def text_bomb(rng: Random) -> bytes:
    """A small PNG with a note or a colour profile that unpacks to 100 MB."""
    packed = zlib.compress(bytes(100_000_000), 1)
    kind, head = rng.choice(((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")))
    content = pictures()["PNG RGB"]
    return content[:33] + chunk(kind, head + packed) * rng.choice((1, 3)) + content[33:]


def broken_exif(rng: Random) -> bytes:
    image, exif = upright(), pictures()["JPEG turned 6"]
    kind = rng.choice(("JPEG", "PNG", "WEBP"))
    at = exif.index(b"Exif\0\0")
    damaged = flip(rng, exif[at : at + 40], rng.choice((1, 3, 9)), 6)
    return encoded(image, kind, exif=rng.choice((damaged, damaged[:12], b"Exif\0\0", b"Exif\0\0II*\0" + b"\xff" * 30)))


def other_content(rng: Random) -> bytes:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n%%EndComments\n(x) run showpage\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    fits, pdf = b"SIMPLE  =                    T".ljust(2880), b"%PDF-1.4\n%%EOF"
    ppm = b"P6\n48 32\n255\n" + bytes(48 * 32 * 3)
    return rng.choice(
        (postscript, svg, fits, pdf, ppm, b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", rng.randbytes(3000))
    )


def mixed(rng: Random) -> bytes:
    one, other = rng.choice(list(pictures().values())), rng.choice(list(pictures().values()))
    return one[: rng.randrange(len(one))] + other[rng.randrange(len(other)) :]


def noted(rng: Random) -> bytes:
    """Many notes beside the pixels."""
    info = PngImagePlugin.PngInfo()
    for i in range(rng.choice((1, 1000))):
        info.add_text(f"k{i}", "x" * 1000, zip=bool(i % 2))
    return encoded(upright(), "PNG", pnginfo=info)


def any_picture(rng: Random) -> bytes:
    return rng.choice(list(pictures().values()))


def cut(rng: Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


BAD_PICTURES: dict[str, Callable[[Random], bytes]] = {
    "cut": lambda rng: cut(rng, any_picture(rng)),
    "bytes changed": lambda rng: flip(rng, any_picture(rng)),
    "first bytes changed": lambda rng: flip(rng, any_picture(rng), rng.choice((1, 2, 3)), last=64),
    "two mixed": mixed,
    "size is a lie": png_of_size,
    "notes unpack to much": text_bomb,
    "many notes": noted,
    "broken EXIF": broken_exif,
    "another file": other_content,
    **{f"valid: {name}": lambda rng, name=name: pictures()[name] for name in pictures()},
}

# ---- captions

SPECIAL = (
    "[IMG0]",
    "[IMG7]",
    "<ImageHere>",
    "<s>",
    "</s>",
    "<unk>",
    "###",
    "###Human:",
    "<Img>",
    "</Img>",
    "<|endoftext|>",
)
PARTS = ("[IMG", "0]", "<Image", "Here>", "[", "]", "<", ">", "#", "/", "s", "a", " ", "\t", "\u200b", "\u2028", "0")


def tricks(rng: Random) -> str:
    """Special tokens and pieces of them, in any order."""
    return "".join(rng.choice(rng.choice((SPECIAL, PARTS))) for _ in range(rng.choice((1, 3, 20, 200))))


def unicode_noise(rng: Random) -> str:
    return "".join(
        chr(rng.choice((rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(50)
    )


BAD_TEXTS: dict[str, Callable[[Random], str | bytes]] = {  # bytes: not UTF-8, or no text
    "plain": lambda rng: f"a cat and {rng.randrange(9)} dogs",
    "empty": lambda rng: rng.choice(("", " ", "\n\n", "...", "\ufeff", "\t\u3000")),
    "special tokens": lambda rng: rng.choice(SPECIAL),
    "pieces of special tokens": tricks,
    "60 KB": lambda rng: rng.choice(("a", "ab ", "[IMG0]", "<s>", "&amp;", "# ", "\U0001f600", "x1")) * 8_000,
    "60 KB, hard to clean": lambda rng: rng.choice(
        ("&" + "amp;" * 15_000, "a" + "\u0301\u0316" * 15_000, "".join(rng.choices("abcdefghijklmnopqrst", k=60_000)))
    ),
    "1 MB": lambda rng: rng.choice(("a", " ", "a b", "[IMG0]", "<ImageHere>", "#", "&", "\u0301", "\x1b[")) * 1_000_000,
    "not UTF-8": lambda rng: b"caf\xe9 " + rng.randbytes(8) + b"\xff",
    "any characters": unicode_noise,
    "lone surrogates": lambda rng: "a \ud800 b \udfff" + rng.choice(("", "\ud83d", "\ude00")),
    "NUL": lambda rng: "a\0b\0" + tricks(rng),
    "bytes": lambda rng: rng.randbytes(rng.choice((1, 30, 3000))),
}

# ---- safetensors


def safetensors_parts(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(rng: Random, header: dict) -> str:
    return rng.choice([name for name in header if name != "__metadata__"])


def other_type(rng: Random, content: bytes) -> bytes:
    """A tensor in a type of the same width, or in one of another width: then with data to match."""
    header, data = safetensors_parts(content)
    name = one(rng, header)
    begin, end = header[name]["data_offsets"]
    kind = rng.choice(
        ("I32", "U32", "F64", "I64", "C64", "F16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "X7", 5, None)
    )
    width = {"F64": 8, "I64": 8, "C64": 8, "F16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E8M0": 1}.get(
        kind, 4
    )
    header[name]["dtype"], extra = kind, (end - begin) // 4 * width - (end - begin)
    for entry in header.values():
        if "data_offsets" in entry:
            first, last = entry["data_offsets"]
            entry["data_offsets"] = [first + extra * (first >= end), last + extra * (last >= end)]
    middle = data[begin:end] + bytes(extra) if extra > 0 else data[begin : end + extra]
    return safetensors(header, data[:begin] + middle + data[end:])


def other_shape(rng: Random, content: bytes) -> bytes:
    header, data = safetensors_parts(content)
    name = one(rng, header)
    shape = header[name]["shape"]
    size = 1
    for side in shape:
        size *= side
    odd = ([size], [], [1, *shape], shape[::-1], [size, 1, 1], [0], [-1, -size], ["a"], None, [2.0])
    header[name]["shape"] = rng.choice([other for other in odd if other != shape])
    return safetensors(header, data)


def empty_shape(rng: Random, content: bytes) -> bytes:
    """A tensor of no data that claims to be huge in one direction."""
    header, data = safetensors_parts(content)
    name = one(rng, header)
    header[name + rng.choice(("", ".x"))] = {
        "dtype": "F32",
        "shape": [2**40, 0],
        "data_offsets": [len(data), len(data)],
    }
    return safetensors(header, data)


def other_offsets(rng: Random, content: bytes) -> bytes:
    header, data = safetensors_parts(content)
    first, second = header[one(rng, header)], header[one(rng, header)]
    if rng.random() < 0.5 and first is not second and first["shape"] != second["shape"]:
        first["data_offsets"] = second["data_offsets"]
    else:
        first["data_offsets"] = rng.choice(
            ([0, 2**63], [-4, 4], [8, 4], [len(data), len(data) + 4], [1, 2, 3], None, [0, 1e99])
        )
    return safetensors(header, data)


def names_changed(rng: Random, content: bytes) -> bytes:
    header, data = safetensors_parts(content)
    name, kind = one(rng, header), rng.choice(("renamed", "missing", "metadata"))
    if kind == "metadata":
        values = rng.choice(
            (
                {"lora_alpha": "abc"},
                {"lora_alpha": "nan"},
                {"lora_alpha": "0"},
                {"embed_scale": "x"},
                {"embed_scale": "nan"},
                {"a": 1},
                [],
                None,
                {},
            )
        )
        header["__metadata__"] = values
    elif kind == "renamed":
        other = rng.choice(
            (
                "lora_A.weight",
                "a.lora_A.weight",
                "prefix_encoder.embedding.weight",
                "model.embed_tokens.weight",
                "\ud800",
                "",
                name + ".lora_A.weight",
            )
        )
        header[other] = header.pop(name)
    else:
        header.pop(name)
    return safetensors(header, data)


def header_bytes(rng: Random, content: bytes) -> bytes:
    header, data = safetensors_parts(content)
    text = json.dumps(header).encode()
    length = rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1, len(text) + 1, len(text) - 1, len(content)))
    if rng.random() < 0.5:
        return safetensors(text, data, length)
    return safetensors(
        rng.choice((b"[]", b"{}", b"5", b"\xff", b"[" * 100_000, b"", b'{"a":{}}', text[:-1], text + text)), data
    )


BAD_SAFETENSORS: dict[str, Callable[[Random, bytes], bytes]] = {
    "nothing": lambda rng, content: content,
    "cut": cut,
    "bytes of the header changed": lambda rng, content: flip(
        rng, content, last=8 + int.from_bytes(content[:8], "little")
    ),
    "bytes added": lambda rng, content: content + bytes(rng.choice((1, 8, 4096))),
    "another type": other_type,
    "another shape": other_shape,
    "huge and empty": empty_shape,
    "other places": other_offsets,
    "other names": names_changed,
    "header is a lie": header_bytes,
    "another file": lambda rng, content: rng.choice(
        (b"", b"{}", b"<html></html>", b"PK\3\4" + bytes(100), rng.randbytes(999))
    ),
}
MAY_LOAD = {"nothing", "bytes of the header changed", "another type", "other names"}  # of the others none may

# ---- config.json

VALUES = (
    0,
    -1,
    1,
    2,
    3,
    7,
    10**6,
    10**9,
    10**15,
    10**30,
    -(10**15),
    0.5,
    1e-300,
    1e300,
    True,
    False,
    None,
    "",
    "abc",
    "64",
)
VALUES += ([], [1], [64, 64], [0, 0], ["a", None], [10**9] * 4, [1] * 100_000, {}, {"a": 1}, [[]], [-1, 32])
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "1" + "0" * 400, '"\\ud800"', "[" * 5000 + "]" * 5000)


def bad_config(rng: Random, content: dict, what: str) -> bytes:
    text = json.dumps(content)
    if what == "cut":
        return text.encode()[: rng.randrange(len(text))]
    if what == "bytes changed":
        return flip(rng, text.encode(), rng.choice((1, 2, 9)))
    if what == "another file":
        return rng.choice(
            (b"", b"[]", b"5", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' * 50_000, b"\0" * 99, b"{}")
        )
    place, key = content, rng.choice(list(content))
    if isinstance(place[key], dict) and place[key] and rng.random() < 0.9:
        place, key = place[key], rng.choice(list(place[key]))
    if what == "key missing":
        del place[key]
    elif what == "another value":
        place[key] = rng.choice(VALUES)
    elif what == "raw value":
        place[key] = "RAW"
        return json.dumps(content).replace('"RAW"', rng.choice(RAW)).encode()
    return json.dumps(content).encode()


BAD_CONFIGS = (
    "nothing",
    "cut",
    "bytes changed",
    "another file",
    "key missing",
    "another value",
    "another value",
    "raw value",
)
