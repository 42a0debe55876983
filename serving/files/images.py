"""Conversion of image files to the pixels that a model takes.

Server, client and training share these rules, so that a served network gets the same pixels as in training.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from serving.files.image_headers import MAX_TEXT_BYTES

MAX_GREY_VALUE = 2**16 - 1
#: Pillow's modes.
MODES_BY_CHANNELS = {1: "L", 3: "RGB"}
# EXIF's orientation tag. Pillow's exif_transpose also rewrites the other tags, and fails on odd ones.
_ORIENTATION_TAG = 0x0112
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnknownRange(ValueError):
    """An image that cannot be converted to 8 bits, since nothing says which values are black and white."""


def limit_metadata() -> None:
    """Limit the texts of a PNG file that Pillow unpacks in this process to 256 KiB. Only EXIF and XMP are read.

    The default is 64 MiB, and a small file can make Pillow unpack all of it.
    """
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT_BYTES  # of a colour profile too
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES


def to_pixels(image: Image.Image, channels: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Convert an opened image to (C, H, W) uint8, scaled to ``size`` (width, height) if it is given.

    With one channel, colours become grey. 16-bit grey keeps its upper byte. Transparent parts become black. An EXIF
    orientation is obeyed. Raises UnknownRange, and any error of Pillow for a damaged file.
    """
    turn = turn_of(image)
    turned = with_mode(image if turn is None else image.transpose(turn), MODES_BY_CHANNELS[channels])
    if size and turned.size != size:
        turned = turned.resize(size, Image.Resampling.BILINEAR)
    return channels_first(turned)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return the turn that the EXIF orientation of an opened image asks for. Raises any error of Pillow."""
    if image.format == "TIFF":
        image.load()  # Pillow itself turns such an image while it decodes it
    return _TRANSPOSE_BY_ORIENTATION.get(image.getexif().get(_ORIENTATION_TAG, 1))


def channels_first(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image of the mode L or RGB as (C, H, W) uint8."""
    pixels = np.asarray(image, np.uint8)
    channels = len(image.getbands())
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1))


def with_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to the mode L or RGB; transparent parts become black. Raises UnknownRange."""
    if image.mode == "F":
        raise UnknownRange("pixels in floating point, whose range is not known; save them with 8 or 16 bits each")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > MAX_GREY_VALUE:
            raise UnknownRange(f"grey values beyond 0 to {MAX_GREY_VALUE}; save them with 8 or 16 bits each")
        return Image.fromarray((pixels.astype(np.uint32) >> 8).astype(np.uint8)).convert(mode)
    if image.mode == "La":  # Pillow converts this mode to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB").convert(mode) if image.mode == "LAB" else image.convert(mode)
