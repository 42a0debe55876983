"""Conversion of a request's images, raw pixels or encoded files, to the pixels that a model takes."""

import io
import math
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
    MAX_SCANS,
    SIZE,
    BadImage,
    ImageHeader,
    check_exif,
    check_scans,
    damaged,
    read_header,
    without_unread_parts,
)
from serving.files.images import to_pixels
from serving.files.preparation import Look, drafted_size, prepare

# The most memory of Pillow for a pixel: coefficients of a progressive JPEG file, and copies of 4 bytes each for
# transparency, orientation and conversion.
_WORK_BYTES_A_PIXEL = 32
# The same for a decoded pixel of a picture that is prepared, and for the preparation, which reduces it first: for one
# of 767 x 767 pixels, 21 MiB were seen.
_WORK_BYTES_A_PICTURE_PIXEL = 4
# A decoder keeps two rows of up to 8 bytes a pixel, and Pillow a pointer to each row.
_WORK_BYTES_A_ROW_OR_COLUMN = 16
_PREPARATION_BYTES = 24 * 2**20
_COEFFICIENT_BYTES = 2  # in libjpeg
# The copies of the segments or chunks that are no pixels: themselves, what Pillow makes of them, and their parts. There
# may be a copy of the file too, without the parts that nothing reads. Those of a small file are not counted.
_PART_COPIES = 3
_SMALL_FILE_BYTES = 2**16
# The most pixels of a JPEG file, of which at most a sixty-fourth is decoded, and of all scans of a picture. Encoders
# write up to 18 scans, and phones take up to 50 million pixels.
_MAX_JPEG_PIXELS = 2**26
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


def file_bytes(data: bytes) -> int:
    """Return the most memory that the decoding of a file takes for copies of its bytes.

    It is 0 if the file is refused by its header.
    """
    if len(data) <= _SMALL_FILE_BYTES:
        return 0
    try:
        return _copied_bytes(data, read_header(data))
    except BadImage:
        return 0


def picture_bytes(data: bytes, max_pixels: int) -> int:
    """Return the most memory that ``from_picture`` takes for a file, beside that of ``decoding_bytes``.

    It is 0 if the file is refused by its header.
    """
    try:
        header = read_header(data)
        _check_picture(header, max_pixels)
    except BadImage:
        return 0
    coefficients = header.coefficients * _COEFFICIENT_BYTES
    width, height = _decoded_size(header)
    decoded = width * height * _WORK_BYTES_A_PICTURE_PIXEL + (width + height) * _WORK_BYTES_A_ROW_OR_COLUMN
    return coefficients + decoded + _PREPARATION_BYTES + _copied_bytes(data, header)


def from_encoded(data: bytes, shape: Shape, field: str, max_bytes: int = MAX_IMAGE_BYTES) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG file of the model's size to (C, H, W) uint8, by the rules of ``to_pixels``.

    The file's bytes, the size in its header and the number of its parts are checked before any pixel is decompressed.
    An animated PNG file counts as its default image. Raises RefusedImage with ``field``.
    """

    def check(header: ImageHeader) -> None:
        # In either order, since the orientation is not read yet.
        if sorted((header.width, header.height)) != sorted(shape[1:]):
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

    max_pixels: the most pixels that are decoded; a JPEG file is decoded at a reduced size. Checks and raises as
    ``from_encoded``.
    """
    return _from_file(
        data, field, max_bytes, lambda header: _check_picture(header, max_pixels), lambda one: prepare(one, shape, look)
    )


def _check_picture(header: ImageHeader, max_pixels: int) -> None:
    """Raise BadImage for a picture that is too large."""
    pixels, decoded = header.width * header.height, math.prod(_decoded_size(header))
    text = f"a {header.format} image of {header.width} x {header.height} pixels"
    if header.format == "JPEG" and pixels > _MAX_JPEG_PIXELS:
        raise BadImage(SIZE, f"{text}; the limit is {_MAX_JPEG_PIXELS} in all")
    if not 0 < decoded <= max_pixels:
        text += f", {decoded} of them decoded" * (decoded != pixels)
        raise BadImage(SIZE, f"{text}; the limit is {max_pixels} in all (max_picture_pixels)")


def _decoded_size(header: ImageHeader) -> tuple[int, int]:
    """Return the width and height to which a picture is decoded before it is prepared."""
    size = header.width, header.height
    return drafted_size(size) if header.format == "JPEG" else size


def _copied_bytes(data: bytes, header: ImageHeader) -> int:
    """Return the bytes of a file's parts of which its decoding has copies, as often as there are copies."""
    if len(data) <= _SMALL_FILE_BYTES:
        return 0
    return _PART_COPIES * header.other_bytes + len(data) * header.copied


def _of_wrong_size(header: ImageHeader, shape: Shape) -> BadImage:
    text = f"a {header.format} image of {header.width} x {header.height} pixels; expected {shape[2]} x {shape[1]}"
    return BadImage(SIZE, f"{text}, or a preparation of it (preprocess)")


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
        if header.format == "JPEG":
            limit = min(MAX_SCANS, max(1, _MAX_SCANNED_PIXELS // (header.width * header.height)))
            check_scans(data, limit, " of this size" * (limit < MAX_SCANS))
        return _decode(data, header, check, convert)
    except BadImage as error:
        raise RefusedImage(field, error) from error


def _decode(
    data: bytes, header: ImageHeader, check: Callable[[ImageHeader], None], convert: Callable[[Image.Image], Images]
) -> Images:
    """Return the pixels of a file whose header was checked. Raises BadImage."""
    try:
        # The class of the format: Image.open would warn of large images on the server's terminal.
        with _OPENERS[header.format](io.BytesIO(without_unread_parts(data))) as image:
            # Pillow reads the size by itself, and a second header in the file may give it another one.
            check(header._replace(width=image.width, height=image.height))
            if raw := image.info.get("Raw profile type exif"):  # ImageMagick's text, from which Pillow reads EXIF too
                check_exif(header.format, bytes.fromhex("".join(raw.split("\n")[3:])))
            return convert(image)
    except BadImage:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise damaged(header.format, data) from error
