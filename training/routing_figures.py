"""Measurements of what routing does in a trained network: primary lengths, couplings, and answers without agreement."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.evaluate import most_probable
from training.model import CapsNet, lengths, to_pixels

MAX_IMAGES = 2000
BATCH_SIZE = 100
#: The length of a primary capsule below which it is called absent, and above which it is called present.
ABSENT_LENGTH, PRIMARY_PRESENT_LENGTH = 0.1, 0.9


@dataclass(frozen=True)
class RoutingFigures:
    """Means over images of a network's routing.

    primary_length: the mean length of all primary capsules.
    entropies: by iteration, the entropy of a primary capsule's couplings over its parents, from 0 (one parent alone) to
    1 (all equal); empty for a network of one class.
    changed: the number of images that get another answer from one iteration, which has uniform couplings.
    """

    images: int
    primary_length: float
    entropies: tuple[float, ...]
    changed: int


@torch.inference_mode()
def routing_figures(model: CapsNet, images: Tensor, objects: int = 1) -> RoutingFigures:
    """Measure a network in evaluation mode on uint8 images (B, C, H, W), the first MAX_IMAGES of them.

    objects: the number of classes in an answer.
    """
    images = images[:MAX_IMAGES]
    iterations = model.config.routing_iterations
    length, entropies, changed = 0.0, torch.zeros(iterations, dtype=torch.float64), 0
    for part in torch.split(images, BATCH_SIZE):
        u = model.primary_capsules(to_pixels(part))  # (B, I, D)
        length += float(lengths(u).double().mean(1).sum())
        answers = []
        for count in range(1, iterations + 1):
            poses, couplings = model.routed(u, count)
            entropies[count - 1] += coupling_entropies(couplings).mean(1).double().sum()
            answers.append(most_probable(lengths(poses), objects))
        changed += int((answers[0] != answers[-1]).any(1).sum())
    shares = tuple(float(entropy) / len(images) for entropy in entropies) if model.config.classes > 1 else ()
    return RoutingFigures(len(images), length / len(images), shares, changed)


def coupling_entropies(couplings: Tensor) -> Tensor:
    """Return the entropy of couplings (B, J, I) over their parents, (B, I), from 0 (one parent alone) to 1 (all equal).

    The couplings of a primary capsule are divided by their sum first.
    """
    shares = couplings / couplings.sum(1, keepdim=True)
    return -torch.xlogy(shares, shares).sum(1) / math.log(max(2, couplings.shape[1]))
