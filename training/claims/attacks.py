"""White-box attacks on a classifier of pixels: small changes within a bound that make its answer wrong.

Axes: B images, C H W of an image, J classes. Pixels are from 0 to 1. A change of at most ``bound`` in each pixel is
allowed, and a changed image stays between 0 and 1. An image is fooled if its label does not have the largest score; an
image that is wrong without a change counts as fooled by every attack.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from training.claims.nets import CapsuleNet, PlainNet
from training.loss import margin_losses

STEPS = 50
RESTARTS = 5
#: The steps of one restart together, in bounds. With 2.5 each image of the allowed ones can be reached from any other
#: (Madry et al., arXiv 1706.06083).
REACH_BOUNDS = 2.5
PARALLEL_IMAGES = 256
#: The distance from -1 and 1 of an argument of arctanh, which keeps it finite.
ARCTANH_GAP = 1e-6
PIXEL_VALUES = (0.0, 1.0)

#: From pixels (B, C, H, W) to scores (B, J), whose largest is the answer.
Scores = Callable[[Tensor], Tensor]
#: From scores (B, J) and labels (B,) to a value of each image, (B,), that the attacker increases.
Objective = Callable[[Tensor, Tensor], Tensor]
#: From pixels (B, C, H, W) and labels (B,) to the values, (B,), and whether each image is what the attacker wants, (B,)
#: bool.
Pursuit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Attacked(NamedTuple):
    """The changed images (B, C, H, W), and whether each is what the attacker wants, (B,) bool."""

    images: Tensor
    reached: Tensor


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image (B,) from logits (B, J) and labels (B,)."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def rivalries(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest logit of a wrong class less the label's, (B,): above 0 the image is fooled.

    The margin of Carlini and Wagner (arXiv 1608.04644), from logits (B, J) and labels (B,).
    """
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1) - own


def log_odds(lengths: Tensor) -> Tensor:
    """Return arctanh(2 |v| - 1), half the logarithm of |v| / (1 - |v|), of lengths (B, J): it does not saturate."""
    return torch.atanh((2 * lengths - 1).clamp(ARCTANH_GAP - 1, 1 - ARCTANH_GAP))


def open_scores(net: CapsuleNet | PlainNet) -> Scores:
    """Return the scores whose gradient does not vanish: ``log_odds`` of the lengths, or a plain network's logits.

    The gradient of a capsule network runs through all iterations of its routing.
    """
    return net.logits if isinstance(net, PlainNet) else lambda pixels: log_odds(net.scores(pixels))


def fooled_by(scores: Tensor, labels: Tensor) -> Tensor:
    """Return whether each image's label does not have the largest score: (B, J) and (B,) to (B,) bool."""
    return scores.argmax(1) != labels


