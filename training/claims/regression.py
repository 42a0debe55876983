"""Linear readings of known numbers from features, and how well they do on other images.

Axes: N images, F features, P numbers to read.
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: The penalties of a reading, against the mean variance of the features; the best one on the images of the fit is
#: taken.
PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
_TINY = 1e-30  # for features that never change


class Reading(NamedTuple):
    """A linear function of features: ``(features - middle) @ weights + offset``."""

    middle: Tensor
    weights: Tensor
    offset: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return the numbers (N, P) that are read from features (N, F), in double precision."""
        return (features.double() - self.middle) @ self.weights + self.offset


def fit(features: Tensor, numbers: Tensor) -> Reading:
    """Return the ridge regression of numbers (N, P) on features (N, F).

    The penalty is the one of PENALTIES with the smallest squared error when each image in turn is left out, computed in
    closed form (Allen, "The relationship between variable selection and data augmentation", 1974). All features keep
    their scale: one that is 0 for nearly all images of the fit would else count too much for others.
    """
    x, y = features.double(), numbers.double()
    middle, offset = x.mean(0), y.mean(0)
    left, singular, right = torch.linalg.svd(x - middle, full_matrices=False)
    unit = float(singular.square().sum()) / x.shape[1]  # so much belongs to a feature on average
    rotated = left.T @ (y - offset)  # (min(N, F), P)
    best, chosen = torch.inf, singular
    for penalty in PENALTIES:
        kept = singular.square() / (singular.square() + penalty * unit + _TINY)
        fitted = left @ (kept.unsqueeze(1) * rotated)
        leverage = (left.square() @ kept + 1 / len(x)).clamp(max=1 - 1e-9)
        error = float(((y - offset - fitted) / (1 - leverage).unsqueeze(1)).square().sum())
        if error < best:
            best, chosen = error, singular / (singular.square() + penalty * unit + _TINY)
    return Reading(middle, right.T @ (chosen.unsqueeze(1) * rotated), offset)


def explained(read: Tensor, numbers: Tensor) -> Tensor:
    """Return each image's part of R^2, (N, P): ``1 - (number - read)^2 / variance``, whose mean over images is R^2.

    read, numbers: (N, P).
    """
    spread = (numbers - numbers.mean(0)).square().mean(0)
    return 1 - (numbers - read).square() / spread


class Components(NamedTuple):
    """The directions (F, K) in which features vary most, and their mean (F,)."""

    mean: Tensor
    directions: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return the features' coordinates (N, K)."""
        return (features.double() - self.mean) @ self.directions


def principal(features: Tensor, count: int) -> Components:
    """Return the first principal components of features (N, F), fewer where there are fewer."""
    x = features.double()
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    return Components(mean, directions[:count].T)
