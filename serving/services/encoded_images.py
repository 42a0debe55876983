"""Conversion of a request's images, raw pixels or encoded files, to the pixels that a model takes."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from serving.errors import InvalidRequest
from serving.files.images import to_pixels

_FORMATS = {b"\x89PNG\r\n\x1a\n": ("PNG", PngImageFile), b"\xff\xd8\xff": ("JPEG", JpegImageFile)}

Shape = tuple[int, int, int]
Images = NDArray[np.uint8]


def from_pixels(pixels: bytes, shape: Shape, field: str) -> NDArray[np.uint8]:
    """Read raw pixels, one byte each, channel by channel and row by row, as (C, H, W) uint8.

    Raises InvalidRequest with ``field`` if the number of bytes is not C x H x W.
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
    """Decode a PNG or JPEG file of the model's size to (C, H, W) uint8, by the rules of ``to_pixels``.

    The size in the file's header is checked before any pixel is decompressed. Raises InvalidRequest with ``field``.
    """
    name, opener = next((found for magic, found in _FORMATS.items() if data.startswith(magic)), (None, None))
    if opener is None:
        raise InvalidRequest(field, f"{len(data)} bytes that are neither a PNG nor a JPEG file")
    channels, height, width = shape
    try:
        # The class of the format: Image.open would warn of large images on the server's terminal.
        with opener(io.BytesIO(data)) as image:
            if sorted(image.size) != sorted((width, height)):  # in either order, since the orientation is not read yet
                raise InvalidRequest(
                    field, f"a {name} image of {image.width} x {image.height} pixels; expected {width} x {height}"
                )
            pixels = to_pixels(image, channels)
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise InvalidRequest(field, f"a {name} file of {len(data)} bytes that is damaged or cut off") from error
    if pixels.shape[1:] != (height, width):
        raise InvalidRequest(
            field, f"a {name} image of {pixels.shape[2]} x {pixels.shape[1]} pixels; expected {width} x {height}"
        )
    return pixels
