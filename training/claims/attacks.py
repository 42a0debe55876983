"""White-box attacks on a classifier of pixels: small changes within a bound that make its answer wrong.

Axes: B images, C H W of an image, J classes. Pixels are from 0 to 1. A change is bounded by ``epsilon`` in each pixel (the
maximum norm), and a changed image stays between 0 and 1. An image is fooled if its label does not have the largest score;
an image that is wrong without a change counts as fooled by every attack.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from training.loss import ABSENT, DOWN_WEIGHT, PRESENT, present_classes

STEPS = 50
RESTARTS = 5
#: The steps of one restart could lead this many times across the bound (Madry et al., arXiv 1706.06083, use 2.5).
REACH = 2.5
PARALLEL_IMAGES = 256
#: An arctanh is finite if its argument is this far from -1 and 1.
ARCTANH_GAP = 1e-6
PIXEL_VALUES = (0.0, 1.0)

#: From pixels (B, C, H, W) to scores (B, J), whose largest is the answer.
Scores = Callable[[Tensor], Tensor]
#: From scores (B, J) and labels (B,) to what the attacker increases, (B,).
Objective = Callable[[Tensor, Tensor], Tensor]


class Attacked(NamedTuple):
    """The changed images (B, C, H, W), and for each whether it fools the classifier, (B,) bool."""

    images: Tensor
    fooled: Tensor


def margin_objective(lengths: Tensor, labels: Tensor) -> Tensor:
    """Return the margin loss of each image (B,) from lengths (B, J) and labels (B,).

    Its gradient is exactly 0 where the label's length is above 0.9 and every other below 0.1, so an attacker who follows it
    does not move.
    """
    present = present_classes(labels, lengths.shape[1])
    short, long = torch.relu(PRESENT - lengths).square(), torch.relu(lengths - ABSENT).square()
    return (present * short + DOWN_WEIGHT * (1 - present) * long).sum(1)


def cross_entropy_objective(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image (B,) from logits (B, J) and labels (B,)."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def rival_objective(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest logit of a wrong class less the label's, (B,): above 0 the image is fooled.

    The margin of Carlini and Wagner (arXiv 1608.04644), from logits (B, J) and labels (B,).
    """
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1) - own


def log_odds(lengths: Tensor) -> Tensor:
    """Return arctanh(2 |v| - 1), half the logarithm of |v| / (1 - |v|): lengths (B, J) as logits without saturation."""
    return torch.atanh((2 * lengths - 1).clamp(ARCTANH_GAP - 1, 1 - ARCTANH_GAP))


def fooled_by(scores: Tensor, labels: Tensor) -> Tensor:
    """Return whether each image's label does not have the largest score: (B, J) and (B,) to (B,) bool."""
    return scores.argmax(1) != labels


