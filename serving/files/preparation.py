"""Preparation of pictures, such as photographs of paper, for a model: they get the look of its training images.

A digit of MNIST is a bright stroke on black, 20 pixels high or wide, anti-aliased, with its centre of mass in the
middle of the image (LeCun et al., 1998, section III.A). A person's picture is none of this: dark ink on paper under
uneven light, somewhere on a large sheet. Axes: h x w of the picture, H x W of the model, C channels.
"""

from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from serving.files.images import MODES_BY_CHANNELS, channels_first, turn_of, with_mode

#: Polarities of images, as ``Look`` has them.
BRIGHT_ON_DARK, DARK_ON_BRIGHT = "bright-on-dark", "dark-on-bright"

# Pictures are reduced to a longer side below twice this, in which a digit of a tenth of a photo's height has 40 pixels.
_WORK_SIDE_PIXELS = 384
# Pixels of a picture that are converted at once before they are reduced.
_BLOCK_PIXELS = 2**18
# The longer side of the copies in which polarity, ground and groups of ink are found.
_POLARITY_SIDE_PIXELS = 96
_GROUND_SIDE_PIXELS = 192
_GROUPS_SIDE_PIXELS = 160
# The longer side of the object before its last scaling, by that of the object.
_OVERSAMPLING = 8
# The smallest difference of ink from ground. A photograph of empty paper has less: its noise.
_MIN_CONTRAST = 16.0
# The same for the vote on the polarity.
_NARROW_SHARES = (0.07, 0.11, 0.17)
# The grey level of the darkest paper whose ink is not taken for darker than it is.
_MIN_PAPER_GREY = 40.0
# A smaller picture is no photograph with shadows, and its strokes have few pixels to be measured by.
_MIN_SHADOWED_PIXELS = 64
# The widths of strokes that are tried, as shares of the picture's longer side, and the share of the ink that must show.
_STROKE_SHARES = (0.04, 0.07, 0.11, 0.17, 0.25, 0.35)
_ERODED_SHARE = 0.98
# Groups of less ink than this share of the largest group are specks.
_SPECK_SHARE = 0.08
# A group at the picture's edge is a shadow or the end of the paper if others have this share of its ink.
_INNER_SHARE = 0.25
# Ink of this grey level is not made brighter.
_FULL_INK = 240.0
# The share of the ink's grey level from which a pixel belongs to the object's box.
_EDGE_SHARE = 0.15
# Strokes thinner than the first are widened to the second, in the model's pixels for an object of 20.
_THIN_STROKE, _WIDENED_STROKE = 1.7 / 20, 2.2 / 20
# Differences from the training images' size and place that need no change, in pixels.
_CLOSE_PIXELS = 1.0
_MAX_GREY = 255.0

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Values = TypeVar("Values", bound=np.generic)


class Look(Protocol):
    """The look of a model's training images; see ``serving.artifact.Preparation``."""

    @property
    def polarity(self) -> str: ...

    @property
    def object_size(self) -> int: ...

    @property
    def centred_by_mass(self) -> bool: ...


