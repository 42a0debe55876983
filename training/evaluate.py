"""Run a network over many images and find its mistakes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.data.specs import NONE
from training.model import CapsNet, lengths, to_pixels

PRESENT_LENGTH = 0.5  # a longer capsule says that its class is there


@torch.inference_mode()
def predict(model: CapsNet, images: Tensor, batch_size: int = 250) -> tuple[Tensor, Tensor]:
    """Return probabilities (B, J) and poses (B, J, E) for uint8 images (B, C, H, W), on the CPU."""
    device = next(model.parameters()).device
    poses = torch.cat([model(to_pixels(part.to(device))).cpu() for part in torch.split(images, batch_size)])
    return lengths(poses), poses


def mean_lengths(models: Sequence[nn.Module], pixels: Tensor) -> Tensor:
    """Return the mean of the networks' lengths for pixels (B, C, H, W), 0 to 1: (B, J) float32."""
    return torch.stack([lengths(model(pixels).float()) for model in models]).mean(0)


def most_probable(probabilities: Tensor, count: int = 1) -> Tensor:
    """Return the ``count`` most probable classes of each image, ascending: (B, J) to (B, count) int64."""
    return probabilities.topk(count).indices.sort(1).values


def wrong(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mark the images that get other classes than their labels, (B,) bool.

    probabilities: (B, J); labels: int64 (B,), or (B, K) of images with K objects of different classes, of which the K
    most probable classes must be all (the paper's measure for overlapping digits, section 6). An image with the label
    NONE is wrong if a capsule is longer than PRESENT_LENGTH. With only one class, an image of it is wrong if no capsule
    is longer than that.
    """
    labels = labels.reshape(len(labels), -1)
    found = probabilities.amax(1) > PRESENT_LENGTH
    others = (most_probable(probabilities, labels.shape[1]) != labels.sort(1).values).any(1)
    if probabilities.shape[1] == 1:
        others = ~found
    return torch.where(labels[:, 0] == NONE, found, others)


def mistakes(model: CapsNet, images: Tensor, labels: Tensor) -> list[int]:
    """Return the ascending indices of wrongly classified uint8 images (B, C, H, W). labels: as in ``wrong``."""
    probabilities, _ = predict(model, images)
    indices: list[int] = wrong(probabilities, labels).nonzero().flatten().tolist()
    return indices


def confusion(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Count how often each class (row) was mistaken for each class (column): (J, J) int64.

    probabilities: (M, J); labels: (M,), or (M, K), for which the K most probable classes are the answer. A label in the
    answer counts on the diagonal. Missed labels count in the columns of the wrong classes. If there are several, they
    are paired in the order of the classes, since nothing says which was mistaken for which.
    """
    classes = probabilities.shape[1]
    labels = labels.reshape(len(labels), -1)
    is_label, is_answer = (
        torch.zeros(probabilities.shape, dtype=torch.bool).scatter(1, chosen, True)
        for chosen in (labels, most_probable(probabilities, labels.shape[1]))
    )
    # nonzero goes by image and class, and an image has as many missed labels as wrong classes.
    pairs = ((is_label & is_answer, is_label & is_answer), (is_label & ~is_answer, is_answer & ~is_label))
    rows, columns = (torch.cat([side.nonzero()[:, 1] for side in sides]) for sides in zip(*pairs, strict=True))
    return torch.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)


def by_confidence(probabilities: Tensor, labels: Tensor) -> list[int]:
    """Return the indices of the wrongly classified images, the most confident mistake first.

    The confidence is the length of the longest capsule of a wrong class minus the length of the label's capsule, or of
    the shortest capsule of several labels. probabilities: (M, J); labels: (M,) or (M, K).
    """
    if probabilities.shape[1] == 1:  # there is no other class; the shortest capsule first
        indices = (probabilities[:, 0] <= PRESENT_LENGTH).nonzero().flatten()
        shortest: list[int] = indices[probabilities[indices, 0].argsort(stable=True)].tolist()
        return shortest
    objects = labels.reshape(len(labels), -1)
    intruder = probabilities.scatter(1, objects, -math.inf).amax(1)
    margins = intruder - probabilities.gather(1, objects).amin(1)
    indices = wrong(probabilities, labels).nonzero().flatten()
    order = margins[indices].argsort(descending=True, stable=True)
    worst: list[int] = indices[order].tolist()
    return worst
