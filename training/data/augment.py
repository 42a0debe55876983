"""Random changes of training images, from a generator and turns, so that a run can be repeated and resumed exactly.

An image's turn is a number that grows by one in each epoch and starts differently for each image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.recipe import AUGMENTATION_NAMES, SHIFT_SHARE

MAX_SHIFT = 2  # pixels, in each direction (section 4 of the paper)

MAX_ROTATION = 15.0  # degrees
MAX_SHEAR = 0.15
SCALE_RANGE = (0.85, 1.15)  # of each axis
ELASTIC_KNOTS = 7  # a side, which elastic deformation moves; the pixels between them move smoothly
ERASED_SIDE = 4  # pixels


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(count, device=generator.device).uniform_(low, high, generator=generator)


def warp(images: Tensor, matrices: Tensor, displacement: Tensor | None = None) -> Tensor:
    """Sample images (B, C, H, W) at positions moved by matrices (B, 2, 3), zeros outside; one interpolation for all.

    displacement: (B, H, W, 2), right and down in units of half an image, added to the moved positions.
    """
    grid = nn.functional.affine_grid(matrices.to(images), list(images.shape), align_corners=False)
    if displacement is not None:
        grid = grid + displacement.to(grid)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def _shift_matrices(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return the matrices that shift each image by whole pixels (B, 2), right and down."""
    matrices = torch.eye(2, 3).repeat(len(pixels), 1, 1)
    matrices[:, :, 2] = -pixels * torch.tensor([2 / width, 2 / height])  # the grid spans -1 to 1
    return matrices


