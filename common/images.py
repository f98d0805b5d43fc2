"""Pictures before and after they are tensors: safe decoding, square padding, resizing.

The released code resizes with torchvision on Pillow images; only Pillow does arithmetic there, so these few lines give
the same bytes.
"""

import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

MAX_PIXELS, MAX_LENGTH = 64_000_000, 10_000  # a picture with more, or with a longer side, is refused undecoded
MAX_RATIO = 100  # of the sides: a narrower picture would grow too much when it is padded or resized
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow would take more, and start Ghostscript for PostScript
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # texts in a PNG, which nobody reads: 64 MB, not 1 MB


class ImageError(ValueError):
    """A picture that cannot be used; `reason` is a short name to count it under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read_image(source: bytes | str | Path) -> Image.Image:
    """Bytes or a path -> RGB picture, of an animation the first frame, transparent parts on white. Raises ImageError
    with one line. It is turned upright as its EXIF data say, which the released code does not do."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise ImageError("no file", f"{name}: no such file, or not a regular file")  # a pipe would block
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            short, long = sorted(image.size)
            if short * long > MAX_PIXELS or long > min(MAX_LENGTH, MAX_RATIO * short):
                limits = f"{MAX_PIXELS:,} pixels, a side of {MAX_LENGTH:,} or {MAX_RATIO} to 1"
                raise ImageError("too large", f"{name}: {image.width}x{image.height} is over {limits}")
            image.load()
            with suppress(Exception):  # Pillow raises whatever it stumbles over in other EXIF data, after the turn
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F":  # 0 to 1, or 0 to 255
                levels = np.nan_to_num(np.array(image), copy=False)
                levels *= 255 if levels.max() <= 1 else 1
                image = Image.fromarray(levels.clip(0, 255, out=levels).astype(np.uint8))
            if image.mode.startswith("I"):  # 16-bit grey: convert() would only clip it
                levels = np.array(image, np.int32).clip(0, 65535)
                image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    except UnidentifiedImageError:
        raise ImageError("not an image", f"{name}: not an image in one of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too large", f"{name}: {error}") from None
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over: struct.error, zlib.error ...
        raise ImageError("broken image", f"{name}: broken image ({error})") from None


def resize_and_crop(image: Image.Image, size: int, pad: bool) -> Image.Image:
    """RGB picture -> size x size: the short side bilinearly to `size`, then the centre.

    `pad` first sets the whole picture in the middle of a white square, so that nothing is cropped.
    """
    if pad:
        side = max(image.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    short = min(image.size)
    width, height = size * image.width // short, size * image.height // short
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def to_bytes(image: Image.Image) -> torch.Tensor:
    """RGB picture -> uint8 (3, height, width)."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def preprocess_output(image: Image.Image, size: int, pad: bool = True) -> torch.Tensor:
    """An output picture -> uint8 (3, size, size), made square by white padding (`pad`) or by cropping. Bytes, since
    workers and the GPU then copy a quarter of what float32 would be."""
    return to_bytes(resize_and_crop(image, size, pad))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB picture -> float32 (3, height, width) in [0, 1]."""
    return to_bytes(image).float().div_(255)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """(3, height, width) in [-1, 1], clamped -> RGB picture. ValueError where a number is not finite."""
    if not pixels.isfinite().all():
        raise ValueError("the picture is not finite: weights, a checkpoint or --guidance are out of range")
    array = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray((array * 255).round().astype(np.uint8))
