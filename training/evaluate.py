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


def mistakes(model: CapsNet, images: Tensor, labels: Tensor) -> list[int]:
    """The indices of the uint8 images (B, C, H, W) that get another class than their label (B,), ascending."""
    probabilities, _ = predict(model, images)
    wrong: list[int] = (probabilities.argmax(1) != labels).nonzero().flatten().tolist()
    return wrong
