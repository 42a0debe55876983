"""Conversion of a request's images, raw pixels or encoded files, to the pixels that a model takes."""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from serving.errors import InvalidRequest
from serving.files.image_headers import (
    BYTES,
    MAX_IMAGE_BYTES,
    PARTS,
    SIZE,
    BadImage,
    ImageHeader,
    check_exif,
    count_scans,
    damaged,
    read_header,
    without_unread_texts,
)
from serving.files.images import to_pixels
from serving.files.preparation import Look, prepare

# The most memory of Pillow for a pixel: coefficients of a progressive JPEG file, and copies of 4 bytes each for
# transparency, orientation and conversion.
_WORK_BYTES_A_PIXEL = 32
# The same for a picture that is prepared: it is reduced first, and its preparation takes no more than the second.
_WORK_BYTES_A_PICTURE_PIXEL = 14
_PREPARATION_BYTES = 2**25
# The most pixels of all scans of a picture. Encoders write up to 18 scans.
_MAX_SCANNED_PIXELS = 2**28
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


def picture_bytes(data: bytes, max_pixels: int) -> int:
    """Return the most memory that ``from_picture`` takes for a file, beside that of ``decoding_bytes``.

    It is 0 if the file is refused by its header.
    """
    try:
        header = read_header(data)
    except BadImage:
        return 0
    pixels = header.width * header.height
    return 0 if pixels > max_pixels else pixels * _WORK_BYTES_A_PICTURE_PIXEL + _PREPARATION_BYTES


def from_encoded(data: bytes, shape: Shape, field: str, max_bytes: int = MAX_IMAGE_BYTES) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG file of the model's size to (C, H, W) uint8, by the rules of ``to_pixels``.

    The file's bytes, the size in its header and the number of its parts are checked before any pixel is decompressed.
    An animated PNG file counts as its default image. Raises RefusedImage with ``field``.
    """

    def check(header: ImageHeader) -> None:
        # In either order, since the orientation is not read yet.
        if sorted(header[1:]) != sorted(shape[1:]):
            raise _of_wrong_size(header, shape)

    def convert(image: Image.Image) -> Images:
        pixels = to_pixels(image, shape[0])
        if pixels.shape != shape:
            name = image.format or ""
            raise _of_wrong_size(ImageHeader(name, width=pixels.shape[2], height=pixels.shape[1]), shape)
        return pixels

    return _from_file(data, field, max_bytes, check, convert)


def from_picture(
    data: bytes, shape: Shape, look: Look, field: str, max_bytes: int, max_pixels: int
) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG file of any size, and prepare it for the model, (C, H, W) uint8, as ``prepare`` does.

    max_pixels: the most pixels of the file. Checks and raises as ``from_encoded``.
    """

    def check(header: ImageHeader) -> None:
        name, width, height = header
        if not 0 < (pixels := width * height) <= max_pixels:
            text = f"a {name} image of {width} x {height} pixels; the limit is {max_pixels} in all (max_picture_pixels)"
            raise BadImage(SIZE, text)
        if name == "JPEG" and pixels * (scans := count_scans(data)) > _MAX_SCANNED_PIXELS:
            text = f"a JPEG image of {width} x {height} pixels with {scans} scans; the limit is "
            raise BadImage(PARTS, text + f"{max(1, _MAX_SCANNED_PIXELS // pixels)} scans of this size")

    return _from_file(data, field, max_bytes, check, lambda image: prepare(image, shape, look))


def _of_wrong_size(header: ImageHeader, shape: Shape) -> BadImage:
    name, width, height = header
    return BadImage(SIZE, f"a {name} image of {width} x {height} pixels; expected {shape[2]} x {shape[1]}")


def _from_file(
    data: bytes,
    field: str,
    max_bytes: int,
    check: Callable[[ImageHeader], None],
    convert: Callable[[Image.Image], Images],
) -> Images:
    """Return the pixels of a file. check: raises BadImage for a wrong size. Raises RefusedImage with ``field``."""
    try:
        if len(data) > max_bytes:
            raise BadImage(BYTES, f"{len(data)} bytes; the limit is {max_bytes} bytes (max_image_bytes)")
        header = read_header(data)
        check(header)
        return _decode(data, header, check, convert)
    except BadImage as error:
        raise RefusedImage(field, error) from error


def _decode(
    data: bytes, header: ImageHeader, check: Callable[[ImageHeader], None], convert: Callable[[Image.Image], Images]
) -> Images:
    """Return the pixels of a file whose header was checked. Raises BadImage."""
    try:
        # The class of the format: Image.open would warn of large images on the server's terminal.
        with _OPENERS[header.format](io.BytesIO(without_unread_texts(data))) as image:
            # Pillow reads the size by itself, and a second header in the file may give it another one.
            check(header._replace(width=image.width, height=image.height))
            if raw := image.info.get("Raw profile type exif"):  # ImageMagick's text, from which Pillow reads EXIF too
                check_exif(header.format, bytes.fromhex("".join(raw.split("\n")[3:])))
            return convert(image)
    except BadImage:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise damaged(header.format, data) from error
