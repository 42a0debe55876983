"""Detectors of attacked images, and the pursuit of an attacker who knows of them.

Axes: B images, C H W of an image. A detector's suspicion of an image is a number; above the threshold the image is
flagged. An attack succeeds silently if the answer is wrong and the image is not flagged.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.claims.attacks import PARALLEL_IMAGES, Pursuit, fooled_by, open_scores, rivalries
from training.claims.nets import CapsuleNet, PlainNet

FALSE_ALARMS = 0.05  # the share of ordinary images that are flagged
#: The rivalry above which the attacker with both aims at once is content with it.
CONTENT = 1.0

#: From a network and pixels (B, C, H, W) to suspicions (B,).
Suspicion = Callable[[CapsuleNet | PlainNet, Tensor], Tensor]


def reconstruction_error(net: CapsuleNet | PlainNet, pixels: Tensor) -> Tensor:
    """Return the squared error of the reconstruction for the answer, summed over pixels: (B,)."""
    answers = net.scores(pixels).argmax(1)
    return (net.decode(pixels, answers) - pixels).square().flatten(1).sum(1)


def closeness(net: CapsuleNet | PlainNet, pixels: Tensor) -> Tensor:
    """Return the second largest score less the largest, (B,)."""
    largest = net.scores(pixels).topk(2).values
    return largest[:, 1] - largest[:, 0]


def shortness(net: CapsuleNet | PlainNet, pixels: Tensor) -> Tensor:
    """Return the largest score with its sign changed, (B,): of a capsule network the longest pose's length."""
    return -net.scores(pixels).amax(1)


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

    def excess(self, net: CapsuleNet | PlainNet, pixels: Tensor) -> Tensor:
        """Return the suspicions above the threshold, in spreads: above 0 an image is flagged, (B,)."""
        return (self.suspicion(net, pixels) - self.threshold) / self.spread

    def flags(self, net: CapsuleNet | PlainNet, pixels: Tensor) -> Tensor:
        """Return whether each image is flagged, (B,) bool."""
        return suspicions(self.suspicion, net, pixels) > self.threshold


@torch.no_grad()
def suspicions(suspicion: Suspicion, net: CapsuleNet | PlainNet, pixels: Tensor) -> Tensor:
    """Return the suspicions of many images, (B,)."""
    return torch.cat([suspicion(net, part) for part in pixels.split(PARALLEL_IMAGES)])


def evading(net: CapsuleNet | PlainNet, detector: Detector, in_turn: bool) -> Pursuit:
    """Return the pursuit of silent success by an attacker who knows the detector.

    in_turn: the attacker looks for a wrong answer while the answer is right, and lowers the suspicion while it is
    wrong (selective steps, arXiv 2106.15023). Otherwise both aims are added, as in the reconstructive attack
    (arXiv 1907.02957), each only as far as it is needed.
    """
    scores = open_scores(net)

    def pursue(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        result = scores(pixels)
        rivals, excess = rivalries(result, labels), detector.excess(net, pixels)
        fooled = fooled_by(result, labels)
        both = rivals.clamp(max=CONTENT) - torch.relu(excess)
        return torch.where(fooled, -excess, rivals) if in_turn else both, fooled & (excess <= 0)

    return pursue
