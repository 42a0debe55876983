"""Relevance by occlusion: how much a class's pose shrinks if a part of the image becomes the ground.

Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2013, section 4.2, with the pose projected on
its undisturbed direction in place of a probability: a capsule's length cannot tell a pose from its negative.

Axes: P patches, J classes, Q classes to explain, E dimensions of a pose.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]

# The patches along an axis: 196 in all. benchmarks/relevance.py compares sizes of a patch.
_PLACES = 14
#: The side of a patch, as a share of the image's.
PATCH_SHARE = 4 / 28


class _Patch(NamedTuple):
    rows: slice
    columns: slice


class Masked(NamedTuple):
    """An image and its masked copies. places: the number of the patch of each copy."""

    images: Images
    places: list[int]


class Occlusion:
    """The patches of images of one size. They lie evenly, and each pixel is in one of them or more."""

    def __init__(self, height: int, width: int, patch: float = PATCH_SHARE) -> None:
        """Place the patches. patch: the side of a patch, as a share of the image's."""
        self._patches = [
            _Patch(rows, columns) for rows in _intervals(height, patch) for columns in _intervals(width, patch)
        ]
        self._cover = np.zeros((height, width), np.float32)
        for rows, columns in self._patches:
            self._cover[rows, columns] += 1

    @property
    def max_images(self) -> int:
        """Return the most images of ``masked``."""
        return len(self._patches) + 1

    def masked(self, image: Images, ground: Images) -> Masked:
        """Return the image (C, H, W), and a copy for each patch that is not ground already, with ground in its place.

        ground: (C,).
        """
        filling = ground[:, np.newaxis, np.newaxis]
        ink = (image != filling).any(0)
        places = [index for index, patch in enumerate(self._patches) if ink[patch].any()]
        images = np.repeat(image[np.newaxis], len(places) + 1, axis=0)
        for copy, place in zip(images[1:], places, strict=True):
            rows, columns = self._patches[place]
            copy[:, rows, columns] = filling
        return Masked(images, places)

    def relevance(self, poses: NDArray[np.float32], places: list[int], classes: list[int]) -> NDArray[np.float32]:
        """Return the relevance of each pixel for each class, (Q, H, W): the mean over the patches that cover it.

        poses: (len(places) + 1, J, E), of ``masked``.
        """
        drops = drops_of(poses, classes)
        maps = np.zeros((len(classes), *self._cover.shape), np.float32)
        for place, drop in zip(places, drops, strict=True):
            rows, columns = self._patches[place]
            maps[:, rows, columns] += drop[:, np.newaxis, np.newaxis]
        maps /= self._cover
        return maps


def drops_of(poses: NDArray[np.float32], classes: list[int]) -> NDArray[np.float32]:
    """Return how much each later pose falls behind the first one on its direction, (P, Q). poses: (P + 1, J, E)."""
    chosen = poses[:, classes]
    lengths = np.linalg.norm(chosen[0], axis=-1, keepdims=True)
    directions = chosen[0] / np.where(lengths > 0, lengths, 1)
    projections = np.einsum("pqe,qe->pq", chosen, directions)
    drops: NDArray[np.float32] = projections[0] - projections[1:]
    return drops


def ground_of(image: Images, polarity: str) -> Images:
    """Return the value of an image's ground by channel, (C,). image: (C, H, W). polarity: one of POLARITIES.

    Without a polarity it is the most common value of the border.
    """
    channels = len(image)
    if polarity:
        return np.full(channels, 0 if polarity == "bright-on-dark" else 255, np.uint8)
    border = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1)
    return np.array([np.bincount(values).argmax() for values in border], np.uint8)


def _intervals(size: int, patch: float) -> list[slice]:
    """Return evenly placed intervals of an axis."""
    count = min(_PLACES, size)
    step = size / count
    length = max(round(patch * size), int(np.ceil(step)))
    starts = [int(np.floor((index + 0.5) * step - length / 2 + 0.5)) for index in range(count)]
    return [slice(max(0, start), min(size, start + length)) for start in starts]
