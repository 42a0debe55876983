"""Training images made on the device, an epoch or a chunk of steps at once.

Axes: S steps, B images a step, K objects an image, C channels, H W height and width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.data.augment import MAX_ROTATION, MAX_SHEAR, SCALE_RANGE, distort, erase
from training.data.compose import combine, members, place
from training.data.non_objects import non_objects
from training.data.specs import NONE

NONE_SHARE = 8  # one image in this many shows none of the classes


class Chunk(NamedTuple):
    """Batches of S steps: images (S, B, C, H, W) uint8, their objects (S, B, K, C, H, W) uint8, labels (S, B, K)."""

    images: Tensor
    parts: Tensor
    labels: Tensor

    def buffers(self) -> "Chunk":
        """Return a copy, whose memory recorded steps read and ``fill`` writes."""
        return Chunk(*(values.clone() for values in self))

    def fill(self, chunk: "Chunk") -> None:
        """Take the content of another chunk of the same shapes."""
        for buffer, values in zip(self, chunk, strict=True):
            buffer.copy_(values)


@dataclass(frozen=True)
class Distortion:
    """The largest changes of a training image; the arguments of ``distort`` and ``erase``.

    shift: pixels each way. erasing: share of the images in which a square of 4x4 pixels becomes black.
    """

    shift: float = 2.5
    rotation: float = MAX_ROTATION
    shear: float = MAX_SHEAR
    scale: tuple[float, float] = SCALE_RANGE
    elastic: float = 0.0
    erasing: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed images: (B, C, H, W) uint8 in, the same shape and type out."""
        warped = distort(images.float(), generator, self.rotation, self.shear, self.scale, self.shift, self.elastic)
        warped = warped.round().clamp(0, 255).to(torch.uint8)
        return erase(warped, self.erasing, generator) if self.erasing else warped


class Digits:
    """Epochs of single digits, each distorted again, with images of none of the classes."""

    def __init__(
        self, images: Tensor, labels: Tensor, batch: int, seed: int, distortion: Distortion, none: bool
    ) -> None:
        self._images, self._labels = images, labels
        self._none = batch // NONE_SHARE if none else 0
        self._digits = batch - self._none
        self._distortion = distortion
        self._generator = torch.Generator(images.device).manual_seed(seed)
        self.steps = len(images) // self._digits

    def __call__(self) -> Chunk:
        generator, steps = self._generator, self.steps
        order = torch.randperm(len(self._images), generator=generator, device=self._images.device)
        chosen = order[: steps * self._digits]
        source = self._images[chosen]
        warped = self._distortion(source, generator)
        images = warped.reshape(steps, self._digits, *source.shape[1:])
        labels = self._labels[chosen].reshape(steps, self._digits, 1)
        if self._none:
            others = non_objects(warped[: steps * self._none], generator)
            others = others.reshape(steps, self._none, *source.shape[1:])
            images = torch.cat([images, others], 1)
            labels = torch.cat([labels, labels.new_full((steps, self._none, 1), NONE)], 1)
        return Chunk(images, images.unsqueeze(2), labels)


class Pairs:
    """Chunks of overlapping pairs of digits of different classes on a larger canvas. Each chunk has new pairs.

    Every second digit is rotated by up to 8 degrees, sheared by up to 0.08 and scaled by 0.92 to 1.08 before it is
    placed; the others keep the pixels of their data set, as the test's digits do.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch: int, seed: int, canvas: int, steps: int) -> None:
        self._images, self._labels, self._batch, self._canvas = images, labels, batch, canvas
        self._generator = torch.Generator(images.device).manual_seed(seed)
        self.steps = steps

    def __call__(self) -> Chunk:
        generator, count = self._generator, self.steps * self._batch
        device = self._images.device
        first = torch.randint(len(self._images), (count,), generator=generator, device=device)
        together = first[members(self._labels[first], 2, generator)]
        digits = self._images[together.flatten()]
        warped = distort(digits.float(), generator, rotation=8, shear=0.08, scale=(0.92, 1.08), shift=0)
        changed = torch.rand((len(digits), 1, 1, 1), generator=generator, device=device) < 0.5
        digits = torch.where(changed, warped.round().clamp(0, 255).to(torch.uint8), digits)
        placed = place(digits, self._canvas, generator)
        parts = placed.reshape(self.steps, self._batch, 2, *placed.shape[1:])
        images = combine(parts.flatten(0, 1)).reshape(self.steps, self._batch, *placed.shape[1:])
        return Chunk(images, parts, self._labels[together].reshape(self.steps, self._batch, 2))
