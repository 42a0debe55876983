"""Row 7: single numbers of a pose that mean something to a person, and the drawings that they control.

Axes: N images, S seeds, J classes, F numbers of a representation, A attributes, O steps of a slider.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.claims.batches import in_batches
from training.claims.bench import Bench
from training.claims.drawing import tiles
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.images import Labelled
from training.claims.jobs import Job, Scale
from training.claims.nets import CapsuleNet, PlainNet
from training.claims.regression import principal
from training.claims.row import Claim, Row
from training.claims.store import Arrays
from training.claims.strokes import ATTRIBUTES, attributes, ranks

CLAIM = Claim(
    number=7,
    title="Readable poses",
    sentence="Single numbers of a pose mean more that a person can name, such as slant, than those of a plain network.",
    paper="No figure: one of 16 numbers almost always stands for the digit's width (Sabour et al. 2017, section 5.1)",
    counter="No paper known to us measures single numbers; the paper shows drawings of six digits (figure 4)",
    decides="rank correlation of the best single number with thickness, width and slant, pose less plain network",
    enough=0.05,
    limits=(
        "The best number is chosen for each digit class on held-out digits, from 16 of a pose, and from 128 of the "
        "plain network, which has the same decoder."
    ),
)
KINDS = ("K3", "C0r")
JUDGE = "C0"  # reads the drawings too
COMPONENTS = 16
STEPS = 11  # of a slider
MAX_KEPT = 200  # digits whose sliders are all turned
#: The part of the range that a number has on held-out digits of the class, through which a slider moves it.
RANGE = (0.05, 0.95)
PIXELS = "16 components of the pixels"
_SHOWN = 5  # drawings in a row of the picture
_SHOWN_CLASS = 4


@dataclass(frozen=True)
class Chosen:
    """The best number for each class and attribute, and its sign: (J, A) both."""

    number: NDArray[np.int64]
    sign: NDArray[np.float64]


def choose(numbers: Tensor, measured: Tensor, labels: Tensor, classes: int) -> Chosen:
    """Return the numbers with the largest rank correlation with each attribute among the images of each class.

    numbers: (N, F), measured: the attributes (N, A), labels: (N,).
    """
    number = np.zeros((classes, measured.shape[1]), np.int64)
    sign = np.ones(number.shape)
    for label in range(classes):
        own = labels == label
        if not own.any():
            continue
        correlations = (ranks(numbers[own]).T @ ranks(measured[own]) / own.sum()).numpy()  # (F, A)
        best = np.abs(correlations).argmax(0)
        number[label] = best
        sign[label] = np.where(np.take_along_axis(correlations, best[None], 0)[0] < 0, -1, 1)
    return Chosen(number, sign)


def agreement(chosen: Chosen, numbers: Tensor, measured: Tensor, labels: Tensor) -> Outcomes:
    """Return each image's part of the rank correlation of the chosen numbers with the attributes, (A, N).

    The mean over the images of a class is the correlation there, with the sign that was chosen.
    """
    result = np.zeros((measured.shape[1], len(labels)))
    for label in sorted(set(labels.tolist())):
        own = labels == label
        true = ranks(measured[own])
        seen = ranks(numbers[own][:, chosen.number[label]]) * torch.from_numpy(chosen.sign[label])
        result[:, own] = (seen * true).T.numpy()
    return result


def numbers_of(net: CapsuleNet | PlainNet, digits: Labelled) -> Tensor:
    """Return the numbers (N, F) that a network's decoder draws a digit from.

    They are the pose of its class, or a plain network's features times their weights for the class.
    """

    def of(images: Tensor, labels: Tensor) -> Tensor:
        if isinstance(net, PlainNet):
            return net.features(images) * net.output.weight[labels]
        return net.class_poses(images, labels)

    return in_batches(of, digits.pixels, digits.labels)


def draw(net: CapsuleNet | PlainNet, numbers: Tensor, labels: Tensor) -> Tensor:
    """Return a network's drawings (N, 1, H, W) of numbers (N, F) as ``numbers_of`` returns them."""

    def plain(values: Tensor, _: Tensor) -> Tensor:
        assert isinstance(net, PlainNet) and net.decoder is not None
        pixels: Tensor = net.decoder(values)
        return pixels.reshape(-1, *net.spec.config.image_shape)

    def capsules(values: Tensor, classes: Tensor) -> Tensor:
        assert isinstance(net, CapsuleNet)
        poses = values.new_zeros(len(values), net.config.classes, values.shape[1])
        poses[torch.arange(len(values)), classes] = values
        return net.decode_poses(poses, classes)

    return in_batches(plain if isinstance(net, PlainNet) else capsules, numbers, labels)