class _Box(NamedTuple):
    """A part of a picture, in pixels. bottom and right are outside."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> int:
        """The longer side."""
        return max(self.bottom - self.top, self.right - self.left)


def prepare(image: Image.Image, shape: tuple[int, int, int], look: Look) -> NDArray[np.uint8]:
    """Return a picture of any size and mode as a model takes it, (C, H, W) uint8. shape: (C, H, W).

    The picture is turned upright. For a grey model whose objects have a size, it is cropped to the object, which is
    scaled and centred, and the ground becomes one colour. For other models, it is scaled as a whole and keeps its
    aspect: the colour of its border fills the rest. Either is inverted if its polarity is not the model's. A picture
    without an object gives an image of one colour.

    Raises UnknownRange, and any error of Pillow for a damaged file.
    """
    channels, height, width = shape
    picture = _upright_of_few_pixels(image, channels)
    if picture.mode == "RGBA":
        picture = _opaque(picture, look)
    picture = picture.convert(MODES_BY_CHANNELS[channels])
    grey = np.asarray(picture.convert("L"), np.float32)
    dark = _is_dark_on_bright(grey)
    if channels == 1 and look.object_size:
        drawn = _drawn(_ink(grey, dark), height, width, look)
        turned = look.polarity == DARK_ON_BRIGHT or (not look.polarity and dark)
        return (255 - drawn if turned else drawn)[np.newaxis]
    if look.polarity and dark != (look.polarity == DARK_ON_BRIGHT):
        picture = Image.eval(picture, lambda value: 255 - value)
    return _fitted(picture, height, width)


def shrink(image: Image.Image) -> Image.Image:
    """Return a picture, upright and with so few pixels that it can be sent. ``prepare`` makes nearly the same of it."""
    return _upright_of_few_pixels(image, 3)


def drafted_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size to which ``prepare`` decodes a JPEG file of this size, (width, height) in pixels.

    Pillow's draft mode has a decoder leave out what the reduced size does not need, so the other pixels never exist.
    """
    reduced = min(size) // _WORK_SIDE_PIXELS
    factor = next(factor for factor in (8, 4, 2, 1) if reduced >= factor or factor == 1)
    return -(-size[0] // factor), -(-size[1] // factor)


def _upright_of_few_pixels(image: Image.Image, channels: int) -> Image.Image:
    """Return a picture of the mode L, RGB or RGBA, whose longer side is below 2 x _WORK_SIDE_PIXELS."""
    turn = turn_of(image)
    image.draft(MODES_BY_CHANNELS[channels], (_WORK_SIDE_PIXELS, _WORK_SIDE_PIXELS))  # JPEG files only
    factor = max(image.size) // _WORK_SIDE_PIXELS
    picture = _reduced(image, factor) if factor > 1 else _with_few_modes(image)
    return picture if turn is None else picture.transpose(turn)


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """Return a picture of the mode L, RGB or RGBA, reduced by a factor.

    It is converted and reduced in blocks, since a copy of the whole would take four bytes for each pixel.
    """
    width, height = image.size
    across = min(width, factor * max(1, _BLOCK_PIXELS // (factor * min(factor, height))))
    down = factor * max(1, _BLOCK_PIXELS // (factor * across))
    whole: Image.Image | None = None
    for top in range(0, height, down):
        for left in range(0, width, across):
            block = image.crop((left, top, min(width, left + across), min(height, top + down)))
            part = _with_few_modes(block).reduce(factor)
            if whole is None:
                whole = Image.new(part.mode, (-(-width // factor), -(-height // factor)))
            whole.paste(part, (left // factor, top // factor))
    assert whole is not None
    return whole


def _with_few_modes(image: Image.Image) -> Image.Image:
    """Return a picture of the mode L, RGB or RGBA. Raises UnknownRange."""
    if image.mode.startswith("I") or image.mode == "F":
        return with_mode(image, "L")
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if image.mode not in ("L", "RGB"):
        return with_mode(image, "L" if image.mode == "1" else "RGB")
    return image


def _opaque(picture: Image.Image, look: Look) -> Image.Image:
    """Return a picture of the mode RGBA on a ground, RGB.

    Black, as in training, if the model has no polarity. The ground of strokes on a transparent sheet is white or black,
    whatever they are not. A picture with transparent corners gets its own median colour there.
    """
    if not look.polarity:
        return with_mode(picture, "RGB")
    pixels = np.asarray(picture)
    visible = pixels[..., 3] >= 128
    if not visible.any():
        return Image.new("RGB", picture.size)
    colours = pixels[visible][:, :3]
    if 2 * visible.sum() < visible.size:
        ground = (255,) * 3 if colours.mean() < 128 else (0,) * 3
    else:
        ground = tuple(np.median(colours, axis=0).astype(int).tolist())
    sheet = Image.new("RGBA", picture.size, (*ground, 255))
    sheet.alpha_composite(picture)
    return sheet.convert("RGB")


def _fitted(picture: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Return a whole picture, L or RGB, in the middle of an image of the model's size, (C, H, W)."""
    scale = min(height / picture.height, width / picture.width)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    pixels = np.asarray(picture).reshape(picture.height, picture.width, -1)
    ground = tuple(np.median(_border(pixels), axis=0).astype(int).tolist())
    sheet = Image.new(picture.mode, (width, height), ground if len(ground) > 1 else ground[0])
    scaled = picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(scaled, ((width - size[0]) // 2, (height - size[1]) // 2))
    return channels_first(sheet)


def _border(pixels: NDArray[Values]) -> NDArray[Values]:
    """Return the pixels near the picture's edges, as (n, ...)."""
    depth = max(1, round(0.04 * min(pixels.shape[:2])))
    sides = (pixels[:depth], pixels[-depth:], pixels[:, :depth], pixels[:, -depth:])
    return np.concatenate([side.reshape(-1, *pixels.shape[2:]) for side in sides])


def _is_dark_on_bright(grey: Floats) -> bool:
    """Return True if the object is darker than its ground. grey: (h, w).

    Two observations vote, each from -1 for dark to 1 for bright: the difference of the whole from its border, and the
    parts that are narrower than strokes may be. The first fails at sharp shadows, the second for broad objects. Their
    cubes make the large differences of ink outweigh the small ones of an uneven ground.
    """
    grey = _few(grey, _POLARITY_SIDE_PIXELS)
    votes = [_balance(_above_border(grey))]
    for share in _NARROW_SHARES:
        size = _odd(share * max(grey.shape))
        narrow = np.stack([grey - _opened(grey, size), grey + _opened(-grey, size)])  # bright parts, and dark ones
        votes.append(_balance(narrow) / len(_NARROW_SHARES))
    return sum(votes) < 0


def _balance(differences: Floats) -> float:
    """Return the sum of the cubes of differences, from -1 if all are negative to 1."""
    cubes = differences**3
    return float(cubes.sum()) / max(1e-6, float(np.abs(cubes).sum()))


def _odd(size: float) -> int:
    return 2 * round(size / 2) + 1


def _above_border(grey: Floats) -> Floats:
    """Return a picture's difference from the plane of light that fits its border best, (h, w)."""
    height, width = grey.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y], axis=-1)
    border, values = _border(terms), _border(grey)
    near = np.ones(len(values), np.bool_)
    for _ in range(3):  # without the ends of strokes that reach the border
        factors = np.linalg.lstsq(border[near], values[near], rcond=None)[0]
        away = np.abs(values - border @ factors)
        near = away <= 2 * np.median(away) + 1
    return np.asarray(grey - terms @ factors, np.float32)


def _drawn(ink: Floats, height: int, width: int, look: Look) -> NDArray[np.uint8]:
    """Return the object of a picture, bright on black as MNIST's, (H, W). ink: (h, w), from ``_ink``."""
    nothing = np.zeros((height, width), np.uint8)
    blurred = _filtered(ink, ImageFilter.GaussianBlur(max(ink.shape) / 500))
    threshold = _otsu(blurred)
    core = blurred > threshold
    if not core.any() or core.all():
        return nothing
    ground, level = float(np.median(ink[~core])), float(np.percentile(ink[core], 90))
    if level - ground < _MIN_CONTRAST:
        return nothing
    if level >= _FULL_INK:
        level = _MAX_GREY
    ground += 1.5 * float(np.median(np.abs(ink[~core] - ground)))  # its noise
    clean = np.clip((ink - ground) / max(1.0, level - ground), 0, 1)
    near = _object(np.where(core, clean, np.float32(0)))
    clean *= near
    box = _box((blurred - ground > _EDGE_SHARE * (level - ground)) & near)
    if ink.shape == (height, width) and _is_prepared(clean, box, look):
        return _as_grey(clean)
    part = clean[box.top : box.bottom, box.left : box.right]
    return _placed(_scaled(part, min(look.object_size, height, width)), height, width, look.centred_by_mass)


def _ink(grey: Floats, dark: bool) -> Floats:
    """Return the ink of a picture above its ground, 0 to 255, without the light and the shadows of the ground, (h, w).

    Dark ink is the share of the paper's light that it takes, which is the same in the light and in the shadow.
    """
    height, width = grey.shape
    bright = _MAX_GREY - grey if dark else grey
    small = _ground(_few(bright, _GROUND_SIDE_PIXELS))
    ground = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR), np.float32)
    ink = np.clip(bright - ground, 0, _MAX_GREY)
    if dark:
        ink *= _MAX_GREY / np.maximum(_MAX_GREY - ground, _MIN_PAPER_GREY)
    return np.asarray(ink, np.float32)


def _ground(bright: Floats) -> Floats:
    """Return the ground under bright strokes: what is left if they are eroded, (h, w).

    The erosion reaches as far as the strokes need: if it goes farther, it takes corners of shadows for strokes.
    """
    sizes = [_odd(share * max(bright.shape)) for share in _STROKE_SHARES]
    opened = _opened(bright, sizes[-1])
    if max(bright.shape) < _MIN_SHADOWED_PIXELS:
        return opened
    ink = bright - opened
    core = ink >= 0.5 * ink.max()
    for size, larger in pairwise(sizes):
        if float((bright - _opened(bright, size) > 0.8 * ink)[core].mean()) > _ERODED_SHARE:
            opened = _opened(bright, larger)  # for what is wider than most of the strokes
            break
    if max(bright.shape) < _GROUND_SIDE_PIXELS:
        return opened
    # A reduced copy blurs the edges of shadows by a pixel.
    return np.minimum(_extreme(opened, 3, np.maximum), np.maximum(bright, opened))


def _opened(values: Floats, size: int) -> Floats:
    return _extreme(_extreme(values, size, np.minimum), size, np.maximum)


def _few(values: Floats, side: int) -> Floats:
    """Return an array (h, w) averaged to a longer side of at most this number."""
    scale = side / max(values.shape)
    if scale >= 1:
        return values
    size = (max(1, round(values.shape[1] * scale)), max(1, round(values.shape[0] * scale)))
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX), np.float32)


def _extreme(values: Floats, size: int, extreme: np.ufunc) -> Floats:
    """Return the extreme of the square of this odd size around each place, (h, w). extreme: np.minimum or np.maximum.

    The squares of double the size come from two of the size before.
    """
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (size // 2, size // 2)
        values = np.moveaxis(np.pad(values, padding, mode="edge"), axis, 0)
        reach = 1
        while reach < size:
            step = min(reach, size - reach)
            values = extreme(values[:-step], values[step:])
            reach += step
        values = np.moveaxis(values, 0, axis)
    return np.ascontiguousarray(values)


def _filtered(values: Floats, kind: ImageFilter.Filter) -> Floats:
    """Return an array (h, w) of 0 to 255 after a filter of Pillow."""
    image = Image.fromarray(np.clip(np.rint(values), 0, _MAX_GREY).astype(np.uint8))
    return np.asarray(image.filter(kind), np.float32)


def _otsu(values: Floats) -> float:
    """Return the threshold between two groups of values from 0 to 255 that lie farthest apart (Otsu, 1979)."""
    counts = np.bincount(values.astype(np.uint8).ravel(), minlength=256).astype(np.float64)
    grey = np.arange(256)
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * grey)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(np.argmax(np.nan_to_num(apart)))


def _object(core: Floats) -> Mask:
    """Return the part of a picture around its object, without specks and what the edges cut off, (h, w).

    core: the ink from 0 to 1, 0 outside the strokes' cores.
    """
    height, width = core.shape
    shares = _few(core, _GROUPS_SIDE_PIXELS)
    # Gaps of a stroke are closed, and the anti-aliased edges are taken in.
    reach = 2 * max(2, round(0.012 * max(shares.shape))) + 1
    mask = _extreme(shares, reach, np.maximum) > 0
    labels = _groups(mask)
    ink = np.bincount(labels.ravel(), weights=shares.ravel())
    ink[0] = 0
    edge = np.unique(_edge(labels))
    inner = ink.copy()
    inner[edge] = 0
    if inner.max() >= _INNER_SHARE * ink.max():
        ink = inner
    kept = (ink >= _SPECK_SHARE * ink.max())[labels] & mask
    wide = Image.fromarray(kept).convert("L").resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(wide) > 0


def _edge(labels: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])


def _groups(mask: Mask) -> NDArray[np.intp]:
    """Return the number of the connected group of each pixel, from 1, and 0 outside the mask, (h, w).

    The runs of each row are joined with those of the row before (union of sets, with path halving).
    """
    parents = [0]

    def root(label: int) -> int:
        while parents[label] != label:
            parents[label] = label = parents[parents[label]]
        return label

    labels = np.zeros(mask.shape, np.intp)
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8))
    previous: list[tuple[int, int, int]] = []
    for row, step in enumerate(steps):
        current = []
        starts, ends = np.flatnonzero(step > 0).tolist(), np.flatnonzero(step < 0).tolist()
        for start, end in zip(starts, ends, strict=True):
            label = len(parents)
            parents.append(label)
            for other_start, other_end, other in previous:
                if other_start <= end and other_end >= start:  # diagonals too
                    parents[root(other)] = root(label)
            current.append((start, end, label))
            labels[row, start:end] = label
        previous = current
    roots = np.array([root(label) for label in range(len(parents))])
    return np.unique(roots, return_inverse=True)[1][labels]


def _box(mask: Mask) -> _Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return _Box(0, 0, *mask.shape)
    return _Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


def _is_prepared(clean: Floats, box: _Box, look: Look) -> bool:
    """Return True if the object has the size and the place of the training images' already."""
    if abs(box.size - look.object_size) > _CLOSE_PIXELS:
        return False
    height, width = clean.shape
    middle = (
        _centre_of_mass(clean) if look.centred_by_mass else ((box.top + box.bottom) / 2, (box.left + box.right) / 2)
    )
    return all(abs(place - side / 2) <= _CLOSE_PIXELS for place, side in zip(middle, (height, width), strict=True))


def _centre_of_mass(ink: Floats) -> tuple[float, float]:
    total = max(float(ink.sum()), 1e-6)
    rows, columns = np.arange(ink.shape[0]) + 0.5, np.arange(ink.shape[1]) + 0.5
    return float(ink.sum(axis=1) @ rows) / total, float(ink.sum(axis=0) @ columns) / total


def _scaled(ink: Floats, size: int) -> Floats:
    """Return an object with this longer side, with strokes as wide and as bright as MNIST's. ink: from 0 to 1."""
    large = _resized(ink, size * _OVERSAMPLING, Image.Resampling.BICUBIC)
    strokes = large > 0.5
    side = max(large.shape)
    crossings = sum(int((np.diff(np.pad(strokes, 1).astype(np.int8), axis=axis) != 0).sum()) for axis in (0, 1))
    # A stroke's edges are twice its length; over all directions they cross 4 / pi pixel borders for each pixel.
    stroke = 2 * float(strokes.sum()) / max(1.0, crossings * np.pi / 4)
    if stroke < _THIN_STROKE * side:
        reach = round((_WIDENED_STROKE * side - stroke) / 2)
        large = _extreme(np.pad(large, reach), 2 * reach + 1, np.maximum)
    small = _resized(large, size, Image.Resampling.BOX)
    return small / max(1e-6, float(np.percentile(small[small > 0.25 * small.max()], 90)))


def _resized(ink: Floats, size: int, kind: Image.Resampling) -> Floats:
    """Return an array (h, w) with this longer side."""
    scale = size / max(ink.shape)
    target = (max(1, round(ink.shape[1] * scale)), max(1, round(ink.shape[0] * scale)))
    return np.clip(np.asarray(Image.fromarray(ink).resize(target, kind), np.float32), 0, 1)


def _placed(ink: Floats, height: int, width: int, by_mass: bool) -> NDArray[np.uint8]:
    """Return an object in the middle of a black image, (H, W), but wholly inside it. ink: 1 is white."""
    rows, columns = ink.shape
    middle = _centre_of_mass(ink) if by_mass else (rows / 2, columns / 2)
    top = min(max(0, round(height / 2 - middle[0])), height - rows)
    left = min(max(0, round(width / 2 - middle[1])), width - columns)
    placed = np.zeros((height, width), np.float32)
    placed[top : top + rows, left : left + columns] = ink
    return _as_grey(placed)


def _as_grey(ink: Floats) -> NDArray[np.uint8]:
    """Return ink from 0 to 1 as grey levels from 0 to 255."""
    return np.asarray(np.rint(_MAX_GREY * np.clip(ink, 0, 1)), np.uint8)