def gradient(scores: Scores, objective: Objective, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the objective by the pixels (B, C, H, W), and the scores (B, J)."""
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        result = scores(pixels)
        (slope,) = torch.autograd.grad(objective(result, labels).sum(), pixels)
    return slope, result.detach()


def within(images: Tensor, centers: Tensor, epsilon: float) -> Tensor:
    """Return the nearest images to ``images`` with pixels from 0 to 1 that differ from ``centers`` by at most epsilon."""
    return torch.minimum(torch.maximum(images, centers - epsilon), centers + epsilon).clamp(0, 1)


def still_images(scores: Scores, objective: Objective, images: Tensor, labels: Tensor) -> Tensor:
    """Return whether the objective's gradient is exactly 0 in every pixel of an image: (B,) bool."""
    parts = [gradient(scores, objective, *part)[0].flatten(1) for part in _parts(images, labels)]
    return (torch.cat(parts) == 0).all(1)


def fgsm(scores: Scores, objective: Objective, images: Tensor, labels: Tensor, epsilon: float) -> Attacked:
    """Change each pixel once by epsilon in the direction of the gradient's sign (Goodfellow et al., arXiv 1412.6572)."""
    changed, fooled = [], []
    for part, answers in _parts(images, labels):
        slope, clean = gradient(scores, objective, part, answers)
        moved = within(part + epsilon * slope.sign(), part, epsilon)
        changed.append(moved)
        with torch.no_grad():
            fooled.append(fooled_by(clean, answers) | fooled_by(scores(moved), answers))
    return Attacked(torch.cat(changed), torch.cat(fooled))


def pgd(
    scores: Scores,
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    seed: int,
    steps: int = STEPS,
    restarts: int = RESTARTS,
) -> Attacked:
    """Follow the sign of the gradient in small steps from random starts (projected gradient descent, arXiv 1706.06083).

    An image is left alone as soon as one of the visited images fools the classifier; that one is returned. Otherwise the
    last one is. The random starts of an image depend on the seed and its place, not on what becomes of the others.
    """
    changed, fooled = images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    with torch.no_grad():
        for rows in torch.arange(len(images), device=images.device).split(PARALLEL_IMAGES):
            fooled[rows] = fooled_by(scores(images[rows]), labels[rows])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(restarts):
        noise = torch.rand(images.shape, generator=generator).to(images.device)
        start = within(images + epsilon * (2 * noise - 1), images, epsilon)
        for rows in (~fooled).nonzero().flatten().split(PARALLEL_IMAGES):
            climbed = _climb(scores, objective, start[rows], images[rows], labels[rows], epsilon, steps)
            changed[rows], fooled[rows] = climbed
    return Attacked(changed, fooled)


def _climb(
    scores: Scores, objective: Objective, start: Tensor, centers: Tensor, labels: Tensor, epsilon: float, steps: int
) -> Attacked:
    """Take the steps of one restart."""
    changed, fooled = start.clone(), torch.zeros(len(start), dtype=torch.bool, device=start.device)
    rows = torch.arange(len(start), device=start.device)
    for step in range(steps + 1):
        slope, result = gradient(scores, objective, changed[rows], labels[rows])
        found = fooled_by(result, labels[rows])
        fooled[rows[found]] = True
        moving = ~found & (slope != 0).flatten(1).any(1)  # an image without any slope would stay where it is
        rows, slope = rows[moving], slope[moving]
        if step == steps or not len(rows):
            break
        moved = changed[rows] + REACH * epsilon / steps * slope.sign()
        changed[rows] = within(moved, centers[rows], epsilon)
    return Attacked(changed, fooled)


class PixelSearch(NamedTuple):
    """The result of changing one pixel of an image in every way.

    tried: the number of changes; turned: how many of them give another answer, each (B,) int64. images: (B, C, H, W), for
    each image the change that brings a wrong class nearest to the label's.
    """

    images: Tensor
    tried: Tensor
    turned: Tensor


@torch.no_grad()
def one_pixel(scores: Scores, images: Tensor, labels: Tensor) -> PixelSearch:
    """Set each pixel of each image in turn to black and to white, one at a time, and count the wrong answers.

    All channels of a pixel change together. For MNIST these are 2 x 784 changes an image. A change to the value that the
    pixel has is tried with the others and gives the unchanged image; it is computed once.
    """
    searched = [_every_pixel(scores, image, label) for image, label in zip(images, labels, strict=True)]
    worst, tried, turned = zip(*searched, strict=True)
    return PixelSearch(torch.stack(worst), torch.tensor(tried), torch.tensor(turned))


def _every_pixel(scores: Scores, image: Tensor, label: Tensor) -> tuple[Tensor, int, int]:
    """Return the worst change of an image (C, H, W), the number of changes, and how many of them change the answer."""
    channels, height, width = image.shape
    pixels = image.reshape(channels, -1)
    numbers = torch.arange(height * width, device=image.device)
    tried, turned, worst, highest = 0, 0, image, -torch.inf
    for value in PIXEL_VALUES:
        tried += len(numbers)
        same = (pixels == value).all(0)
        # One of the changes that change nothing stands for all of them.
        counts = torch.ones_like(numbers)
        counts[same] = 0
        kept = numbers[~same]
        if same.any():
            first = numbers[same][:1]
            counts[first] = same.sum()
            kept = torch.cat([first, kept])
        for part in kept.split(PARALLEL_IMAGES):
            changed = pixels.repeat(len(part), 1, 1)
            changed[torch.arange(len(part)), :, part] = value
            changed = changed.reshape(-1, channels, height, width)
            answers = label.expand(len(part))
            result = scores(changed)
            turned += int(counts[part][fooled_by(result, answers)].sum())
            rivals = rival_objective(result, answers)
            if rivals.max() > highest:
                highest, worst = float(rivals.max()), changed[rivals.argmax()]
    return worst, tried, turned


def _parts(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.split(PARALLEL_IMAGES), labels.split(PARALLEL_IMAGES), strict=True)
