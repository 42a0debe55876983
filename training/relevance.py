"""Maps of relevance: a number for each pixel of an image, and the image without the ink that a map names.

Axes: T primary capsule types, G rows and columns of the primary grid, H W of an image.
"""

import numpy as np
from numpy.typing import NDArray

from training.model import Field

#: The share of the ink that is deleted.
DELETED_SHARE = 0.1

Map = NDArray[np.float32]
Pixels = NDArray[np.uint8]


def capsule_map(values: NDArray[np.float32], field: Field, side: int) -> Map:
    """Return a map (H, W) of the primary capsules' numbers (T, G, G), added over types, joined between their middles.

    side: H and W.
    """
    sums = values.sum(0)
    middles = field.offset + field.stride * np.arange(len(sums)) + (field.size - 1) / 2
    places = np.arange(side)
    rows = np.stack([np.interp(places, middles, column) for column in sums.T], 1)
    return np.stack([np.interp(places, middles, row) for row in rows]).astype(np.float32)


def without_ink(image: Pixels, order: Map, generator: np.random.Generator) -> Pixels:
    """Return an image (1, H, W) without the ink that has the largest numbers in a map; equal numbers fall at random.

    DELETED_SHARE of the pixels above the ground, which is black, become ground.
    """
    ink = np.flatnonzero(image[0])
    by_rank = ink[np.lexsort((generator.random(len(ink)), -order.ravel()[ink]))]
    result = image.copy()
    result.reshape(-1)[by_rank[: round(DELETED_SHARE * len(ink))]] = 0
    return result
