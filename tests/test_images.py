"""Pictures of every kind become upright RGB; what is none fails in one line with a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from common import images
from common.images import ImageError, read_image, resize_and_crop, to_image, to_tensor


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_modes():
    grey = Image.new("L", (6, 4), 128)
    sixteen_bit = Image.fromarray(np.full((4, 6), 128 * 257, dtype=np.uint16))
    half_transparent = Image.new("RGBA", (6, 4), (0, 0, 0, 127))
    cases = {
        "grey": encoded(grey, "PNG"),
        "palette": encoded(grey.convert("P"), "PNG"),
        "CMYK": encoded(Image.new("CMYK", (6, 4), (0, 0, 0, 127)), "JPEG", quality=100),
        "16 bit": encoded(sixteen_bit, "PNG"),
        "transparent": encoded(half_transparent, "PNG"),
        "animated": encoded(grey.convert("RGB"), "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4))]),
    }
    for name, content in cases.items():
        image = read_image(content)
        assert (image.mode, image.size) == ("RGB", (6, 4)), name
        assert np.abs(np.asarray(image).astype(int) - 128).max() <= 2, name  # all are the same mid grey


def test_sixteen_bits_are_rounded():
    dark = Image.fromarray(np.full((4, 6), 200, dtype=np.uint16))
    assert read_image(encoded(dark, "PNG")).getpixel((0, 0)) == (1, 1, 1)  # 200 / 257


def test_upright():
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert read_image(encoded(image, "JPEG", exif=exif)).size == (4, 6)


def test_errors(tmp_path, monkeypatch):
    jpeg = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    for content, reason in ((b"text", "not an image"), (b"", "not an image"), (jpeg[:300], "broken image")):
        with pytest.raises(ImageError) as error:
            read_image(content)
        assert error.value.reason == reason and "\n" not in str(error.value)
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        read_image(tmp_path / "missing.png")
    for size in ((10_001, 200), (1010, 10)):
        with pytest.raises(ImageError) as error:
            read_image(encoded(Image.new("L", size), "PNG"))
        assert error.value.reason == "too large"
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(ImageError, match="64x64 is over"):
        read_image(jpeg)


def test_square():
    image = Image.new("RGB", (8, 4), "black")
    padded = np.asarray(resize_and_crop(image, 8, pad=True))
    assert (padded[:2] == 255).all() and (padded[2:6] == 0).all() and (padded[6:] == 255).all()
    assert (np.asarray(resize_and_crop(image, 8, pad=False)) == 0).all()


def test_there_and_back():
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    assert to_image(to_tensor(image) * 2 - 1).tobytes() == image.tobytes()
