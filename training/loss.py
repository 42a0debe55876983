"""The losses of the capsule network: equation 4 and section 4.1 of the paper."""

import torch
from torch import Tensor, nn

from training.recipe import PIXEL_WEIGHT

PRESENT = 0.9  # m+
ABSENT = 0.1  # m-
DOWN_WEIGHT = 0.5  # lambda, for absent classes


def margin_loss(probabilities: Tensor, classes: Tensor) -> Tensor:
    """Compute ``L_k = T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2`` (equation 4).

    probabilities: (B, J), the poses' lengths; classes: int64 (B,), or (B, K) of images with K objects of different
    classes. Summed over classes, averaged over images.
    """
    one_hot = nn.functional.one_hot(classes.reshape(len(classes), -1), probabilities.shape[1])  # (B, K, J)
    present = one_hot.sum(1).to(probabilities.dtype)  # (B, J)
    short = torch.relu(PRESENT - probabilities).square()
    long = torch.relu(probabilities - ABSENT).square()
    return (present * short + DOWN_WEIGHT * (1 - present) * long).sum(1).mean()


def presence_loss(probabilities: Tensor) -> Tensor:
    """Compute the cross-entropy of a network of one class, ``-log |v|``, for (B, 1), averaged.

    Every image has the class. The margin loss separates classes. With one class only its upper margin would be left.
    """
    return -torch.log(probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny)).mean()


def reconstruction_loss(reconstructions: Tensor, images: Tensor, pixel_weight: float = PIXEL_WEIGHT) -> Tensor:
    """Compute the weighted sum of squared pixel errors (section 4.1), averaged over images; (B, C, H, W), 0 to 1."""
    return pixel_weight * (reconstructions - images).square().flatten(1).sum(1).mean()
