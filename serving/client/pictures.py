"""Pictures that Pillow reads here: images that it has opened, and files that are scaled or that the server cannot read.

The server reads PNG and JPEG files alone.
"""

import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving.client.errors import SIZE_HINT, ItemError, ShapeError
from serving.client.results import Model
from serving.client.sources import FORMATS, MAGICS
from serving.files.image_headers import BadImage, read_header, without_unread_parts
from serving.files.images import UnknownRange, to_pixels
from serving.files.preparation import shrink

# Larger pictures are shrunk before the server prepares them, which needs no more.
_MAX_PICTURE_BYTES = 2**18
_MAX_PICTURE_PIXELS = 2**20
_JPEG_QUALITY = 90
_SERVED_MAGICS = (b"\x89PNG", b"\xff\xd8\xff")

_Read = TypeVar("_Read")


def pixels_of(content: bytes | Image.Image, model: Model, resize: bool) -> NDArray[np.uint8]:
    """Return an opened image, or the first image of a file, as the model takes it, (C, H, W).

    resize: scale it to the model's size. Raises ItemError, and ShapeError for another size.
    """
    channels, height, width = model.image_shape
    size = (width, height) if resize else None
    pixels = _read(content, lambda image: to_pixels(image, channels, size))
    if pixels.shape != model.image_shape:
        found = f"{pixels.shape[2]} x {pixels.shape[1]}"
        raise ShapeError(f"an image of {found} pixels; {model.name} takes {width} x {height} {SIZE_HINT}")
    return pixels


def file_to_send(content: bytes | Image.Image) -> bytes:
    """Return a picture as a PNG or JPEG file that is not too large to be sent. Raises ItemError."""
    if isinstance(content, bytes) and _is_small(content):
        return content
    return _read(content, lambda image: _file_of(image.copy() if image is content else image))


def is_known_to_server(data: bytes) -> bool:
    """Return False for the file of an image that Pillow knows and the server does not.

    Of any other bytes, the server says why it takes them for no image.
    """
    if data.startswith(_SERVED_MAGICS):
        return True
    if data.startswith(MAGICS):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS):
            return False
    except Exception:  # Pillow raises many kinds of errors for damaged files
        return True


def _read(content: bytes | Image.Image, convert: Callable[[Image.Image], _Read]) -> _Read:
    """Return a picture as ``convert`` gives it. Raises ItemError."""
    try:
        if isinstance(content, Image.Image):
            return convert(content)
        with Image.open(io.BytesIO(without_unread_parts(content)), formats=FORMATS) as image:
            return convert(image)
    except UnknownRange as error:
        raise ItemError(str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow warns of half of what it refuses, and the caller may have made errors of warnings.
        limit = Image.MAX_IMAGE_PIXELS or 0
        pixels = limit if isinstance(error, Image.DecompressionBombWarning) else 2 * limit
        raise ItemError(f"an image of more than {pixels} pixels, Pillow's limit; expected a smaller one") from error
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        if isinstance(content, Image.Image) and (getattr(content, "fp", content) is None or "closed" in str(error)):
            raise ItemError("an opened image whose file was closed before image.load() read it") from error
        raise ItemError("not an image, or a damaged one") from error


def _is_small(data: bytes) -> bool:
    """Return True for a PNG or JPEG file that can be sent as it is."""
    try:
        header = read_header(data)
    except BadImage:
        return False
    return len(data) <= _MAX_PICTURE_BYTES and header.width * header.height <= _MAX_PICTURE_PIXELS


def _file_of(image: Image.Image) -> bytes:
    """Return a shrunk picture as a file: JPEG, or PNG if it has transparent parts or few pixels."""
    small, file = shrink(image), io.BytesIO()
    lossless = small.mode == "RGBA" or small.width * small.height * len(small.getbands()) <= _MAX_PICTURE_BYTES
    small.save(file, "PNG" if lossless else "JPEG", **({} if lossless else {"quality": _JPEG_QUALITY}))
    return file.getvalue()
