"""Changes of digits by a known amount: shift, rotation, scale, shear and thickness.

Axes: N images, C H W of an image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.data.augment import MAX_ROTATION, MAX_SHEAR, MAX_SHIFT, SCALE_RANGE, affine_matrices, warp

#: The thickness of a change: from this share of the way to the eroded digit, to this share of that to the dilated one.
THICKNESS_RANGE = (-0.5, 1.0)


@dataclass(frozen=True)
class Change:
    """One kind of change, by an amount between two limits: pixels, degrees, factors or shares."""

    name: str
    low: float
    high: float
    make: Callable[[Tensor, Tensor], Tensor]

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """Return random amounts (count,)."""
        return torch.empty(count).uniform_(self.low, self.high, generator=generator)

    def __call__(self, images: Tensor, amounts: Tensor) -> Tensor:
        """Return images (N, C, H, W), 0 to 1, changed by amounts (N,)."""
        return self.make(images, amounts)


def _moved(images: Tensor, amounts: Tensor, **numbers: Tensor) -> Tensor:
    """Return images under an affine map. numbers: (N,) each, those of ``affine_matrices`` that differ from 0 or 1."""
    zero, one = torch.zeros_like(amounts), torch.ones_like(amounts)
    get = numbers.get
    matrices = affine_matrices(
        get("angle", zero),
        get("slant", zero),
        (get("scale_x", one), get("scale_y", one)),
        (get("shift_x", zero), get("shift_y", zero)),
    )
    return warp(images, matrices)


def shifted(images: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Return images moved by pixels (N,), with black from outside."""
    height, width = images.shape[-2:]
    return _moved(images, right, shift_x=-right * 2 / width, shift_y=-down * 2 / height)


def thickened(images: Tensor, amounts: Tensor) -> Tensor:
    """Return images with thicker or, below 0, thinner strokes: mixed with their dilation or their erosion.

    amounts: (N,), from -1 (eroded) over 0 (as they are) to 1 (dilated), both by the four neighbours of a pixel.
    """
    dilated, eroded = _widest(images), -_widest(-images)
    weight = amounts.reshape(-1, 1, 1, 1)
    return images + weight.clamp(min=0) * (dilated - images) + weight.clamp(max=0) * (images - eroded)


def _widest(images: Tensor) -> Tensor:
    """Return the largest value of each pixel and its four neighbours."""
    rows = nn.functional.max_pool2d(images, (3, 1), 1, (1, 0))
    columns = nn.functional.max_pool2d(images, (1, 3), 1, (0, 1))
    return torch.maximum(rows, columns)


def _degrees(images: Tensor, amounts: Tensor) -> Tensor:
    return _moved(images, amounts, angle=torch.deg2rad(amounts))


#: The changes, as far as the networks learn them from their changed training images; thickness they do not.
CHANGES = (
    Change("shift x", -MAX_SHIFT, MAX_SHIFT, lambda images, amounts: shifted(images, amounts, 0 * amounts)),
    Change("shift y", -MAX_SHIFT, MAX_SHIFT, lambda images, amounts: shifted(images, 0 * amounts, amounts)),
    Change("rotation", -MAX_ROTATION, MAX_ROTATION, _degrees),
    Change("scale x", *SCALE_RANGE, lambda images, amounts: _moved(images, amounts, scale_x=amounts)),
    Change("scale y", *SCALE_RANGE, lambda images, amounts: _moved(images, amounts, scale_y=amounts)),
    Change("shear", -MAX_SHEAR, MAX_SHEAR, lambda images, amounts: _moved(images, amounts, slant=amounts)),
    Change("thickness", *THICKNESS_RANGE, thickened),
)
