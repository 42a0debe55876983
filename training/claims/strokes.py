"""Thickness, width and slant of digits, measured on their pixels, and ranks to compare them with features.

Axes: N images, H W of an image, F features, A attributes.
"""

import numpy as np
import torch
from torch import Tensor

ATTRIBUTES = ("thickness", "width", "slant")
_MIN = 1e-9


def attributes(images: Tensor) -> Tensor:
    """Return the ATTRIBUTES of images (N, 1, H, W), 0 to 1, bright on dark: (N, 3) in double precision.

    thickness: of the strokes, in pixels: twice the ink divided by the length of its outline, which is the sum of the
    pixels' gradients. width: of a block with the same spread of ink to the sides, after the slant is taken away, in
    pixels. slant: pixels to the right a pixel up, from the second moments of the ink, as in Morpho-MNIST (Castro et al.
    2019). All are 0 for an image without ink.
    """
    ink = images.squeeze(1).double()
    total = ink.sum((1, 2)).clamp_min(_MIN)
    height, width = ink.shape[1:]
    rows, columns = torch.arange(height).double()[:, None], torch.arange(width).double()

    def mean(values: Tensor) -> Tensor:
        return (ink * values).sum((1, 2)) / total

    down, right = (mean(one).reshape(-1, 1, 1) for one in (rows, columns))
    vertical, horizontal = mean((rows - down).square()), mean((columns - right).square())
    together = mean((rows - down) * (columns - right))
    lean = together / vertical.clamp_min(_MIN)  # pixels to the right a pixel down
    spread = (horizontal - lean * together).clamp_min(0)
    outline = _outline(ink)
    thickness = torch.where(outline > 0, 2 * total / outline.clamp_min(_MIN), 0.0)
    return torch.stack([thickness, (12 * spread).sqrt(), -lean], 1)


def _outline(ink: Tensor) -> Tensor:
    """Return the length of the outlines of ink (N, H, W), 0 to 1, in pixels."""
    framed = torch.nn.functional.pad(ink, (1, 1, 1, 1))
    # Of each square of four pixels the mean differences, so that both directions are measured at one place.
    across = (framed[:, :, 1:] - framed[:, :, :-1]).unfold(1, 2, 1).mean(-1)
    along = (framed[:, 1:] - framed[:, :-1]).unfold(2, 2, 1).mean(-1)
    return (across.square() + along.square()).sqrt().sum((1, 2))


def ranks(values: Tensor) -> Tensor:
    """Return the ranks of values (N, F) along N, with mean 0 and variance 1; equal values share their mean rank.

    The mean product of two columns is Spearman's rank correlation. A column of equal values is all 0.
    """
    result = torch.zeros(values.shape, dtype=torch.float64)
    for column, own in zip(values.unbind(1), result.unbind(1), strict=True):
        _, place, count = np.unique(column.numpy(), return_inverse=True, return_counts=True)
        own.copy_(torch.from_numpy((count.cumsum() - (count + 1) / 2)[place]))
    result -= result.mean(0)
    deviation = result.std(0, correction=0)
    return result / torch.where(deviation > 0, deviation, torch.inf)
