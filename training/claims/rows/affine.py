"""Row 4: digits that are rotated, sheared and scaled, after a training on upright ones, at matched held-out error."""

import numpy as np
from numpy.typing import NDArray

from training.claims.bench import Bench
from training.claims.drawing import curves
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.jobs import PLACED, Job, Scale
from training.claims.outcomes import mean, of_kind
from training.claims.row import Claim, Row
from training.claims.store import Arrays

KINDS = ("K3", "C0", "K1", "C0r")
CLAIM = Claim(
    number=4,
    title="Turned and stretched digits",
    sentence="A capsule network trained on upright digits reads turned and stretched ones better than a plain one.",
    paper="79 % of affNIST, against 66 % of a plain network that reads upright digits as well (Sabour et al. 2017)",
    counter="Gu and Tresp 2020 (arXiv 1911.07968): 93.21 % without any routing, which adds nothing to the robustness",
    decides="right answers to the distorted digits at matched held-out error, capsules less plain, in points",
    enough=6.5,
    limits="affNIST itself is not used: our test digits are distorted within its published ranges (affNIST-spec).",
)


def jobs(scale: Scale) -> list[Job]:
    return scale.special(PLACED, KINDS)


def matched_point(arrays: Arrays, target: float) -> int:
    """Return the first point of the training at which the held-out error is at most the target, else the best one."""
    held_out = arrays["held_out"]
    below = np.flatnonzero(held_out <= target)
    return int(below[0]) if len(below) else int(held_out.argmin())


def right_at(found: list[Arrays], points: list[int], labels: NDArray[np.int64]) -> Outcomes:
    """Return 100 for a right answer and 0 for a wrong one, (S, N), at one point of each network's training."""
    pairs = zip(found, points, strict=True)
    return np.stack([100.0 * (arrays["answers"][point] == labels) for arrays, point in pairs])


def measure(bench: Bench) -> Evidence:
    labels = bench.images.test.labels.numpy()
    all_jobs = jobs(bench.scale)
    found = {kind: [bench.scored(job, "affine") for job in of_kind(all_jobs, kind)] for kind in KINDS}
    target = max(float(one["held_out"].min()) for arrays in found.values() for one in arrays)
    points = {kind: [matched_point(one, target) for one in arrays] for kind, arrays in found.items()}
    matched = {kind: right_at(found[kind], points[kind], labels) for kind in KINDS}
    last = {kind: right_at(found[kind], [len(one["steps"]) - 1 for one in found[kind]], labels) for kind in KINDS}

    def compare(name: str, first: str, second: str, side: dict[str, Outcomes]) -> Comparison:
        return Comparison(name, first, second, side[first], side[second], "% right")

    lines = {
        kind: (
            [100 * float(np.mean([one["held_out"][at] for one in arrays])) for at in range(len(arrays[0]["steps"]))],
            [mean(right_at(arrays, [at] * len(arrays), labels)) for at in range(len(arrays[0]["steps"]))],
        )
        for kind, arrays in found.items()
    }
    title = "Distorted digits by held-out error, during the training"
    return Evidence(
        comparisons=(
            compare("capsules against plain, matched", "K3", "C0", matched),
            compare("capsules against plain with our decoder, matched", "K3", "C0r", matched),
            compare("routing three times against once, matched", "K3", "K1", matched),
            compare("capsules against plain, at the end", "K3", "C0", last),
            compare("routing three times against once, at the end", "K3", "K1", last),
        ),
        figures={
            "matched held-out error, %": round(100 * target, 3),
            "held-out error at the matched point, %": {
                kind: [
                    round(100 * float(one["held_out"][at]), 3)
                    for one, at in zip(found[kind], points[kind], strict=True)
                ]
                for kind in KINDS
            },
            "right at the matched point, %": {
                kind: [round(float(one.mean()), 3) for one in matched[kind]] for kind in KINDS
            },
            "right at the end, %": {kind: [round(float(one.mean()), 3) for one in last[kind]] for kind in KINDS},
        },
        pictures={title: curves(title, "errors on upright digits, %", "right on distorted digits, %", lines)},
        said=f"Of 100 turned and stretched digits, the capsule network reads {mean(matched['K3']):.1f} and the plain"
        f" network {mean(matched['C0']):.1f}, if both read upright ones equally well.",
    )


ROW = Row(CLAIM, jobs, measure)
