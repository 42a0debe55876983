"""Pictures of answers, as PNG files and as text for terminals.

Axes: C channels, H rows, W columns. A picture is (H, W, 3) uint8: red, green and blue.
"""

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]

#: The characters of a terminal without colours, from dark to bright.
RAMP = " .:-=+*#%@"
# Those of a relevance map: the ramp has no minus, which stands for a negative number.
_POSITIVE_RAMP, _NEGATIVE = " .:+*#%@", "-"
# The least share of the largest number for a negative one to be shown.
_MIN_NEGATIVE_SHARE = 0.15
# Orange and blue, which colour-blind people tell apart.
_POSITIVE_COLOUR, _NEGATIVE_COLOUR = (255, 140, 0), (40, 120, 255)
# The brightness of the image under a relevance map.
_DIMMED = 0.7
_GAP_PIXELS = 2
_GAP_GREY = 96
_GAP_COLUMNS = 2
_DEFAULT_COLUMNS = 80
_UPPER_HALF = "▀"
_RESET = "\x1b[0m"


class Drawing(NamedTuple):
    """A picture with its caption. signed: (H, W), the numbers that it shows, for terminals without colours; or None."""

    caption: str
    picture: Picture
    signed: NDArray[np.float32] | None = None


def picture_of(pixels: NDArray[np.uint8]) -> Picture:
    """Return an image (C, H, W) as a picture. Unless it has three channels, it becomes grey."""
    if len(pixels) == 3:
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))
    grey = pixels.mean(0).astype(np.uint8)
    return np.repeat(grey[..., np.newaxis], 3, axis=-1)


def overlay(pixels: NDArray[np.uint8], relevance: NDArray[np.float32]) -> Picture:
    """Return an image (C, H, W) under its relevance (H, W): orange for positive numbers, blue for negative ones."""
    shares = np.abs(relevance) / max(float(np.abs(relevance).max(initial=0)), 1e-12)
    colours = np.where((relevance >= 0)[..., np.newaxis], _POSITIVE_COLOUR, _NEGATIVE_COLOUR)
    weights = shares[..., np.newaxis]
    mixed: Picture = np.rint((1 - weights) * _DIMMED * picture_of(pixels) + weights * colours).astype(np.uint8)
    return mixed


def strip(pictures: Sequence[Picture]) -> Picture:
    """Return pictures of the same height side by side, with grey gaps."""
    gap = np.full((len(pictures[0]), _GAP_PIXELS, 3), _GAP_GREY, np.uint8)
    parts = [part for picture in pictures for part in (gap, picture)][1:]
    return np.concatenate(parts, axis=1)


def to_png(picture: NDArray[np.uint8], scale: int = 1) -> bytes:
    """Return a picture (H, W, 3), or an image (C, H, W) with one channel, as a PNG file, each pixel ``scale`` wide."""
    array = picture[0] if picture.shape[0] == 1 else picture
    file = io.BytesIO()
    Image.fromarray(array.repeat(scale, 0).repeat(scale, 1)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Terminal:
    """The abilities of a terminal, or of a file that text goes to.

    colours: True for 24-bit colours and half blocks, of which one shows two pixels; False for ASCII.
    columns: the width in characters.
    """

    colours: bool
    columns: int

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str]) -> Self:
        """Return the abilities that a stream and the environment's variables tell: COLORTERM and NO_COLOR."""
        colours = (
            stream.isatty()
            and environment.get("COLORTERM", "").lower() in ("truecolor", "24bit")
            and not environment.get("NO_COLOR")
            and (stream.encoding or "").lower().startswith("utf")
        )
        columns = shutil.get_terminal_size((_DEFAULT_COLUMNS, 1)).columns if stream.isatty() else _DEFAULT_COLUMNS
        return cls(colours, columns)

    def lines(self, drawings: Sequence[Drawing]) -> list[str]:
        """Return drawings of the same size as lines: side by side, in as many rows as the width asks for."""
        if not drawings:
            return []
        fitting = [self._fit(drawing) for drawing in drawings]
        width = max(fitting[0].picture.shape[1], *(min(len(one.caption), self.columns) for one in fitting))
        in_row = max(1, (self.columns + _GAP_COLUMNS) // (width + _GAP_COLUMNS))
        result: list[str] = []
        for first in range(0, len(fitting), in_row):
            row = fitting[first : first + in_row]
            gap = " " * _GAP_COLUMNS
            result.append(gap.join(f"{one.caption[: self.columns]:<{width}}" for one in row).rstrip())
            padding = " " * (width - row[0].picture.shape[1])
            columns = [self._draw(one) for one in row]
            result += [gap.join(line + padding for line in lines).rstrip(" ") for lines in zip(*columns, strict=True)]
        return result

    def _fit(self, drawing: Drawing) -> Drawing:
        """Shrink a drawing that is wider than the terminal."""
        height, width = drawing.picture.shape[:2]
        if width <= self.columns:
            return drawing
        size = self.columns, max(1, round(height * self.columns / width))
        signed = None if drawing.signed is None else _resized(drawing.signed, size)
        return drawing._replace(picture=_resized(drawing.picture, size), signed=signed)

    def _draw(self, drawing: Drawing) -> list[str]:
        if self.colours:
            return list(_half_blocks(drawing.picture))
        return _shades(drawing.picture) if drawing.signed is None else _signs(drawing.signed)


def _resized(array: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BOX))


def _even(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array with an even number of rows: the last one, if it is alone, is repeated."""
    return array if len(array) % 2 == 0 else np.concatenate([array, array[-1:]])


def _half_blocks(picture: Picture) -> Iterator[str]:
    """Yield a picture's lines of half blocks: the colour of the upper pixel on that of the lower one."""
    rows = _even(picture).tolist()
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        line, last = "", None
        for pair in zip(upper, lower, strict=True):
            if pair != last:
                (red, green, blue), (red2, green2, blue2) = pair
                line += f"\x1b[38;2;{red};{green};{blue};48;2;{red2};{green2};{blue2}m"
                last = pair
            line += _UPPER_HALF
        yield line + _RESET


def _shades(picture: Picture) -> list[str]:
    """Return a picture's lines of ASCII: a character for each two pixels, one above the other."""
    grey = _even(picture.mean(-1)).reshape(-1, 2, picture.shape[1]).mean(1)
    return _ramp(grey / 255, RAMP)


def _signs(numbers: NDArray[np.float32]) -> list[str]:
    """Return the lines of a relevance map: denser characters for larger numbers, minus for clearly negative ones."""
    halves = _even(numbers).reshape(-1, 2, numbers.shape[1]).mean(1)
    shares = halves / max(float(np.abs(halves).max(initial=0)), 1e-12)
    lines = _ramp(np.maximum(shares, 0), _POSITIVE_RAMP)
    negative = shares < -_MIN_NEGATIVE_SHARE
    return [
        "".join(_NEGATIVE if below else character for character, below in zip(line, row, strict=True))
        for line, row in zip(lines, negative, strict=True)
    ]


def _ramp(shares: NDArray[Any], characters: str) -> list[str]:
    """Return the characters of numbers from 0 to 1, a line for each row."""
    levels = np.rint(shares * (len(characters) - 1)).astype(int)
    return ["".join(characters[level] for level in row) for row in levels.tolist()]
