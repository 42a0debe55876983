"""Row 14: two equal digits at several distances."""

import numpy as np

from training.claims.bench import Bench
from training.claims.drawing import curves, tiles
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.jobs import PLACED, Job, Scale
from training.claims.outcomes import mean, of_kind
from training.claims.row import Claim, Row
from training.claims.scoring import DISTANCES, Sets
from training.claims.store import Arrays

KINDS = ("K3", "C0", "C0r")
NEAR_PIXELS = (2, 14)  # two digits at such a distance are two, and touch or overlap
CLAIM = Claim(
    number=14,
    title="Crowding",
    sentence="A capsule network is confused by two equal digits that stand close together: its authors say so.",
    paper="named as a limit without a figure: at one place, a capsule can stand for one object of its kind alone"
    " (Sabour et al. 2017)",
    counter="Doerig et al. 2020 (PLOS Computational Biology): of many networks capsules alone explain uncrowding",
    decides="right answers to two equal digits 2 to 14 px apart, plain less capsules, in percentage points",
    enough=1.0,
    limits="The networks were trained on single digits, as in the row of turned and stretched digits. The third "
    "comparison has all distances, also those at which the digits lie on each other or apart.",
)


def jobs(scale: Scale) -> list[Job]:
    return scale.special(PLACED, KINDS)


def measure(bench: Bench) -> Evidence:
    scenes, true = Sets(bench.images, bench.scale).crowded
    labels = true.numpy()
    near = [at for at, distance in enumerate(DISTANCES) if NEAR_PIXELS[0] <= distance <= NEAR_PIXELS[1]]
    arrays = {kind: [bench.scored(job, "crowding") for job in of_kind(jobs(bench.scale), kind)] for kind in KINDS}
    right = {
        kind: np.stack([100.0 * (one["answers"] == labels) for one in arrays[kind]]) for kind in KINDS
    }  # (S, D, N)
    close: dict[str, Outcomes] = {kind: one[:, near].mean(1) for kind, one in right.items()}
    explained = {kind: _stacked(one, "explained") for kind, one in arrays.items() if "explained" in one[0]}
    reads = "Two equal digits: right answers by their distance"
    draws = "Two equal digits: share of the image in one reconstruction"
    samples = [0, len(DISTANCES) // 2, len(DISTANCES) - 1]
    return Evidence(
        comparisons=(
            Comparison("close digits", "C0", "K3", close["C0"], close["K3"], "% right"),
            Comparison("close digits", "C0r", "K3", close["C0r"], close["K3"], "% right"),
            Comparison("at all distances", "C0", "K3", right["C0"].mean(1), right["K3"].mean(1), "% right"),
            Comparison("explained", "C0r", "K3", explained["C0r"].mean(1), explained["K3"].mean(1), "of the image"),
        ),
        figures={
            "distances, px": list(DISTANCES),
            "right by distance, %": {kind: _by_distance(one) for kind, one in right.items()},
            "length or probability of the digit by distance": {
                kind: _by_distance(np.stack([one["scores"].astype(np.float64) for one in arrays[kind]]))
                for kind in KINDS
            },
            "explained by distance": {kind: _by_distance(one) for kind, one in explained.items()},
        },
        pictures={
            reads: _curve(reads, "right, %", right),
            draws: _curve(draws, "share", explained),
            "Such images": tiles(
                "Such images",
                [list(scenes[at, :8, 0].numpy() / 255) for at in samples],
                [f"{DISTANCES[at]} px" for at in samples],
            ),
        },
        said=f"Of 100 images of two close equal digits, the capsule network misreads {100 - mean(close['K3']):.1f}"
        f" and the plain network {100 - mean(close['C0']):.1f}.",
    )


def _stacked(arrays: list[Arrays], name: str) -> Outcomes:
    return np.stack([one[name].astype(np.float64) for one in arrays])


def _curve(title: str, y: str, values: dict[str, Outcomes]) -> bytes:
    return curves(title, "distance, px", y, {kind: (DISTANCES, _by_distance(one)) for kind, one in values.items()})


def _by_distance(values: Outcomes) -> list[float]:
    """Return the means over seeds and images of values (S, D, N)."""
    return [round(float(one), 4) for one in values.mean((0, 2))]


ROW = Row(CLAIM, jobs, measure)
