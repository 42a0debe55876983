"""Row 2: the length of a pose as a probability, on digits and on images that show none.

Axes: N images, S seeds, J classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from training.calibration import ECE_BINS, bins_of, confidences, expected_calibration_error, fit_temperature
from training.claims.batches import in_batches
from training.claims.bench import Bench
from training.claims.drawing import COLOURS, NAMES, png
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.images import Images
from training.claims.jobs import Job, Scale
from training.claims.nets import CapsuleNet, PlainNet
from training.claims.row import Claim, Row
from training.data.non_objects import shuffled
from training.evaluate import PRESENT_LENGTH

CLAIM = Claim(
    number=2,
    title="Length as probability",
    sentence="The length of a capsule's pose is the probability that its digit is there.",
    paper="No figure: the length represents the probability (Sabour et al. 2017, section 2)",
    counter=(
        "Uncertainty Estimation Using Variational Mixture of Gaussians Capsule Network (Computational Intelligence and "
        "Neuroscience, 2022): capsule networks tend to be overconfident on images unlike those of the training"
    ),
    decides="expected calibration error of the softmax less that of the length, in percentage points",
    enough=0.1,
    limits="The plain network's probability is the largest of its softmax, which adds up to 1 over the ten digits.",
)
KINDS = ("K3", "C0")
MAX_UNKNOWN = 2000  # images of each kind that shows no digit
MIN_DRAWN = 10  # answers; the share of right ones among fewer says little
_SEED = 0


@dataclass(frozen=True)
class Answers:
    """The answers of one network. The scores and confidences are those of each image's most probable class, (N,).

    right: 1 for a right answer. scores: as the network gives them. confidences: after one temperature. unknown: by kind
    of images that show no digit, the largest score, (M,).
    """

    right: NDArray[np.float64]
    scores: NDArray[np.float64]
    confidences: NDArray[np.float64]
    unknown: Mapping[str, NDArray[np.float64]]


def unknown_images(images: Images, count: int) -> dict[str, Tensor]:
    """Return images that show no digit, float (M, 1, H, W), by kind: one black image, and ``count`` of each other."""
    generator = torch.Generator().manual_seed(_SEED)
    tests = images.test.images[:count]
    return {
        "black": torch.zeros(1, *tests.shape[1:]),
        "noise": torch.rand(tests.shape, generator=generator),
        "digits in pieces": shuffled(tests, generator).float() / 255,
        "clothes": images.other_test.first(count).pixels,
    }


def logits(net: CapsuleNet | PlainNet) -> Callable[[Tensor], Tensor]:
    """Return the function whose softmax, at some temperature, is a network's confidence: its lengths, or its logits."""
    return net.logits if isinstance(net, PlainNet) else net.scores


def answers(net: CapsuleNet | PlainNet, images: Images, unknown: Mapping[str, Tensor]) -> Answers:
    """Ask a network about the test's digits and about unknown images. The temperature is fitted on held-out digits."""
    held_out, raw = (in_batches(logits(net), one.pixels).numpy() for one in (images.held_out, images.test))
    temperature = fit_temperature(held_out, images.held_out.labels.reshape(-1, 1).numpy())
    scores = in_batches(net.scores, images.test.pixels).double().numpy()
    chosen = scores.argmax(1)
    return Answers(
        right=(chosen == images.test.labels.numpy()).astype(np.float64),
        scores=scores.max(1),
        confidences=confidences(raw, temperature)[np.arange(len(raw)), chosen],
        unknown={name: in_batches(net.scores, one).amax(1).double().numpy() for name, one in unknown.items()},
    )


def calibration_parts(predicted: NDArray[np.float64], right: NDArray[np.float64]) -> Outcomes:
    """Return each image's part of the expected calibration error, times -1: (N,), with the mean of minus the error.

    The error adds up the distances by bin. In a bin whose predictions are too low on the whole, an image's part is how
    much too low its own is; else how much too high.
    """
    bins = bins_of(predicted)
    gaps = np.bincount(bins, weights=right - predicted, minlength=ECE_BINS)
    return -np.sign(gaps)[bins] * (right - predicted)


def ranked_above(digits: NDArray[np.float64], unknown: NDArray[np.float64]) -> Outcomes:
    """Return, for each unknown image, the share of digits with a larger score, (M,). Equal scores count half.

    The mean is the area under the receiver operating characteristic (AUROC).
    """
    ordered = np.sort(digits)
    below, to = (np.searchsorted(ordered, unknown, side) for side in ("left", "right"))
    return 1 - (below + to) / 2 / len(ordered)


def jobs(scale: Scale) -> list[Job]:
    return scale.base(KINDS)


def measure(bench: Bench) -> Evidence:
    images = bench.images
    unknown = unknown_images(images, min(MAX_UNKNOWN, len(images.test)))
    nets = {kind: [bench.net(bench.base(kind, seed)) for seed in bench.seeds] for kind in KINDS}
    return evidence({kind: [answers(net, images, unknown) for net in of_seeds] for kind, of_seeds in nets.items()})


