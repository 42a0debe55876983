"""A function of images, run over many of them."""

from collections.abc import Callable

import torch
from torch import Tensor

BATCH_SIZE = 250


@torch.inference_mode()
def in_batches(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Return what a function gives for tensors of the same length, called on BATCH_SIZE rows of them at a time."""
    parts = [torch.split(value, BATCH_SIZE) for value in values]
    return torch.cat([function(*part) for part in zip(*parts, strict=True)])
