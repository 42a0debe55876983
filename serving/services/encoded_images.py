"""Conversion of a request's images, raw pixels or encoded files, to the pixels that a model takes."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from serving.errors import InvalidRequest
from serving.files.image_headers import (
    BYTES,
    MAX_IMAGE_BYTES,
    SIZE,
    BadImage,
    ImageHeader,
    check_exif,
    damaged,
    read_header,
)
from serving.files.images import to_pixels

# The most memory of Pillow for a pixel: coefficients of a progressive JPEG file, and copies of 4 bytes each for
# transparency, orientation and conversion.
_WORK_BYTES_A_PIXEL = 32
_OPENERS = {"PNG": PngImageFile, "JPEG": JpegImageFile}

Shape = tuple[int, int, int]
Images = NDArray[np.uint8]


class RefusedImage(InvalidRequest):
    """An encoded image is not decoded. cause: one of ``IMAGE_CAUSES``."""

    def __init__(self, field: str, error: BadImage) -> None:
        super().__init__(field, str(error))
        self.cause = error.cause


def decoding_bytes(shape: Shape, images: int) -> int:
    """Return the most memory that the decoding of encoded images of this shape takes, one after the other."""
    channels, height, width = shape
    return height * width * (images * channels + _WORK_BYTES_A_PIXEL)


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


def from_encoded(data: bytes, shape: Shape, field: str, max_bytes: int = MAX_IMAGE_BYTES) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG file of the model's size to (C, H, W) uint8, by the rules of ``to_pixels``.

    The file's bytes, the size in its header and the number of its parts are checked before any pixel is decompressed.
    An animated PNG file counts as its default image. Raises RefusedImage with ``field``.
    """
    try:
        if len(data) > max_bytes:
            raise BadImage(BYTES, f"{len(data)} bytes; the limit is {max_bytes} bytes (max_image_bytes)")
        header = read_header(data)
        _check_size(header, shape)
        return _decode(data, header, shape)
    except BadImage as error:
        raise RefusedImage(field, error) from error


def _check_size(header: ImageHeader, shape: Shape) -> None:
    _, height, width = shape
    # In either order, since the orientation is not read yet.
    if sorted(header[1:]) != sorted((width, height)):
        raise _of_wrong_size(header, shape)


def _of_wrong_size(header: ImageHeader, shape: Shape) -> BadImage:
    name, width, height = header
    return BadImage(SIZE, f"a {name} image of {width} x {height} pixels; expected {shape[2]} x {shape[1]}")


def _decode(data: bytes, header: ImageHeader, shape: Shape) -> NDArray[np.uint8]:
    """Return the pixels of a file whose header was checked. Raises BadImage."""
    channels, height, width = shape
    try:
        # The class of the format: Image.open would warn of large images on the server's terminal.
        with _OPENERS[header.format](io.BytesIO(data)) as image:
            # Pillow reads the size by itself, and a second header in the file may give it another one.
            _check_size(header._replace(width=image.width, height=image.height), shape)
            if raw := image.info.get("Raw profile type exif"):  # ImageMagick's text, from which Pillow reads EXIF too
                check_exif(header.format, bytes.fromhex("".join(raw.split("\n")[3:])))
            pixels = to_pixels(image, channels)
    except BadImage:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise damaged(header.format, data) from error
    if pixels.shape[1:] != (height, width):
        raise _of_wrong_size(header._replace(width=pixels.shape[2], height=pixels.shape[1]), shape)
    return pixels
