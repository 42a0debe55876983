"""Random changes to training images, drawn from a generator so that a run can be repeated and resumed exactly."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MAX_SHIFT = 2  # pixels, in each direction (section 4 of the paper)
MAX_ROTATION = 15.0  # degrees
MAX_SHEAR = 0.15
SCALE_RANGE = (0.85, 1.15)  # of each axis


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(count).uniform_(low, high, generator=generator)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Sample images (B, C, H, W) at positions moved by matrices (B, 2, 3), zeros outside."""
    grid = nn.functional.affine_grid(matrices.to(images), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by a whole number of pixels, up to two each way, zeros moving in: the paper's augmentation.

    images: (B, C, H, W). Returns the same shape.
    """
    count, _, height, width = images.shape
    pixels = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (count, 2), generator=generator)
    matrices = torch.eye(2, 3).repeat(count, 1, 1)
    matrices[:, :, 2] = pixels * torch.tensor([2 / width, 2 / height])  # the grid spans -1 to 1
    return _warp(images, matrices)


def affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 15 degrees, shear by up to 0.15, scale each axis by 0.85 to 1.15, shift by up to two pixels.

    images: (B, C, H, W). Returns the same shape; bilinear, zeros outside. Wider than the paper's augmentation.
    """
    count, _, height, width = images.shape
    angle = torch.deg2rad(_uniform(count, -MAX_ROTATION, MAX_ROTATION, generator))
    shear = _uniform(count, -MAX_SHEAR, MAX_SHEAR, generator)
    scale_x, scale_y = (_uniform(count, *SCALE_RANGE, generator) for _ in range(2))
    shift_x = _uniform(count, -MAX_SHIFT, MAX_SHIFT, generator) * 2 / width
    shift_y = _uniform(count, -MAX_SHIFT, MAX_SHIFT, generator) * 2 / height
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos / scale_x, (shear * cos - sin) / scale_y, shift_x], 1),
        torch.stack([sin / scale_x, (shear * sin + cos) / scale_y, shift_y], 1),
    ]
    return _warp(images, torch.stack(rows, 1))


def none(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return images


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "affine": affine,
    "shift": shift,
    "none": none,
}
