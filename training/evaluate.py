"""Run a network over many images and find its mistakes."""

import torch
from torch import Tensor

from training.model import CapsNet, lengths, to_pixels


@torch.inference_mode()
def predict(model: CapsNet, images: Tensor, batch_size: int = 250) -> tuple[Tensor, Tensor]:
    """uint8 images (B, C, H, W) to probabilities (B, J) and poses (B, J, E), on the CPU, in their order."""
    device = next(model.parameters()).device
    poses = torch.cat([model(to_pixels(part.to(device))).cpu() for part in torch.split(images, batch_size)])
    return lengths(poses), poses


def most_probable(probabilities: Tensor, count: int = 1) -> Tensor:
    """The ``count`` most probable classes of each image, ascending: (B, J) to (B, count) int64."""
    return probabilities.topk(count).indices.sort(1).values


def wrong(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Which images get other classes than their labels, (B,) bool.

    probabilities: (B, J); labels: int64 (B,), or (B, K) of images with K objects of different classes, of which the K
    most probable classes must be all (the paper's measure for overlapping digits, section 6).
    """
    labels = labels.reshape(len(labels), -1)
    return (most_probable(probabilities, labels.shape[1]) != labels.sort(1).values).any(1)


def mistakes(model: CapsNet, images: Tensor, labels: Tensor) -> list[int]:
    """The indices, ascending, of the uint8 images (B, C, H, W) that are classified wrong; labels as in ``wrong``."""
    probabilities, _ = predict(model, images)
    indices: list[int] = wrong(probabilities, labels).nonzero().flatten().tolist()
    return indices
