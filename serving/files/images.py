"""Image files to the pixels that a model takes.

The server, the client and training share these rules, so that a network is served what it was trained on.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

MAX_GREY = 2**16 - 1
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


class UnknownRange(ValueError):
    """An image whose values cannot be brought to 8 bits, since nothing says which of them are black and white."""


def limit_metadata() -> None:
    """Let Pillow, in this process, unpack no more than 1 MiB of a PNG file's texts, which nothing here reads.

    By default it is 64 MiB, and a small file can make it unpack all of it.
    """
    PngImagePlugin.MAX_TEXT_CHUNK = 2**18
    PngImagePlugin.MAX_TEXT_MEMORY = 2**20


def to_pixels(image: Image.Image, channels: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Turn an opened image into (C, H, W) uint8, scaled to ``size`` (width, height) where it is given.

    Colours become grey for one channel; 16-bit grey keeps its upper byte; transparency is laid on black; an EXIF
    orientation is obeyed. Raises UnknownRange, and what Pillow raises on damaged files.
    """
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    upright = _with_mode(image.transpose(turn) if turn is not None else image, _MODES[channels])
    if size and upright.size != size:
        upright = upright.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(upright, np.uint8)
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1))


def _with_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise UnknownRange("pixels in floating point, whose range is not known; save them with 8 or 16 bits each")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > MAX_GREY:
            raise UnknownRange(f"grey values beyond 0 to {MAX_GREY}; save them with 8 or 16 bits each")
        return Image.fromarray((pixels.astype(np.uint32) >> 8).astype(np.uint8)).convert(mode)
    if image.mode == "La":  # the one mode that Pillow converts to its own kind alone
        image = image.convert("LA")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB").convert(mode) if image.mode == "LAB" else image.convert(mode)
