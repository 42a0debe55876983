"""Images of none of the classes: constants, noise, shuffled patches and blobs, for a network that may answer "none".

Axes: N images, C channels, H W height and width. Their label is ``specs.NONE``.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

SIDE_PATCHES = 4  # the number of patches along each side of an image
BLOB_GRID = 5  # random values a side, which interpolation joins to blobs


def non_objects(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return one image of none of the classes for each image: (N, C, H, W) uint8 in, the same shape and type out.

    A constant, uniform noise of a random strength on a random ground, the image's own patches in another order, or
    blobs; all four as likely. generator: on the images' device.
    """
    count, channels, height, width = images.shape
    device = images.device
    kind = torch.randint(4, (count, 1, 1, 1), generator=generator, device=device)
    level, strength, threshold = torch.rand((3, count, 1, 1, 1), generator=generator, device=device)
    level = (1.2 * level - 0.1).clamp(0, 1)  # one in twelve is all black, and one all white
    noise = torch.rand((count, channels, height, width), generator=generator, device=device)
    coarse = torch.rand((count, channels, BLOB_GRID, BLOB_GRID), generator=generator, device=device)
    smooth = interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    blobs = (8 * (smooth - 0.3 - 0.4 * threshold)).clamp(0, 1)
    noisy = (level * (1 - strength) + strength * noise).clamp(0, 1)
    made = torch.where(kind == 0, level, torch.where(kind == 1, noisy, blobs)).mul(255).round().to(torch.uint8)
    return torch.where(kind == 3, shuffled(images, generator), made)


def shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (N, C, H, W) with their patches in random order. Pixels outside whole patches do not change."""
    count, channels, height, width = images.shape
    rows, columns = height // SIDE_PATCHES, width // SIDE_PATCHES
    whole = images[:, :, : SIDE_PATCHES * rows, : SIDE_PATCHES * columns]
    patches = (
        whole.reshape(count, channels, SIDE_PATCHES, rows, SIDE_PATCHES, columns)
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(1, 2)
    )
    order = torch.rand((count, SIDE_PATCHES**2), generator=generator, device=images.device).argsort(1)
    moved = patches[torch.arange(count, device=images.device)[:, None], order]
    joined = moved.reshape(count, SIDE_PATCHES, SIDE_PATCHES, channels, rows, columns).permute(0, 3, 1, 4, 2, 5)
    result = images.clone()
    result[:, :, : SIDE_PATCHES * rows, : SIDE_PATCHES * columns] = joined.reshape(whole.shape)
    return result
