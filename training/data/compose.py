"""Composition of training and test images from single digits: overlapping pairs, and digits on a larger canvas.

Axes: B images, K objects an image, C channels, H W height and width, S of the square canvas.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from training.data.augment import distort

# "affNIST-spec": the published ranges of affNIST's test set, applied to our digits. It is not affNIST itself.
AFFNIST_ROTATION = 20.0  # degrees
AFFNIST_SHEAR = 0.2
AFFNIST_SCALE = (0.8, 1.2)  # of each axis


def place(objects: Tensor, canvas: int, generator: torch.Generator) -> Tensor:
    """Put each object (N, C, H, W) completely on a black canvas: (N, C, S, S), of the same type.

    All whole-pixel places are equally likely. A 28x28 digit on 36x36 is shifted by up to four pixels each way from the
    middle, as in the paper's MultiMNIST; on 40x40 it is the paper's training set for affNIST (both section 6).
    """
    count, channels, height, width = objects.shape
    device = generator.device
    top = torch.randint(canvas - height + 1, (count, 1, 1), generator=generator, device=device)
    left = torch.randint(canvas - width + 1, (count, 1, 1), generator=generator, device=device)
    rows, columns = top + torch.arange(height, device=device)[:, None], left + torch.arange(width, device=device)
    placed = objects.new_zeros(count, channels, canvas, canvas)
    placed[torch.arange(count, device=device)[:, None, None], :, rows, columns] = objects.permute(0, 2, 3, 1)
    return placed


def combine(parts: Tensor) -> Tensor:
    """Return images (B, C, H, W) of objects (B, K, C, H, W), clipped at white; uint8, or pixels from 0 to 1."""
    if parts.dtype == torch.uint8:
        return parts.sum(1).clamp(max=255).to(torch.uint8)
    return parts.sum(1).clamp(max=1)


def members(labels: Tensor, objects: int, generator: torch.Generator) -> Tensor:
    """Choose the images for each composed image: indices (N, K). The first index of image n is n.

    labels: (N,) int64; objects: K, 1 or 2. The second is a random image of another class. Raises ValueError
    if pairs are requested and all labels are equal.
    """
    first = torch.arange(len(labels), device=labels.device)
    if objects == 1:
        return first[:, None]
    if (labels == labels[:1]).all():
        raise ValueError("pairs of different classes need images of two classes at least")
    second = first.clone()
    while (same := labels[second] == labels).any():
        count = int(same.sum())
        second[same] = torch.randint(len(labels), (count,), generator=generator, device=labels.device)
    return torch.stack([first, second], 1)


def scenes(
    images: Tensor, labels: Tensor, objects: int, canvas: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Compose one uint8 image (N, C, S, S) for each of the images (N, C, H, W), with its labels (N, K)."""
    chosen = members(labels, objects, generator)
    placed = place(images[chosen.flatten()], canvas, generator)
    return combine(placed.reshape(*chosen.shape, *placed.shape[1:])), labels[chosen]


def affnist_spec(digits: Tensor, canvas: int, generator: torch.Generator) -> Tensor:
    """uint8 digits (N, C, H, W) distorted and put anywhere on a canvas where nothing of them is cut off: (N, C, S, S).

    Rotated by up to 20 degrees, sheared by up to 0.2, each axis scaled by 0.8 to 1.2, bilinear.
    """
    before = (canvas - digits.shape[-1]) // 2
    after = canvas - digits.shape[-1] - before
    middle = pad(digits.to(torch.float32), (before, after, before, after))
    distorted = distort(middle, generator, AFFNIST_ROTATION, AFFNIST_SHEAR, AFFNIST_SCALE, shift=0)
    images = distorted.round().clamp(0, 255).to(torch.uint8)
    ink = images.amax(1) > 0  # (N, S, S)
    rows, columns = (_move(ink.any(axis), generator) for axis in (2, 1))
    count = torch.arange(len(images))[:, None, None]
    return images[count, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _move(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Shift the rows with ink, (N, S) bool, as far as they may go; return the row that each comes from, (N, S)."""
    size = ink.shape[1]
    first = ink.to(torch.uint8).argmax(1)
    last = size - 1 - ink.flip(1).to(torch.uint8).argmax(1)
    room = size - 1 - last + first  # shifts from -first to size - 1 - last
    shift = (torch.rand(len(ink), generator=generator) * (room + 1)).floor().long() - first
    return (torch.arange(size) - shift[:, None]) % size
