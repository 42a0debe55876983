"""From raw pixels or an encoded file to the pixels that a model takes.

Training on a folder of images reads them by the same rules, so that a network is served what it was trained on.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from serving.errors import InvalidRequest

_FORMATS = {b"\x89PNG\r\n\x1a\n": ("PNG", PngImageFile), b"\xff\xd8\xff": ("JPEG", JpegImageFile)}
_MODES = {1: "L", 3: "RGB"}
# EXIF's orientation tag. Pillow's own exif_transpose also writes the other tags anew, and fails on odd ones.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Shape = tuple[int, int, int]
Images = NDArray[np.uint8]


def limit_metadata() -> None:
    """Let Pillow, in this process, unpack no more than 1 MiB of a PNG file's texts, which nothing here reads.

    By default it is 64 MiB, and a small file can make it unpack all of it.
    """
    PngImagePlugin.MAX_TEXT_CHUNK = 2**18
    PngImagePlugin.MAX_TEXT_MEMORY = 2**20


def from_pixels(pixels: bytes, shape: Shape, field: str) -> NDArray[np.uint8]:
    """Raw pixels, one byte each, channel by channel and row by row, to (C, H, W) uint8.

    Raises InvalidRequest naming ``field`` where the number of bytes is not C x H x W.
    """
    channels, height, width = shape
    if len(pixels) != channels * height * width:
        raise InvalidRequest(
            field,
            f"{len(pixels)} bytes; expected {channels * height * width} "
            f"({channels} x {height} x {width}, one byte a pixel)",
        )
    return np.frombuffer(pixels, np.uint8).reshape(shape)


def from_encoded(data: bytes, shape: Shape, field: str) -> NDArray[np.uint8]:
    """A PNG or JPEG file of the model's size to (C, H, W) uint8.

    Colours become grey where the model takes one channel; 16-bit grey keeps its upper byte; transparency is laid on
    black; a JPEG's orientation tag is obeyed. The size in the file's header is checked before any pixel is
    decompressed. Raises InvalidRequest naming ``field``.
    """
    name, opener = next((found for magic, found in _FORMATS.items() if data.startswith(magic)), (None, None))
    if opener is None:
        raise InvalidRequest(field, f"{len(data)} bytes that are neither a PNG nor a JPEG file")
    channels, height, width = shape
    try:
        # The format's own class, since Image.open warns of large images on the server's terminal.
        with opener(io.BytesIO(data)) as image:
            if sorted(image.size) != sorted((width, height)):  # either way round: the orientation is not read yet
                raise InvalidRequest(
                    field, f"a {name} image of {image.width} x {image.height} pixels; expected {width} x {height}"
                )
            pixels = to_pixels(image, channels)
    except InvalidRequest:
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise InvalidRequest(field, f"a {name} file of {len(data)} bytes that is damaged or cut off") from error
    if pixels.shape[1:] != (height, width):
        raise InvalidRequest(
            field, f"a {name} image of {pixels.shape[2]} x {pixels.shape[1]} pixels; expected {width} x {height}"
        )
    return pixels


def to_pixels(image: Image.Image, channels: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """An opened image to (C, H, W) uint8, scaled to ``size`` (width, height) where it is given.

    Raises what Pillow raises on damaged files.
    """
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    upright = _with_mode(image.transpose(turn) if turn is not None else image, _MODES[channels])
    if size and upright.size != size:
        upright = upright.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(upright, np.uint8)
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1))


def _with_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert(mode)
