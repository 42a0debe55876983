"""The evaluation of a network after its training: its answers to each image of the sets that the rows compare.

Axes: N images, J classes, K objects an image, C channels, H W height and width, P points of the training, D distances.
All sets are made on the CPU from fixed seeds, so they are the same for every network and device.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from training.claims.images import Images, Labelled
from training.claims.jobs import BACKGROUND, DIGITS, ONE_CLASS, PAIRS, PLACED, SHAPES, Job, Scale
from training.claims.nets import CapsuleNet, PlainNet
from training.claims.store import Arrays
from training.claims.streams import noise, on_background, patches
from training.data.compose import affnist_spec, combine, members, place
from training.evaluate import most_probable
from training.model import to_pixels

PART = 1000  # images at once
DISTANCES = tuple(range(0, 21, 2))  # between the middles of two equal digits, in pixels
MAX_CROWDED = 1000  # pairs of equal digits
MAX_DRAWN = 10_000  # pairs whose reconstructions are judged
BRIGHT = 127 / 255  # a pixel above it belongs to a digit
_SEEDS = {PLACED: 1, PAIRS: 2, BACKGROUND: 3, ONE_CLASS: 4, "crowding": 5, "held-out": 6}


class DivergedError(RuntimeError):
    """A network gives scores that are not finite, as after a training that diverged. The text says how many."""


class Sets:
    """The evaluation sets of a run, each made when it is first asked for, on the CPU."""

    def __init__(self, images: Images, scale: Scale) -> None:
        self._images, self._scale = images, scale

    @cached_property
    def affine(self) -> Labelled:
        """Test digits distorted within affNIST's published ranges on 40x40; see ``affnist_spec``."""
        test = self._images.test
        return Labelled(affnist_spec(test.images, SHAPES[PLACED][0], _generator(PLACED)), test.labels)

    @cached_property
    def placed(self) -> Labelled:
        """Held-out digits anywhere on 40x40, as the networks for it were trained."""
        held_out = self._images.held_out
        return Labelled(place(held_out.images, SHAPES[PLACED][0], _generator("held-out")), held_out.labels)

    @cached_property
    def crowded(self) -> tuple[Tensor, Tensor]:
        """Return two different test digits of one class side by side, (D, N, 1, 40, 40) uint8, and labels (N,)."""
        test = self._images.test.first(MAX_CROWDED)
        generator = _generator("crowding")
        order = torch.randperm(len(test), generator=generator)
        partner = torch.arange(len(test))
        for label in sorted(set(test.labels.tolist())):
            mine = order[test.labels[order] == label]
            partner[mine] = mine.roll(1)
        side = SHAPES[PLACED][0]
        room = DISTANCES[-1]  # of the canvas that is cut to 40 columns, beside both digits
        both = torch.stack([test.images, test.images[partner]], 1)  # (N, 2, 1, 28, 28)
        scenes = []
        for distance in DISTANCES:
            left = (side + room - distance - 28) // 2
            height = (side - 28) // 2
            moved = [
                pad(both[:, one], (at, side + room - 28 - at, height, side - 28 - height))
                for one, at in enumerate((left, left + distance))
            ]
            scenes.append(combine(torch.stack(moved, 1))[..., room // 2 : room // 2 + side])
        return torch.stack(scenes), test.labels

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield images (N, 1, 36, 36), their digits (N, 2, 1, 36, 36) and labels (N, 2), in parts of all test pairs."""
        test = self._images.test
        generator = _generator(PAIRS)
        left = self._scale.pairs
        while left > 0:
            chosen = members(test.labels, 2, generator)[: min(left, len(test))]
            placed = place(test.images[chosen.flatten()], SHAPES[PAIRS][0], generator)
            parts = placed.reshape(*chosen.shape, *placed.shape[1:])
            yield combine(parts), parts, test.labels[chosen]
            left -= len(chosen)

    @cached_property
    def all_pairs(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the parts of ``pairs``, kept for the next network."""
        return list(self.pairs())

    @cached_property
    def backgrounds(self) -> dict[str, Tensor]:
        """Return the test digits on noise and on clothes, (N, 3, 28, 28) uint8 each."""
        test, clothes = self._images.test.images, self._images.other_test.images
        generator = _generator(BACKGROUND)
        others = clothes[torch.randint(len(clothes), (len(test),), generator=generator)]
        grounds = {
            "noise": noise(len(test), tuple(test.shape[2:]), generator),
            "clothes": patches(others, generator),
        }
        return {name: on_background(test, ground, generator) for name, ground in grounds.items()}

    @cached_property
    def others(self) -> dict[str, Tensor]:
        """Return images that show no digit: clothes and noise, (N, 1, 28, 28) uint8 each."""
        clothes = self._images.other_test.images
        grey = noise(len(clothes), tuple(clothes.shape[2:]), _generator(ONE_CLASS))[:, :1]
        return {"clothes": clothes, "noise": (255 * grey).round().to(torch.uint8)}


def score(job: Job, net: CapsuleNet | PlainNet, images: Images, sets: Sets) -> dict[str, Arrays]:
    """Return the arrays of each evaluation set of the job's kind, by name. The affine set is ``Points``' work."""
    match job.images:
        case kind if kind == DIGITS:
            return {"test": answers(net, images.test.images, job.keep), **_held_out(job, net, images)}
        case kind if kind == PLACED:
            return {"crowding": _crowding(net, sets)}
        case kind if kind == PAIRS:
            return {"pairs": _pairs(net, sets)}
        case kind if kind == BACKGROUND:
            return {name: answers(net, shown) for name, shown in sets.backgrounds.items()}
    return {
        name: {"scores": scores(net, shown)[:, 0].half().numpy()}
        for name, shown in {"test": images.test.images, **sets.others}.items()
    }


def _held_out(job: Job, net: CapsuleNet | PlainNet, images: Images) -> dict[str, Arrays]:
    return {"held-out": answers(net, images.held_out.images, True)} if job.keep else {}


@torch.no_grad()
def scores(net: CapsuleNet | PlainNet, images: Tensor) -> Tensor:
    """Return the scores of uint8 images (N, C, H, W), (N, J) on the CPU, in single precision.

    Raises DivergedError if a score is not finite.
    """
    device = next(net.parameters()).device
    found = torch.cat([net.scores(to_pixels(part.to(device))).cpu() for part in torch.split(images, PART)])
    if wrong := int((~found.isfinite()).sum()):
        raise DivergedError(f"{wrong} of {found.numel()} scores are not finite")
    return found


def answers(net: CapsuleNet | PlainNet, images: Tensor, keep_scores: bool = False, objects: int = 1) -> Arrays:
    """Return the K classes with the highest scores, ascending: ``answers`` (N, K) uint8, and ``scores`` (N, J)."""
    found = scores(net, images)
    best = most_probable(found, objects).to(torch.uint8).numpy()
    return {"answers": best, **({"scores": found.half().numpy()} if keep_scores else {})}


class Points:
    """A network's answers to the affine set at several points of its training, with its held-out error at each.

    A row compares networks where their held-out errors match. Held-out images alone choose the point.
    """

    def __init__(self, sets: Sets) -> None:
        self._sets = sets
        self._steps: list[int] = []
        self._errors: list[float] = []
        self._answers: list[np.ndarray] = []

    def add(self, step: int, net: CapsuleNet | PlainNet) -> None:
        """Store the answers of a network as it is after this number of steps."""
        held_out = self._sets.placed
        found = answers(net, held_out.images)["answers"][:, 0]
        self._steps.append(step)
        self._errors.append(float((found != held_out.labels.numpy()).mean()))
        self._answers.append(answers(net, self._sets.affine.images)["answers"][:, 0])

    @property
    def arrays(self) -> Arrays:
        """Return ``steps`` (P,), ``held_out`` errors (P,) and ``answers`` (P, N)."""
        return {
            "steps": np.array(self._steps),
            "held_out": np.array(self._errors),
            "answers": np.stack(self._answers),
        }


def _crowding(net: CapsuleNet | PlainNet, sets: Sets) -> Arrays:
    """Return by distance the answers (D, N), the score of the label (D, N), and the share of ink explained (D, N)."""
    scenes, labels = sets.crowded
    found = [scores(net, scene) for scene in scenes]
    arrays = {
        "answers": torch.stack([most_probable(one)[:, 0] for one in found]).to(torch.uint8).numpy(),
        "scores": torch.stack([one.gather(1, labels[:, None])[:, 0] for one in found]).half().numpy(),
    }
    if net.decoder is not None:
        arrays["explained"] = np.stack([_explained(net, scene, labels) for scene in scenes])
    return arrays


@torch.no_grad()
def _explained(net: CapsuleNet | PlainNet, images: Tensor, labels: Tensor) -> np.ndarray:
    """Return 1 less the squared errors of the class's reconstruction, as a share of the image's squares: (N,)."""
    device = next(net.parameters()).device
    shares = []
    for part, classes in zip(torch.split(images, PART), torch.split(labels, PART), strict=True):
        pixels = to_pixels(part.to(device))
        wrong = (net.decode(pixels, classes.to(device)) - pixels).square().flatten(1).sum(1)
        shares.append((1 - wrong / pixels.square().flatten(1).sum(1)).cpu())
    return torch.cat(shares).half().numpy()


@torch.no_grad()
def _pairs(net: CapsuleNet | PlainNet, sets: Sets) -> Arrays:
    """Return the answers (N, 2), the labels (N, 2), and for the first MAX_DRAWN pairs the ``overlap``; see ``layers``.

    overlap: (n, 2), the intersection over the union of the bright pixels that go to each digit with its own.
    """
    found, labels, overlaps, drawn = [], [], [], 0
    for images, parts, true in sets.all_pairs:
        found.append(answers(net, images, objects=2)["answers"])
        labels.append(true.sort(1).values.to(torch.uint8).numpy())
        for one in range(0, len(images), PART):
            if net.decoder is None or drawn >= MAX_DRAWN:
                break
            part = slice(one, one + PART)
            given = layers(net, images[part], true[part])
            bright = to_pixels(parts[part]).flatten(2) > BRIGHT
            both, either = ((given & bright).sum(2), (given | bright).sum(2))
            overlaps.append((both / either.clamp_min(1)).half().numpy())
            drawn += len(given)
    arrays = {"answers": np.concatenate(found), "labels": np.concatenate(labels)}
    return arrays | ({"overlap": np.concatenate(overlaps)} if overlaps else {})


@torch.no_grad()
def layers(net: CapsuleNet | PlainNet, images: Tensor, labels: Tensor) -> Tensor:
    """Give each bright pixel to the digit whose reconstruction is brighter there: (N, 2, C*H*W) bool, on the CPU.

    images: (N, C, H, W) uint8; labels: (N, 2), the classes that are drawn.
    """
    device = next(net.parameters()).device
    pixels = to_pixels(images.to(device))
    first, second = (net.decode(pixels, labels[:, one].to(device)).flatten(1) for one in (0, 1))
    bright = pixels.flatten(1) > BRIGHT
    nearer = first >= second
    return torch.stack([bright & nearer, bright & ~nearer], 1).cpu()


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(_SEEDS[name])
