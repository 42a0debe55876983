"""Tests of the decoding of encoded images."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from serving.errors import InvalidRequest
from serving.services.encoded_images import from_encoded

GREY = (1, 28, 28)
RAMP = np.arange(784, dtype=np.uint16).reshape(28, 28)


def _encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _ramp8() -> Image.Image:
    return Image.fromarray((RAMP % 256).astype(np.uint8))


def test_grey_pixels_arrive_as_they_are() -> None:
    assert (from_encoded(_encode(_ramp8()), GREY, "f")[0] == RAMP % 256).all()


def test_a_jpeg_is_close_to_its_pixels() -> None:
    smooth = Image.linear_gradient("L").resize((28, 28))
    decoded = from_encoded(_encode(smooth, "JPEG", quality=95), GREY, "f")[0]
    assert np.abs(decoded.astype(int) - np.asarray(smooth).astype(int)).max() < 8


def test_colour_becomes_grey_for_a_grey_model_and_stays_for_a_colour_model() -> None:
    data = _encode(Image.new("RGB", (28, 28), (255, 0, 0)))
    assert (from_encoded(data, GREY, "f") == 76).all()
    assert (from_encoded(data, (3, 28, 28), "f")[:, 0, 0] == (255, 0, 0)).all()


def test_16_bit_grey_keeps_its_upper_byte() -> None:
    assert (from_encoded(_encode(Image.fromarray(RAMP * 64)), GREY, "f")[0] == RAMP * 64 // 256).all()


def test_transparency_shows_black() -> None:
    data = _encode(Image.new("LA", (28, 28), (255, 0)))
    assert (from_encoded(data, GREY, "f") == 0).all()


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "CMYK"])
def test_other_modes_become_grey(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = Image.new("RGB", (28, 28), "white").convert(mode)
    assert from_encoded(_encode(image, kind), GREY, "f").min() > 250


def test_a_jpegs_orientation_is_obeyed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    image = Image.new("L", (28, 28))
    image.paste(255, (0, 0, 28, 14))
    decoded = from_encoded(_encode(image, "JPEG", exif=exif, quality=95), GREY, "f")[0]
    assert decoded[:, 20:].min() > 200
    assert decoded[:, :8].max() < 50


def _flip(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0xFF
    return bytes(changed)


@pytest.mark.parametrize("encode", [lambda: _encode(_ramp8()), lambda: _encode(_ramp8(), "JPEG")], ids=["PNG", "JPEG"])
def test_any_cut_or_changed_byte_gives_an_image_or_a_refusal_and_never_another_error(
    encode: Callable[[], bytes],
) -> None:
    data = encode()
    broken = [data[:length] for length in range(len(data))] + [_flip(data, index) for index in range(len(data))]
    for candidate in broken:
        try:
            assert from_encoded(candidate, GREY, "images[0].encoded").shape == GREY
        except InvalidRequest as error:
            assert str(error).startswith("images[0].encoded: ")


def test_an_orientation_beside_an_odd_tag_is_obeyed() -> None:
    """The tag is a resolution written as text. Pillow reads it, but fails when it writes it again."""
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x011A, 2, 1, b"a")
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
    image = Image.new("L", (28, 28))
    image.paste(255, (0, 0, 28, 14))
    data = _encode(image, "JPEG", quality=95)
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert from_encoded(data, GREY, "f")[0, :, 20:].min() > 200
