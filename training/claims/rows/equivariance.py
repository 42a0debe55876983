"""Row 3: the known changes of a digit, read from its pose, and errors beyond the changes that were learned.

Axes: N images, S seeds, F features, A kinds of changes, D distances.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from training.claims.batches import in_batches
from training.claims.bench import Bench
from training.claims.drawing import COLOURS, OTHER_COLOUR, curves, png
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.images import Images, Labelled
from training.claims.jobs import Job, Scale
from training.claims.known_changes import CHANGES, Change, shifted
from training.claims.nets import CapsuleNet, PlainNet
from training.claims.regression import explained, fit, principal
from training.claims.row import Claim, Row
from training.claims.store import Arrays

CLAIM = Claim(
    number=3,
    title="Equivariance",
    sentence="If a digit moves, turns or grows, its pose changes in step; a plain network loses this.",
    paper="No figure: position and other properties are in the numbers of a capsule's vector (Sabour et al. 2017)",
    counter=(
        "Building Deep Equivariant Capsule Networks (Venkataraman et al. 2020): capsule networks generally lack "
        "provable guarantees of equivariance"
    ),
    decides="R^2 of seven changes, read from the change of the 16 numbers of the pose, less from 128 plain features",
    enough=0.02,
    limits=(
        "One change at a time, read by linear regression for each digit class by itself. Thickness was not changed in "
        "training; the other changes stay within those of the training. Digits reach the edge at a shift of 4 pixels. "
        "The plain network has strides instead of pooling, and so keeps more of the position than one that pools. It "
        "does not learn to reconstruct, as the capsule network does; the third comparison is with one that does."
    ),
)
KINDS = ("K3", "C0", "C0r", "K1")
COMPONENTS = 16  # as many numbers as a pose has
DISTANCES = (0, 1, 2, 3, 4, 5, 6)  # pixels of a shift
LEARNED_DISTANCE = 2
_SEED = 0
_MIN_IMAGES = 400

#: The numbers that a change is read from.
POSE, FEATURES = "pose", "plain features"
FEATURES_16, PIXELS_16 = "16 components of them", "16 components of the pixels"
RECONSTRUCTING, ONCE = "features with our decoder", "pose, routed once"
#: By name, the kind of network that has the numbers, and what they are there.
SOURCES = {
    POSE: ("K3", POSE),
    FEATURES: ("C0", FEATURES),
    FEATURES_16: ("C0", FEATURES_16),
    RECONSTRUCTING: ("C0r", FEATURES),
    ONCE: ("K1", POSE),
}


@dataclass(frozen=True)
class Changed:
    """Digits as they are and changed: images (A + 1, N, 1, H, W), 0 to 1, labels (N,), and amounts (A, N)."""

    images: Tensor
    labels: Tensor
    amounts: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def changed(digits: Labelled, changes: tuple[Change, ...], seed: int) -> Changed:
    """Return digits with each of the changes by a random amount."""
    generator = torch.Generator().manual_seed(seed)
    pixels = digits.pixels
    amounts = [change.drawn(len(digits), generator) for change in changes]
    images = [pixels, *(change(pixels, amount) for change, amount in zip(changes, amounts, strict=True))]
    return Changed(torch.stack(images), digits.labels, torch.stack(amounts))


def read(fitted: Tensor, amounts: Tensor, judged: Tensor, true: Tensor) -> Tensor:
    """Return each image's part of R^2 of a change's amount, (M,), read from features by a linear regression.

    fitted: features (N, F) of the images of the fit, with amounts (N,); judged: those of others, (M, F), with (M,).
    """
    reading = fit(fitted, amounts.unsqueeze(1))
    return explained(reading(judged), true.double().unsqueeze(1)).squeeze(1)


def readings(
    fitting: Changed, judging: Changed, fitted: Tensor, judged: Tensor, components: int = 0
) -> tuple[Outcomes, Outcomes]:
    """Return each judged image's part of R^2, (A, M), read from its features, and from the change of its features.

    fitted: the features (A + 1, N, F) of the images to fit, judged: (A + 1, M, F). Each class has a regression of its
    own. components: the number of the class's principal components that is read instead of the features; 0 for all.
    """
    still, moved = (torch.zeros(len(judging.amounts), len(judging), dtype=torch.float64) for _ in range(2))
    for label in sorted(set(fitting.labels.tolist())):
        own, others = fitting.labels == label, judging.labels == label
        x, y = fitted[:, own].double(), judged[:, others].double()
        if components:
            project = principal(x.flatten(0, 1), components)
            x, y = (torch.stack([project(one) for one in side]) for side in (x, y))
        for number, amounts in enumerate(fitting.amounts):
            drawn, true = amounts[own], judging.amounts[number, others]
            still[number, others] = read(x[number + 1], drawn, y[number + 1], true)
            moved[number, others] = read(x[number + 1] - x[0], drawn, y[number + 1] - y[0], true)
    return still.numpy(), moved.numpy()


def features_of(net: CapsuleNet | PlainNet, digits: Changed) -> Tensor:
    """Return the poses of the digits' classes, or a plain network's features, of all changed digits, (A + 1, N, F)."""

    def of(images: Tensor, labels: Tensor) -> Tensor:
        return net.features(images) if isinstance(net, PlainNet) else net.class_poses(images, labels)

    return torch.stack([in_batches(of, one, digits.labels) for one in digits.images])


def beyond(net: CapsuleNet | PlainNet, digits: Labelled) -> Outcomes:
    """Return 100 for a right answer and 0 for a wrong one, (D, N), to digits at each of DISTANCES from their place.

    Each digit moves to one of the four sides, the same at all distances.
    """
    generator = torch.Generator().manual_seed(_SEED)
    side = torch.randint(4, (len(digits),), generator=generator)
    right, down = torch.tensor([1, 0, -1, 0])[side], torch.tensor([0, 1, 0, -1])[side]
    result = []
    for distance in DISTANCES:
        scores = in_batches(net.scores, shifted(digits.pixels, right.float() * distance, down.float() * distance))
        result.append(100.0 * (scores.argmax(1) == digits.labels).numpy())
    return np.stack(result)


def jobs(scale: Scale) -> list[Job]:
    return scale.base(KINDS)


def measure(bench: Bench) -> Evidence:
    fitting, judging = sides(bench.images, max(_MIN_IMAGES, 2 * bench.scale.costly))

    def of_net(kind: str, seed: int) -> Arrays:
        bench.progress(f"{kind}, seed {seed}")
        net = bench.net(bench.base(kind, seed))
        return measured(net, fitting, judging, bench.images.test.first(len(judging)))

    found = {
        kind: [bench.kept(f"equivariance-{kind}-{seed}", partial(of_net, kind, seed)) for seed in bench.seeds]
        for kind in KINDS
    }
    return evidence(found, bench.kept("equivariance-pixels", lambda: of_pixels(fitting, judging)))


def sides(images: Images, count: int) -> tuple[Changed, Changed]:
    """Return changed held-out digits, to fit on, and so many changed test digits, to judge on."""
    return changed(images.held_out, CHANGES, _SEED), changed(images.test.first(count), CHANGES, _SEED + 1)


def measured(net: CapsuleNet | PlainNet, fitting: Changed, judging: Changed, digits: Labelled) -> Arrays:
    """Return what is read from a network: parts of R^2 (A, M) by what they are read from, and answers (D, M)."""
    fitted, judged = features_of(net, fitting), features_of(net, judging)
    names = {FEATURES: 0, FEATURES_16: COMPONENTS} if isinstance(net, PlainNet) else {POSE: 0}
    result: Arrays = {"right": beyond(net, digits)}
    for name, components in names.items():
        result[name], result[f"change of {name}"] = readings(fitting, judging, fitted, judged, components)
    return result


def of_pixels(fitting: Changed, judging: Changed) -> Arrays:
    """Return parts of R^2 (A, M) that are read from the principal components of the pixels."""
    still, moved = readings(fitting, judging, fitting.images.flatten(2), judging.images.flatten(2), COMPONENTS)
    return {PIXELS_16: still, f"change of {PIXELS_16}": moved}


def evidence(found: Mapping[str, list[Arrays]], pixels: Arrays) -> Evidence:
    """Return the evidence from the measured arrays of each kind's networks, one for each seed, and of the pixels."""
    still, moved = (_parts(found, pixels, prefix) for prefix in ("", "change of "))
    right = {kind: np.stack([one["right"] for one in of_seeds]).astype(np.float64) for kind, of_seeds in found.items()}

    def compare(title: str, other: str, parts: Mapping[str, NDArray[np.float64]]) -> Comparison:
        means = {name: parts[name].mean(1) for name in (POSE, other)}
        return Comparison.between(title, POSE, other, means, "R^2")

    far = [number for number, distance in enumerate(DISTANCES) if distance > LEARNED_DISTANCE]
    right_beyond = {kind: values[:, far].mean(1) for kind, values in right.items()}
    errors = {kind: 100 - values.mean((0, 2)) for kind, values in right.items()}
    by_change = {
        words: {
            name: dict(zip((one.name for one in CHANGES), values.mean((0, 2)).round(4).tolist(), strict=True))
            for name, values in parts.items()
        }
        for words, parts in (("R^2 from the change of the numbers", moved), ("R^2 from the numbers themselves", still))
    }
    shares = {name: 100 * max(0.0, float(values.mean())) for name, values in moved.items()}
    return Evidence(
        comparisons=(
            compare("read from the change of the pose, and of 128 plain features", FEATURES, moved),
            compare("… and of as many numbers", FEATURES_16, moved),
            compare("… and of 128 features of a plain network with our decoder", RECONSTRUCTING, moved),
            compare("… with three iterations of routing, and with one", ONCE, moved),
            compare("read from the pose, and from 128 plain features", FEATURES, still),
            compare("… and from 128 features of a plain network with our decoder", RECONSTRUCTING, still),
            compare("… and from the pixels", PIXELS_16, still),
            Comparison.between("right beyond the learned shifts, 3 to 6 pixels", "K3", "C0", right_beyond, "% right"),
            Comparison.between("… and a plain network with our decoder", "K3", "C0r", right_beyond, "% right"),
        ),
        figures=by_change
        | {
            "errors in % by shift in pixels": {
                kind: dict(zip(map(str, DISTANCES), values.round(3).tolist(), strict=True))
                for kind, values in errors.items()
            }
        },
        pictures={
            "How exactly a change can be read": picture(by_change["R^2 from the change of the numbers"]),
            "Errors beyond the learned shifts": curves(
                "Errors on moved digits (learned: up to 2 pixels)",
                "shift, pixels",
                "errors, %",
                {kind: (DISTANCES, values.tolist()) for kind, values in errors.items()},
            ),
        },
        said=(
            f"From the pose, {shares[POSE]:.0f} % of a change can be read, from the plain network's 128 features "
            f"{shares[FEATURES]:.0f} %, and with our decoder {shares[RECONSTRUCTING]:.0f} %; of digits moved by 5 "
            f"pixels, capsules misread {errors['K3'][5]:.0f} %, the plain network {errors['C0'][5]:.0f} %."
        ),
    )