def evidence(found: Mapping[str, list[Answers]]) -> Evidence:
    """Return the evidence from the answers of each kind's networks, one for each seed."""
    kinds_of_unknown = list(found[KINDS[0]][0].unknown)
    before, after = (
        {kind: [100 * _error(one, name) for one in of_seeds] for kind, of_seeds in found.items()}
        for name in ("scores", "confidences")
    )
    above = {name: _by_seed(found, partial(_share_present, name=name)) for name in kinds_of_unknown}
    areas = {name: _by_seed(found, partial(_area, name=name)) for name in kinds_of_unknown}
    said = {kind: (float(np.mean(before[kind])), float(np.mean(above["clothes"][kind]))) for kind in KINDS}
    return Evidence(
        comparisons=(
            _compare(found, "calibration error with a minus sign", partial(_calibration, name="scores"), "points"),
            _compare(found, "… after one temperature", partial(_calibration, name="confidences"), "points"),
            _compare(found, "images of no digit, told from digits", partial(_of_unknown, part=ranked_above), "AUROC"),
            _compare(found, "images of no digit, called none", partial(_of_unknown, part=_called_none), "%"),
        ),
        figures={
            "calibration error in points by seed, before": before,
            "calibration error in points by seed, after one temperature": after,
            "share above 0.5 in % by seed": above,
            "AUROC by seed": areas,
        },
        pictures={"What is said, and what is true": picture(found)},
        said=(
            f"The length misses the share of right answers by {said['K3'][0]:.1f} percentage points on average, the "
            f"plain network's probability by {said['C0'][0]:.1f}; of 100 pictures of clothes, the one finds a digit in "
            f"{said['K3'][1]:.0f}, the other in {said['C0'][1]:.0f}."
        ),
    )


def _compare(found: Mapping[str, list[Answers]], name: str, of: Callable[[Answers], Outcomes], unit: str) -> Comparison:
    return Comparison.between(name, *KINDS, {kind: np.stack([of(one) for one in found[kind]]) for kind in KINDS}, unit)


def _calibration(one: Answers, name: str) -> Outcomes:
    return 100 * calibration_parts(getattr(one, name), one.right)


def _of_unknown(one: Answers, part: Callable[[NDArray[np.float64], NDArray[np.float64]], Outcomes]) -> Outcomes:
    """Return a part of each unknown image that has others of its kind."""
    return np.concatenate([part(one.scores, scores) for scores in one.unknown.values() if len(scores) > 1])


def _called_none(_: NDArray[np.float64], unknown: NDArray[np.float64]) -> Outcomes:
    return np.where(_present(unknown), 0.0, 100.0)


def _share_present(one: Answers, name: str) -> float:
    return 100 * float(_present(one.unknown[name]).mean())


def _area(one: Answers, name: str) -> float:
    return float(ranked_above(one.scores, one.unknown[name]).mean())


def _error(one: Answers, name: str) -> float:
    return round(expected_calibration_error(getattr(one, name), one.right), 6)


def _present(scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    return scores > PRESENT_LENGTH


def _by_seed(found: Mapping[str, list[Answers]], of: Callable[[Answers], float]) -> dict[str, list[float]]:
    return {kind: [round(of(one), 4) for one in of_seeds] for kind, of_seeds in found.items()}


def reliability(predicted: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Return the mean prediction and the share of right answers of each bin that has MIN_DRAWN images."""
    bins = bins_of(predicted)
    counts = np.bincount(bins, minlength=ECE_BINS)
    used = counts >= MIN_DRAWN
    said, true = (np.bincount(bins, weights=one, minlength=ECE_BINS)[used] / counts[used] for one in (predicted, right))
    return said.tolist(), true.tolist()


def picture(found: Mapping[str, list[Answers]]) -> bytes:
    """Draw how often answers are right by what was said, and how often a digit is found where there is none."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="#b0b0b0", linestyle=":", label="as good as its word")
    for kind, of_seeds in found.items():
        scores, true = (np.concatenate([getattr(one, name) for one in of_seeds]) for name in ("scores", "right"))
        left.plot(*reliability(scores, true), "o-", markersize=3.5, color=COLOURS[kind], label=NAMES[kind])
    left.set_xlabel("probability that is said")
    left.set_ylabel("share of right answers")
    left.set_title("Digits", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    names = list(found[KINDS[0]][0].unknown)
    for place, (kind, of_seeds) in enumerate(found.items()):
        shares = [100 * np.mean([_present(one.unknown[name]).mean() for one in of_seeds]) for name in names]
        positions = np.arange(len(names)) + 0.4 * (place - 0.5)
        drawn = right.bar(positions, shares, width=0.38, color=COLOURS[kind], label=NAMES[kind])
        right.bar_label(drawn, [f"{share:.0f}" for share in shares], fontsize=8)
    right.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=8)
    right.set_ylim(0, 115)
    right.set_ylabel("% of the images above 0.5")
    right.set_title("Sure of a digit where there is none", fontsize=10)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    return png(figure)


ROW = Row(CLAIM, jobs, measure)