def slide(numbers: Tensor, which: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return copies of numbers (N, F) in which number ``which`` (N,) goes evenly from low to high (N,): (N, O, F)."""
    steps = torch.linspace(0, 1, STEPS)
    result = numbers.unsqueeze(1).repeat(1, STEPS, 1)
    values = low.unsqueeze(1) + steps * (high - low).unsqueeze(1)
    return result.scatter(2, which.reshape(-1, 1, 1).expand(-1, STEPS, 1), values.unsqueeze(2))


def ranges(numbers: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return where each number of each class begins and ends, (J, F) both: the quantiles RANGE of its values."""
    ends = []
    for part in RANGE:
        rows = [numbers[labels == label].quantile(part, 0) for label in range(classes)]
        ends.append(torch.stack(rows))
    return ends[0], ends[1]


def followed(drawn: Tensor, attribute: int, sign: Tensor) -> Outcomes:
    """Return the rank correlation between the steps of a slider and the attribute of its drawings, (N,).

    drawn: (N, O, 1, H, W); sign: (N,), 1 if the attribute should grow, -1 if it should fall.
    """
    measured = attributes(drawn.flatten(0, 1))[:, attribute].reshape(len(drawn), STEPS)
    steps = ranks(torch.arange(STEPS).double().unsqueeze(1))  # (O, 1)
    correlations: Outcomes = ((ranks(measured.T) * steps).mean(0) * sign).numpy()
    return correlations


def jobs(scale: Scale) -> list[Job]:
    return scale.base([*KINDS, JUDGE])


def measure(bench: Bench) -> Evidence:
    held_out, test = bench.images.held_out, bench.images.test
    few = test.first(bench.scale.costly // 2)

    def of_net(kind: str, seed: int) -> Arrays:
        bench.progress(f"{kind}, seed {seed}")
        net, judge = (bench.net(bench.base(one, seed)) for one in (kind, JUDGE))
        return measured_of(net, judge, held_out, test, few)

    found = {
        kind: [bench.kept(f"readable-poses-{kind}-{seed}", partial(of_net, kind, seed)) for seed in bench.seeds]
        for kind in KINDS
    }
    return evidence(found, bench.kept("readable-poses-pixels", lambda: of_pixels(held_out, test)))


def of_pixels(held_out: Labelled, test: Labelled) -> Arrays:
    """Return how well the best of each class's 16 components of the pixels agrees with each attribute, (A, N)."""
    classes = int(held_out.labels.max()) + 1
    fitted, judged = (torch.zeros(len(one), COMPONENTS, dtype=torch.float64) for one in (held_out, test))
    for label in range(classes):
        own, others = held_out.labels == label, test.labels == label
        project = principal(held_out.pixels[own].flatten(1), COMPONENTS)
        for result, digits, mine in ((fitted, held_out, own), (judged, test, others)):
            found = project(digits.pixels[mine].flatten(1))
            result[mine, : found.shape[1]] = found
    chosen = choose(fitted, attributes(held_out.pixels), held_out.labels, classes)
    return {"agreement": agreement(chosen, judged, attributes(test.pixels), test.labels)}


def measured_of(
    net: CapsuleNet | PlainNet, judge: CapsuleNet | PlainNet, held_out: Labelled, test: Labelled, few: Labelled
) -> Arrays:
    """Return what is measured of one network.

    agreement: (A, N) as ``agreement``. followed: (A, M) of the M few digits. kept, of a capsule network alone: the
    share of the drawings of every slider that are read as the digit by the network itself, and by the judge,
    (2, MAX_KEPT). chosen: (J, A). shown: drawings of one digit, (A, O, H, W).
    """
    classes = net.spec.config.classes
    numbers = numbers_of(net, held_out)
    chosen = choose(numbers, attributes(held_out.pixels), held_out.labels, classes)
    low, high = ranges(numbers, held_out.labels, classes)
    at = few.labels
    drawn_from = numbers_of(net, few)
    shown, correlations = [], []
    index = int((at == _SHOWN_CLASS).int().argmax())
    for attribute in range(len(ATTRIBUTES)):
        which = torch.from_numpy(chosen.number[at.numpy(), attribute])
        sliders = slide(drawn_from, which, low[at, which], high[at, which])
        drawn = draw(net, sliders.flatten(0, 1), at.repeat_interleave(STEPS))
        drawn = drawn.reshape(-1, STEPS, *drawn.shape[1:])
        sign = torch.from_numpy(chosen.sign[at.numpy(), attribute])
        correlations.append(followed(drawn, attribute, sign))
        shown.append(drawn[index, :, 0] if sign[index] > 0 else drawn[index, :, 0].flip(0))
    result: Arrays = {
        "agreement": agreement(chosen, numbers_of(net, test), attributes(test.pixels), test.labels),
        "followed": np.stack(correlations),
        "chosen": chosen.number,
        "shown": torch.stack(shown).numpy(),
    }
    if isinstance(net, CapsuleNet):
        result["kept"] = kept(net, (net, judge), drawn_from[:MAX_KEPT], at[:MAX_KEPT], low, high)
    return result


def kept(
    net: CapsuleNet | PlainNet,
    readers: tuple[CapsuleNet | PlainNet, ...],
    numbers: Tensor,
    labels: Tensor,
    low: Tensor,
    high: Tensor,
) -> NDArray[np.float64]:
    """Return the share of drawings, in %, that each reader reads as the digit, over all sliders: (readers, M).

    numbers: (M, F), labels: (M,), low, high: (J, F).
    """
    right = np.zeros((len(readers), len(labels)))
    for number in range(numbers.shape[1]):
        which = torch.full_like(labels, number)
        sliders = slide(numbers, which, low[labels, number], high[labels, number])
        true = labels.repeat_interleave(STEPS)
        drawn = draw(net, sliders.flatten(0, 1), true)
        for place, reader in enumerate(readers):
            answers = in_batches(reader.scores, drawn).argmax(1)
            right[place] += (answers == true).reshape(-1, STEPS).double().mean(1).numpy()
    return 100 * right / numbers.shape[1]


def evidence(found: Mapping[str, list[Arrays]], pixels: Arrays) -> Evidence:
    """Return the evidence from what was measured of each kind's networks, one for each seed, and of the pixels."""

    def outcomes(kind: str, name: str) -> NDArray[np.float64]:
        return np.stack([one[name] for one in found[kind]]).astype(np.float64)

    ours, plain = KINDS
    by_pixels = np.stack([pixels["agreement"]] * len(found[ours])).astype(np.float64)
    read = {ours: outcomes(ours, "agreement"), plain: outcomes(plain, "agreement"), PIXELS: by_pixels}
    followed_by = {kind: outcomes(kind, "followed") for kind in KINDS}
    own, other = outcomes(ours, "kept").mean((0, 2)).round(2).tolist()
    agreed, drawn = ({name: one.mean(1) for name, one in side.items()} for side in (read, followed_by))
    figures = {
        "rank correlation of the best single number": {
            name: dict(zip(ATTRIBUTES, values.mean((0, 2)).round(4).tolist(), strict=True))
            for name, values in read.items()
        },
        "rank correlation of a slider with its drawings": {
            name: dict(zip(ATTRIBUTES, values.mean((0, 2)).round(4).tolist(), strict=True))
            for name, values in followed_by.items()
        },
        "drawings of all sliders that are read as the digit, in %": {
            "by the network itself": own,
            "by the plain network": other,
        },
        "most frequent best number of the ten digits": {
            kind: {f"network {place + 1}": _most_frequent(one["chosen"]) for place, one in enumerate(found[kind])}
            for kind in KINDS
        },
    }
    best = {name: values.mean((0, 2)) for name, values in read.items()}
    return Evidence(
        comparisons=(
            Comparison.between("the best single number", ours, plain, agreed, "correlation"),
            Comparison.between("… against the pixels", ours, PIXELS, agreed, "correlation"),
            Comparison.between("the drawing follows the slider", ours, plain, drawn, "correlation"),
        ),
        figures=figures,
        pictures={"Sliders for thickness, width and slant": picture(found)},
        said=(
            f"The best single number of a pose goes along with thickness by {best[ours][0]:.2f}, with width by "
            f"{best[ours][1]:.2f} and with slant by {best[ours][2]:.2f} (1 would be exactly); the plain network's by "
            f"{best[plain][0]:.2f}, {best[plain][1]:.2f} and {best[plain][2]:.2f}, and the pixels' best component by "
            f"{best[PIXELS][0]:.2f}, {best[PIXELS][1]:.2f} and {best[PIXELS][2]:.2f}."
        ),
    )


def _most_frequent(chosen: NDArray[np.generic]) -> dict[str, str]:
    """Return, by attribute, the number that most classes have chosen, and how many have. chosen: (J, A)."""
    result = {}
    for attribute, numbers in zip(ATTRIBUTES, chosen.T, strict=True):
        values, counts = np.unique(numbers, return_counts=True)
        result[attribute] = f"number {values[counts.argmax()]} in {counts.max()} of {len(numbers)} classes"
    return result


def picture(found: Mapping[str, list[Arrays]]) -> bytes:
    """Draw one digit with the best number for each attribute turned from low to high, by both networks."""
    steps = np.linspace(0, STEPS - 1, _SHOWN).round().astype(int)
    rows, words = [], []
    for kind, who in zip(KINDS, ("pose", "plain"), strict=True):
        for name, drawn in zip(ATTRIBUTES, found[kind][0]["shown"], strict=True):
            rows.append([drawn[step] for step in steps])
            words.append(f"{who}: {name}")
    ends = ["low", *[""] * (_SHOWN - 2), "high"]
    return tiles("One number turned from low to high", rows, words, ends)


ROW = Row(CLAIM, jobs, measure)
