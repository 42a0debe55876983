"""Random changes of training images, from a generator and turns, so that a run can be repeated and resumed exactly.

An image's turn is a number that grows by one in each epoch and starts differently for each image.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MAX_SHIFT_PIXELS = 2  # in each direction (section 4 of the paper)
MAX_ROTATION_DEGREES = 15.0
MAX_SHEAR = 0.15
SCALE_RANGE = (0.85, 1.15)  # of each axis


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(count, device=generator.device).uniform_(low, high, generator=generator)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Sample images (B, C, H, W) at positions moved by matrices (B, 2, 3), zeros outside."""
    grid = nn.functional.affine_grid(matrices.to(images), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def _shift_by(images: Tensor, pixels: Tensor) -> Tensor:
    """Shift each image by its whole number of pixels (B, 2), right and down, zeros moving in."""
    count, _, height, width = images.shape
    matrices = torch.eye(2, 3).repeat(count, 1, 1)
    matrices[:, :, 2] = -pixels * torch.tensor([2 / width, 2 / height])  # the grid spans -1 to 1
    return _warp(images, matrices)


def shift(images: Tensor, turns: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by a random whole number of pixels, up to two each way: the paper's augmentation, section 4.

    images: (B, C, H, W). Returns the same shape.
    """
    return _shift_by(
        images, torch.randint(-MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS + 1, (len(images), 2), generator=generator)
    )


def all_shifts(images: Tensor, turns: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by the next one of all 25 shifts of up to two pixels each way.

    images: (B, C, H, W); turns: (B,) int64. Returns the same shape. In 25 epochs an image is seen in every shift
    once, as in the data of the authors' code, which holds each digit 25 times.
    """
    side = 2 * MAX_SHIFT_PIXELS + 1
    number = turns.cpu() % side**2
    return _shift_by(images, torch.stack([number % side, number // side], 1) - MAX_SHIFT_PIXELS)


def distort(
    images: Tensor,
    generator: torch.Generator,
    rotation: float = MAX_ROTATION_DEGREES,
    shear: float = MAX_SHEAR,
    scale: tuple[float, float] = SCALE_RANGE,
    shift: float = MAX_SHIFT_PIXELS,
) -> Tensor:
    """Rotate each image by up to ``rotation`` degrees, shear it by up to ``shear``, scale its axes and shift it.

    images: (B, C, H, W). Returns the same shape; bilinear, zeros outside. scale: the smallest and the largest factor of
    each axis. shift: the largest shift in each direction, in pixels.
    """
    count, _, height, width = images.shape
    angle = torch.deg2rad(_uniform(count, -rotation, rotation, generator))
    slant = _uniform(count, -shear, shear, generator)
    scale_x, scale_y = (_uniform(count, *scale, generator) for _ in range(2))
    shift_x = _uniform(count, -shift, shift, generator) * 2 / width
    shift_y = _uniform(count, -shift, shift, generator) * 2 / height
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos / scale_x, (slant * cos - sin) / scale_y, shift_x], 1),
        torch.stack([sin / scale_x, (slant * sin + cos) / scale_y, shift_y], 1),
    ]
    return _warp(images, torch.stack(rows, 1))


def affine(images: Tensor, turns: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 15 degrees, shear by up to 0.15, scale each axis by 0.85 to 1.15, shift by up to two pixels.

    images: (B, C, H, W). Returns the same shape; see ``distort``. Wider than the paper's augmentation.
    """
    return distort(images, generator)


def none(images: Tensor, turns: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images unchanged."""
    return images


AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "affine": affine,
    "shift": shift,
    "all-shifts": all_shifts,
    "none": none,
}