def _parts(found: Mapping[str, list[Arrays]], pixels: Arrays, prefix: str) -> dict[str, NDArray[np.float64]]:
    """Return the parts of R^2 by what they are read from, (S, A, N) each."""
    seeds = len(found["K3"])
    result = {
        name: np.stack([one[prefix + numbers] for one in found[kind]]) for name, (kind, numbers) in SOURCES.items()
    }
    return result | {PIXELS_16: np.stack([pixels[prefix + PIXELS_16]] * seeds)}


def picture(values: Mapping[str, Mapping[str, float]]) -> bytes:
    """Draw R^2 by change and by what it is read from."""
    looks = {
        POSE: ("K3", "pose, 16 numbers"),
        FEATURES: ("C0", "plain, 128 features"),
        RECONSTRUCTING: ("C0r", "plain with our decoder, 128 features"),
        PIXELS_16: ("", "16 components of the pixels"),
    }
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    panel = figure.add_subplot()
    for place, (name, (kind, words)) in enumerate(looks.items()):
        positions = np.arange(len(CHANGES)) + 0.2 * (place - 1.5)
        shown = [max(0.0, value) for value in values[name].values()]
        panel.bar(positions, shown, width=0.19, color=COLOURS.get(kind, OTHER_COLOUR), label=words)
    panel.set_xticks(range(len(CHANGES)), [change.name for change in CHANGES], fontsize=8.5)
    panel.set_ylim(0, 1)
    panel.set_ylabel("share that can be read (R²)")
    panel.set_title("How exactly a digit's change can be read, from the change of…", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return png(figure)


ROW = Row(CLAIM, jobs, measure)