def _elastic(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Return random smooth displacements for images (B, C, H, W), as ``warp`` takes them.

    deviation: standard deviation of the knots' displacement, in pixels.
    """
    count, _, height, width = images.shape
    knots = torch.empty((count, 2, ELASTIC_KNOTS, ELASTIC_KNOTS), device=generator.device)
    field = nn.functional.interpolate(
        knots.normal_(0, deviation, generator=generator), (height, width), mode="bicubic", align_corners=True
    )
    return field.permute(0, 2, 3, 1) * torch.tensor([2 / width, 2 / height], device=field.device)


def erase(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Make a square of 4x4 pixels black, at a random place, in this share of the images (B, C, H, W)."""
    count, _, height, width = images.shape
    device = generator.device
    top, left = (
        torch.randint(max(1, size - ERASED_SIDE + 1), (count, 1), generator=generator, device=device)
        for size in (height, width)
    )
    chosen = torch.rand((count, 1), generator=generator, device=device) < share
    rows, columns = (torch.arange(size, device=device) - start for size, start in ((height, top), (width, left)))
    in_rows, in_columns = ((one >= 0) & (one < ERASED_SIDE) for one in (rows, columns))  # (B, H) and (B, W)
    erased = (in_rows & chosen)[:, None, :, None] & in_columns[:, None, None, :]
    return images.masked_fill(erased.to(images.device), 0)


def mirror(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Mirror this share of the images (B, C, H, W) left to right, chosen at random."""
    chosen = torch.rand((len(images), 1, 1, 1), generator=generator, device=generator.device) < share
    return torch.where(chosen.to(images.device), images.flip(3), images)


def distort(
    images: Tensor,
    generator: torch.Generator,
    rotation: float = MAX_ROTATION,
    shear: float = MAX_SHEAR,
    scale: tuple[float, float] = SCALE_RANGE,
    shift: float = MAX_SHIFT,
    elastic: float = 0.0,
) -> Tensor:
    """Rotate each image by up to ``rotation`` degrees, shear it by up to ``shear``, scale its axes and shift it.

    images: (B, C, H, W). Returns the same shape. The interpolation is bilinear, with zeros outside.
    scale: the smallest and the largest scale of each axis. shift: the largest shift each way, in pixels.
    elastic: the standard deviation of a smooth deformation's knots, in pixels.
    """
    matrices = _affine_matrices(images, generator, rotation, shear, scale, (shift, shift))
    return warp(images, matrices, _elastic(images, elastic, generator) if elastic else None)


def _affine_matrices(
    images: Tensor,
    generator: torch.Generator,
    rotation: float,
    shear: float,
    scale: tuple[float, float],
    shift: tuple[float, float],
) -> Tensor:
    """Return random matrices (B, 2, 3) for images (B, C, H, W). shift: pixels, right and down."""
    count, _, height, width = images.shape
    angle = torch.deg2rad(_uniform(count, -rotation, rotation, generator))
    slant = _uniform(count, -shear, shear, generator)
    scale_x, scale_y = (_uniform(count, *scale, generator) for _ in range(2))
    shift_x = _uniform(count, -shift[0], shift[0], generator) * 2 / width
    shift_y = _uniform(count, -shift[1], shift[1], generator) * 2 / height
    return affine_matrices(angle, slant, (scale_x, scale_y), (shift_x, shift_y))


def affine_matrices(angle: Tensor, slant: Tensor, scale: tuple[Tensor, Tensor], shift: tuple[Tensor, Tensor]) -> Tensor:
    """Return the matrices (B, 2, 3) that ``warp`` takes, from numbers (B,) for each image.

    angle: radians. slant: the shear. scale: the enlargement of x and y. shift: how far left and up the content moves,
    in halves of the image, before it is turned.
    """
    (scale_x, scale_y), (shift_x, shift_y) = scale, shift
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos / scale_x, (slant * cos - sin) / scale_y, shift_x], 1),
        torch.stack([sin / scale_x, (slant * sin + cos) / scale_y, shift_y], 1),
    ]
    return torch.stack(rows, 1)


@dataclass(frozen=True)
class Augmentation:
    """A change of training images (B, C, H, W) into others of the same shape; every pixel is interpolated once.

    name: one of these.
    - ``affine`` rotates by up to 15 degrees, shears by up to 0.15, scales each axis by 0.85 to 1.15 and shifts by up to
      ``shift_share`` of the image. This is wider than the paper's augmentation.
    - ``shift`` shifts by a random whole number of pixels, up to two each way: the paper's augmentation, section 4.
    - ``all-shifts`` takes all 25 shifts of up to two pixels each way in turn, so an image has each shift once in 25
      turns, as in the data of the authors' code.
    - ``none`` changes nothing.
    flip: share of the images that are mirrored left to right. elastic: standard deviation of a smooth deformation, in
    pixels. erasing: share of the images in which a square of 4x4 pixels becomes black.
    """

    name: str
    shift_share: float = SHIFT_SHARE
    flip: float = 0.0
    elastic: float = 0.0
    erasing: float = 0.0

    @property
    def changes(self) -> bool:
        """Return False if every image stays as it is."""
        return self.name != "none" or any((self.flip, self.elastic, self.erasing))

    def __call__(self, images: Tensor, turns: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed images; turns: (B,) int64."""
        if self.flip:
            images = mirror(images, self.flip, generator)
        matrices = self._matrices(images, turns, generator)
        if self.elastic:
            still = torch.eye(2, 3).repeat(len(images), 1, 1)
            images = warp(images, still if matrices is None else matrices, _elastic(images, self.elastic, generator))
        elif matrices is not None:
            images = warp(images, matrices)
        return erase(images, self.erasing, generator) if self.erasing else images

    def _matrices(self, images: Tensor, turns: Tensor, generator: torch.Generator) -> Tensor | None:
        count, _, height, width = images.shape
        if self.name == "none":
            return None
        if self.name == "affine":
            shift = (self.shift_share * width, self.shift_share * height)
            return _affine_matrices(images, generator, MAX_ROTATION, MAX_SHEAR, SCALE_RANGE, shift)
        if self.name == "shift":
            pixels = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (count, 2), generator=generator)
        else:
            side = 2 * MAX_SHIFT + 1
            number = turns.cpu() % side**2
            pixels = torch.stack([number % side, number // side], 1) - MAX_SHIFT
        return _shift_matrices(pixels, height, width)


AUGMENTATIONS = {name: Augmentation(name) for name in AUGMENTATION_NAMES}
affine, shift, all_shifts, none = AUGMENTATIONS.values()
