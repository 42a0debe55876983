"""The losses of a capsule network: equation 4 and section 4.1 of the paper, presence of one class, distillation."""

import torch
from torch import Tensor

from training.data.specs import NONE
from training.recipe import PIXEL_WEIGHT

PRESENT = 0.9  # m+
ABSENT = 0.1  # m-
DOWN_WEIGHT = 0.5  # lambda, for absent classes


def present_classes(labels: Tensor, classes: int) -> Tensor:
    """Mark each object's class: labels (B, K) to 0 or 1 as float, (B, K, J); all 0 where the label is NONE."""
    return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).to(torch.float32)


def margin_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """``L_k = T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2`` (equation 4).

    probabilities: (B, J), the poses' lengths; labels: int64 (B,), or (B, K) of images with K objects of different
    classes; NONE for an image of none of the classes, whose ``T_k`` are all 0. Summed over classes, averaged over
    images.
    """
    return margin_losses(probabilities, labels).mean()


def margin_losses(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the ``margin_loss`` of each image, (B,)."""
    one_hot = present_classes(labels.reshape(len(labels), -1), probabilities.shape[1])  # (B, K, J)
    present = one_hot.sum(1).to(probabilities.dtype)  # (B, J)
    short = torch.relu(PRESENT - probabilities).square()
    long = torch.relu(probabilities - ABSENT).square()
    return (present * short + DOWN_WEIGHT * (1 - present) * long).sum(1)


def presence_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of a network of one class: ``-log |v|`` of its images, ``-log(1 - |v|)`` of the others.

    probabilities: (B, 1), the pose's length; labels: int64 (B,) or (B, 1), 0, or NONE for an image without the class.
    Averaged over images. Without images of the second kind a network learns to say "present" to everything.
    """
    present = labels.reshape(-1, 1) != NONE
    right = torch.where(present, probabilities, 1 - probabilities)
    return -torch.log(right.clamp_min(torch.finfo(probabilities.dtype).tiny)).mean()


def distillation_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Squared differences to the lengths that other networks give; both (B, J). Summed over classes, averaged."""
    return (probabilities - targets).square().sum(1).mean()


def reconstruction_loss(reconstructions: Tensor, images: Tensor, pixel_weight: float = PIXEL_WEIGHT) -> Tensor:
    """Compute the weighted sum of squared pixel errors (section 4.1), averaged over images; (B, C, H, W), 0 to 1."""
    return pixel_weight * (reconstructions - images).square().flatten(1).sum(1).mean()
