"""Row 12: every change of a single pixel to black or to white."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from training.claims.attacks import every_pixel, open_scores
from training.claims.bench import Bench
from training.claims.drawing import Answered, answers
from training.claims.effort import EFFORTS, KINDS, by_network, sample
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.jobs import Job, Scale
from training.claims.row import Claim, Row
from training.claims.store import Arrays

CLAIM = Claim(
    number=12,
    title="One pixel",
    sentence="A capsule network is not misled by the change of a single pixel, as plain networks are.",
    paper="a limitation of plain networks that capsules help to eliminate (arXiv 1901.10112, without a figure)",
    counter="none found for capsules on MNIST; the attack is Su et al. 2017 (arXiv 1710.08864), by a search that does "
    "not try every pixel",
    decides="share of digits that no change of one pixel makes wrong, capsules less plain, in percentage points",
    enough=1.0,
    limits="All 784 pixels are set to black and to white, not to the greys between.",
)
EXAMPLES = 8  # images of a network in the picture


def jobs(scale: Scale) -> list[Job]:
    return scale.base(KINDS)


def measure(bench: Bench) -> Evidence:
    images, labels = sample(bench, EFFORTS[bench.scale.name].one_pixel)

    def searched(kind: str, seed: int) -> Arrays:
        bench.progress(f"{kind} of seed {seed}: each pixel of {len(images)} digits")
        scores = open_scores(bench.net(bench.base(kind, seed)))
        found = every_pixel(scores, images, labels)
        with torch.no_grad():
            clean, changed = scores(images).argmax(1), scores(found.images).argmax(1)
        return {
            "images": found.images[:, 0].numpy(),
            "tried": found.tried.numpy(),
            "turned": found.turned.numpy(),
            "right": (clean == labels).numpy(),
            "answers": changed.numpy(),
        }

    found = by_network(bench, "one-pixel", searched)
    return evidence(found, labels.numpy())


def evidence(found: Mapping[str, Sequence[Arrays]], labels: NDArray[np.int64]) -> Evidence:
    """Return the row's evidence from what the search found, by kind of network and seed."""
    firm: dict[str, Outcomes] = {
        kind: np.stack([100.0 * (one["right"] & (one["turned"] == 0)) for one in found[kind]]) for kind in found
    }

    def compare(first: str, second: str) -> Comparison:
        return Comparison("no single pixel makes it wrong", first, second, firm[first], firm[second], "% of digits")

    turned = {kind: [int((one["right"] & (one["turned"] > 0)).sum()) for one in found[kind]] for kind in found}
    count = len(labels)
    tried = int(found["K3"][0]["tried"].sum())
    mean = {kind: 100 * np.mean(turned[kind]) / count for kind in found}
    return Evidence(
        comparisons=(compare("K3", "C0"), compare("K3", "K1"), compare("K3", "C0r")),
        figures={
            "digits": count,
            "changes of each network": tried,
            "right digits that some pixel makes wrong, by seed": turned,
            "changes that give a wrong answer to a right digit, in %": {
                kind: round(
                    100 * float(np.mean([(one["turned"] * one["right"]).sum() / tried for one in found[kind]])), 4
                )
                for kind in found
            },
        },
        pictures={
            "The most harmful pixel of a digit": answers(
                "Digits with their most harmful pixel", {kind: _shown(found[kind][0], labels) for kind in ("K3", "C0")}
            )
        },
        said=f"Some single pixel misleads the capsule network on {mean['K3']:.1f} of 100 digits, "
        f"and the plain network on {mean['C0']:.1f}.",
    )


def _shown(one: Arrays, labels: NDArray[np.int64]) -> list[Answered]:
    """Return the digits that most changes turn with their most harmful pixel; digits misread without it come last."""
    order = np.lexsort((-one["turned"], ~one["right"]))[:EXAMPLES]
    return [Answered(one["images"][place], int(labels[place]), int(one["answers"][place])) for place in order]


ROW = Row(CLAIM, jobs, measure)
