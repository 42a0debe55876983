"""Detectors of attacked images, and the pursuit of an attacker who knows of them.

Axes: B images, C H W of an image. A detector's suspicion of an image is a number; above the threshold the image is
flagged. An attack succeeds silently if the answer is wrong and the image is not flagged.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.claims.attacks import PARALLEL_IMAGES, Pursuit, fooled_by, log_odds, rivalries
from training.claims.nets import CapsuleNet, PlainNet
from training.model import lengths

FALSE_ALARMS = 0.05  # the share of ordinary images that are flagged


@dataclass(frozen=True)
class View:
    """The results of one pass of images: scores and open_scores (B, J), and drawn, the reconstructions for classes."""

    pixels: Tensor
    scores: Tensor
    open_scores: Tensor
    drawn: Callable[[Tensor], Tensor]


def view(net: CapsuleNet | PlainNet, pixels: Tensor) -> View:
    """Show images (B, C, H, W) to a network."""
    if isinstance(net, PlainNet):
        units = net.features(pixels)
        logits: Tensor = net.output(units)
        return View(pixels, logits.softmax(1), logits, lambda classes: net.decode_features(units, classes))
    poses = net.poses(pixels)
    scores = lengths(poses)
    return View(pixels, scores, log_odds(scores), lambda classes: net.decode_poses(poses, classes))


#: From the view of images to their suspicions, (B,).
Suspicion = Callable[[View], Tensor]


def reconstruction_error(seen: View) -> Tensor:
    """Return the squared error of the reconstruction for the answer, summed over pixels: (B,)."""
    drawn = seen.drawn(seen.scores.argmax(1))
    return (drawn - seen.pixels).square().flatten(1).sum(1)


def closeness(seen: View) -> Tensor:
    """Return the second largest score less the largest, (B,)."""
    largest = seen.scores.topk(2).values
    return largest[:, 1] - largest[:, 0]


def shortness(seen: View) -> Tensor:
    """Return the largest score with its sign changed, (B,): of a capsule network the longest pose's length."""
    return -seen.scores.amax(1)


DETECTORS: dict[str, Suspicion] = {
    "reconstruction": reconstruction_error,
    "margin": closeness,
    "length": shortness,
}


def detectors(net: CapsuleNet | PlainNet) -> dict[str, Suspicion]:
    """Return the detectors that a network can have: without a decoder it cannot reconstruct."""
    return {name: one for name, one in DETECTORS.items() if net.decoder is not None or name != "reconstruction"}


@dataclass(frozen=True)
class Detector:
    """A suspicion with its threshold; spread: of ordinary images below it, the unit of the suspicion."""

    suspicion: Suspicion
    threshold: float
    spread: float

    @classmethod
    def fitted(cls, suspicion: Suspicion, net: CapsuleNet | PlainNet, pixels: Tensor) -> "Detector":
        """Return the detector that flags FALSE_ALARMS of these ordinary images (B, C, H, W)."""
        seen = suspicions(suspicion, net, pixels)
        threshold, middle = (float(seen.quantile(share)) for share in (1 - FALSE_ALARMS, 0.5))
        return cls(suspicion, threshold, max(threshold - middle, torch.finfo(torch.float32).eps))

    def excess(self, seen: View) -> Tensor:
        """Return the suspicions above the threshold, in spreads: above 0 an image is flagged, (B,)."""
        return (self.suspicion(seen) - self.threshold) / self.spread

    def flags(self, net: CapsuleNet | PlainNet, pixels: Tensor) -> Tensor:
        """Return whether each image is flagged, (B,) bool."""
        return suspicions(self.suspicion, net, pixels) > self.threshold


@torch.no_grad()
def suspicions(suspicion: Suspicion, net: CapsuleNet | PlainNet, pixels: Tensor) -> Tensor:
    """Return the suspicions of many images, (B,)."""
    return torch.cat([suspicion(view(net, part)) for part in torch.split(pixels, PARALLEL_IMAGES)])


def evading(net: CapsuleNet | PlainNet, detector: Detector) -> Pursuit:
    """Return the pursuit of silent success by an attacker who knows the detector.

    The attacker looks for a wrong answer while the answer is right, and lowers the suspicion while it is wrong. So do
    the reconstructive attack (arXiv 1907.02957) and selective steps (arXiv 2106.15023). The sum of both aims was
    weaker when it was tried: between two classes the suspicion by margin or length is highest.
    """

    def pursue(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        seen = view(net, pixels)
        rivals, excess = rivalries(seen.open_scores, labels), detector.excess(seen)
        fooled = fooled_by(seen.open_scores, labels)
        return torch.where(fooled, -excess, rivals), fooled & (excess <= 0)

    return pursue