def fooling(scores: Scores, objective: Objective) -> Pursuit:
    """Return the pursuit of a wrong answer by increasing an objective."""

    def pursue(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        result = scores(pixels)
        return objective(result, labels), fooled_by(result, labels)

    return pursue


def by_own_loss(net: CapsuleNet | PlainNet) -> Pursuit:
    """Return the pursuit of a wrong answer by the loss that the network learned with: margin loss, or cross-entropy.

    The gradient of the margin loss is exactly 0 where the label's length is above 0.9 and every other below 0.1. An
    attacker who follows it does not move, which flatters a capsule network.
    """
    if isinstance(net, PlainNet):
        return fooling(net.logits, cross_entropies)
    return fooling(net.scores, margin_losses)


def by_rival(net: CapsuleNet | PlainNet) -> Pursuit:
    """Return the pursuit of a wrong answer by ``rivalries`` of the ``open_scores``."""
    return fooling(open_scores(net), rivalries)


def unending(pursue: Pursuit) -> Pursuit:
    """Return the pursuit of the largest value by an attacker who never stops early."""

    def go_on(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        values, reached = pursue(pixels, labels)
        return values, torch.zeros_like(reached)

    return go_on


def parts(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield as many images and labels as are computed at once."""
    return zip(torch.split(images, PARALLEL_IMAGES), torch.split(labels, PARALLEL_IMAGES), strict=True)


def within(images: Tensor, centers: Tensor, bound: float) -> Tensor:
    """Return the nearest images to ``images`` from 0 to 1 whose pixels differ by at most ``bound`` from ``centers``."""
    return torch.minimum(torch.maximum(images, centers - bound), centers + bound).clamp(0, 1)


def still(pursue: Pursuit, images: Tensor, labels: Tensor) -> Tensor:
    """Return whether the gradient of the pursuit is exactly 0 in every pixel of an image: (B,) bool."""
    slopes = [_slope(pursue, *part)[0] for part in parts(images, labels)]
    return ~_moves(torch.cat(slopes))


def fgsm(pursue: Pursuit, images: Tensor, labels: Tensor, bound: float) -> Attacked:
    """Change each pixel once by ``bound`` in the direction of the gradient's sign (arXiv 1412.6572)."""
    changed, reached = [], []
    for part, answers in parts(images, labels):
        slope, _, before = _slope(pursue, part, answers)
        moved = within(part + bound * slope.sign(), part, bound)
        changed.append(moved)
        with torch.no_grad():
            reached.append(before | pursue(moved, answers)[1])
    return Attacked(torch.cat(changed), torch.cat(reached))


def pgd(
    pursue: Pursuit,
    images: Tensor,
    labels: Tensor,
    bound: float,
    seed: int,
    steps: int = STEPS,
    restarts: int = RESTARTS,
) -> Attacked:
    """Follow the sign of the gradient in small steps from random starts (projected gradient descent, arXiv 1706.06083).

    An image is left alone as soon as an image on its way is what the attacker wants; that one is returned. Otherwise
    the one of the largest value is. The random starts of an image depend on the seed and its place alone.
    """
    with torch.no_grad():
        found = [pursue(*part) for part in parts(images, labels)]
    values, reached = (torch.cat(values) for values in zip(*found, strict=True))
    changed = images.clone()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(restarts):
        if reached.all():
            break
        noise = torch.rand(images.shape, generator=generator).to(images.device)
        starts = within(images + bound * (2 * noise - 1), images, bound)
        for rows in torch.split((~reached).nonzero().flatten(), PARALLEL_IMAGES):
            best = _climb(pursue, starts[rows], images[rows], labels[rows], bound, steps)
            better = best.reached | (best.values > values[rows])
            chosen = rows[better]
            changed[chosen], values[chosen] = best.images[better], best.values[better]
            reached[rows] = best.reached
    return Attacked(changed, reached)


class _Best(NamedTuple):
    """The best image on each way: (B, C, H, W), its value (B,), and whether it is what the attacker wants (B,)."""

    images: Tensor
    values: Tensor
    reached: Tensor


def _climb(pursue: Pursuit, starts: Tensor, centers: Tensor, labels: Tensor, bound: float, steps: int) -> _Best:
    """Take the steps of one restart."""
    best = _Best(starts.clone(), torch.full_like(labels, -torch.inf, dtype=starts.dtype), torch.zeros_like(labels) > 0)
    rows, pixels = torch.arange(len(starts), device=starts.device), starts
    for step in range(steps + 1):
        slope, values, reached = _slope(pursue, pixels, labels[rows])
        better = reached | (values > best.values[rows])
        best.images[rows[better]], best.values[rows[better]] = pixels[better], values[better]
        best.reached[rows] = reached
        moving = ~reached & _moves(slope)  # an image without a slope would stay where it is
        rows, pixels, slope = rows[moving], pixels[moving], slope[moving]
        if step == steps or not len(rows):
            break
        pixels = within(pixels + REACH_BOUNDS * bound / steps * slope.sign(), centers[rows], bound)
    return best


class PixelSearch(NamedTuple):
    """The result of changing one pixel of an image in every way.

    images: (B, C, H, W), for each image the change that brings a wrong class nearest to the label's. tried: the number
    of changes; turned: the number of those with a wrong answer, each (B,) int64.
    """

    images: Tensor
    tried: Tensor
    turned: Tensor


@torch.no_grad()
def every_pixel(scores: Scores, images: Tensor, labels: Tensor) -> PixelSearch:
    """Set each pixel of each image to black and to white, one at a time, and count the wrong answers.

    All channels of a pixel change together. For MNIST these are 784 x 2 changes an image. Changes that leave the image
    as it is count like the others, but are computed once.
    """
    searched = [_each_pixel_of(scores, image, label) for image, label in zip(images, labels, strict=True)]
    worst, tried, turned = zip(*searched, strict=True)
    return PixelSearch(torch.stack(worst), torch.tensor(tried), torch.tensor(turned))


def _each_pixel_of(scores: Scores, image: Tensor, label: Tensor) -> tuple[Tensor, int, int]:
    """Return the worst change of an image (C, H, W), the number of changes, and of those with a wrong answer."""
    flat = image.flatten(1)  # (C, H*W)
    size = flat.shape[1]
    places = torch.arange(size, device=image.device).repeat(len(PIXEL_VALUES))
    values = image.new_tensor(PIXEL_VALUES).repeat_interleave(size)
    different = (flat[:, places] != values).any(0)
    same = len(places) - int(different.sum())
    answer = label.reshape(1)
    worst, result = image, scores(image.unsqueeze(0))
    highest = rivalries(result, answer)
    turned = same * int(fooled_by(result, answer))
    for part in torch.split(different.nonzero().flatten(), PARALLEL_IMAGES):
        changed = flat.repeat(len(part), 1, 1)
        changed[torch.arange(len(part)), :, places[part]] = values[part].unsqueeze(1)
        changed = changed.reshape(-1, *image.shape)
        result = scores(changed)
        turned += int(fooled_by(result, label.expand(len(part))).sum())
        rivals = rivalries(result, label.expand(len(part)))
        if rivals.max() > highest:
            highest, worst = rivals.max(), changed[rivals.argmax()]
    return worst, len(places), turned


def _moves(slope: Tensor) -> Tensor:
    """Return whether a gradient (B, C, H, W) differs from 0 in a pixel, (B,) bool."""
    return (slope != 0).flatten(1).any(1)


def _slope(pursue: Pursuit, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the values by the pixels (B, C, H, W), the values, and whether each image is reached."""
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        values, reached = pursue(pixels, labels)
        (slope,) = torch.autograd.grad(values.sum(), pixels)
    return slope, values.detach(), reached
