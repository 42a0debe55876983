"""Row 10: two overlapping digits of different classes, and the pixels of each."""

import numpy as np

from training.claims.bench import Bench
from training.claims.drawing import bars, tiles
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.jobs import PAIRS, Job, Scale
from training.claims.outcomes import mean, of_kind
from training.claims.row import Claim, Row
from training.claims.scoring import Sets, layers
from training.claims.store import Arrays

KINDS = ("K3", "C0", "K1", "C0r")
DRAWN_PAIRS = 8
CLAIM = Claim(
    number=10,
    title="Overlapping digits",
    sentence="A capsule network tells two digits that lie on top of each other apart better than a plain one.",
    paper="5.2 % of MultiMNIST's pairs wrong, against 8.1 % of a plain network (Sabour et al. 2017)",
    counter="Gu, Tresp and Hu 2021 (arXiv 2103.15459): routing harms the reading of overlapping digits,"
    " and a plain network with the paper's other parts reads them better",
    decides="pairs of which both digits are found, capsules less plain, in percentage points",
    enough=1.45,
    limits="Our networks see far fewer pairs, in the full run one million; the paper's saw 60 million.",
)


def jobs(scale: Scale) -> list[Job]:
    return scale.special(PAIRS, KINDS)


def both_right(arrays: Arrays) -> Outcomes:
    """Return 100 for each pair of which both digits are the answer, else 0: (N,)."""
    right: Outcomes = 100.0 * (arrays["answers"] == arrays["labels"]).all(1)
    return right


def digits_right(arrays: Arrays) -> Outcomes:
    """Return the percentage of each pair's two digits that are in the answer: (N,)."""
    right: Outcomes = 50.0 * (arrays["answers"][:, :, None] == arrays["labels"][:, None]).any(1).sum(1)
    return right


def measure(bench: Bench) -> Evidence:
    all_jobs = jobs(bench.scale)
    arrays = {kind: [bench.scored(job, "pairs") for job in of_kind(all_jobs, kind)] for kind in KINDS}
    pairs = {kind: np.stack([both_right(one) for one in arrays[kind]]) for kind in KINDS}
    digits = {kind: np.stack([digits_right(one) for one in arrays[kind]]) for kind in KINDS}
    overlaps = {
        kind: np.stack([one["overlap"].astype(np.float64).mean(1) for one in arrays[kind]])
        for kind in KINDS
        if "overlap" in arrays[kind][0]
    }

    def compare(name: str, first: str, second: str, side: dict[str, Outcomes], unit: str) -> Comparison:
        return Comparison(name, first, second, side[first], side[second], unit)

    wrong = {kind: [100 - float(one.mean()) for one in pairs[kind]] for kind in KINDS}
    title = "Overlapping pairs that are not both read"
    return Evidence(
        comparisons=(
            compare("both digits, capsules against plain", "K3", "C0", pairs, "% of pairs"),
            compare("both digits, capsules against plain with our decoder", "K3", "C0r", pairs, "% of pairs"),
            compare("both digits, routing three times against once", "K3", "K1", pairs, "% of pairs"),
            compare("each digit, capsules against plain", "K3", "C0", digits, "% of digits"),
            compare("pixels of each digit", "K3", "C0r", overlaps, "IoU"),
            compare("pixels of each digit, routing three times against once", "K3", "K1", overlaps, "IoU"),
        ),
        figures={
            "pairs": len(arrays["K3"][0]["answers"]),
            "pairs wrong, %, by seed": {kind: [round(one, 3) for one in seen] for kind, seen in wrong.items()},
            "digits wrong, %": {kind: round(100 - mean(one), 3) for kind, one in digits.items()},
            "IoU of each digit's pixels": {kind: round(mean(one), 4) for kind, one in overlaps.items()},
        },
        pictures={title: bars(title, "pairs wrong, %", wrong), **_drawn(bench)},
        said=f"Of 100 overlapping pairs, the capsule network fails at {100 - mean(pairs['K3']):.1f}"
        f" and the plain network at {100 - mean(pairs['C0']):.1f}.",
    )


def _drawn(bench: Bench) -> dict[str, bytes]:
    """Draw pairs, and the pixels that the first seed's network gives to each digit."""
    net = bench.net(of_kind(jobs(bench.scale), "K3")[0])
    images, parts, labels = next(Sets(bench.images, bench.scale).pairs())
    images, parts, labels = images[:DRAWN_PAIRS], parts[:DRAWN_PAIRS], labels[:DRAWN_PAIRS]
    side = images.shape[-1]
    given = layers(net, images, labels).reshape(-1, 2, side, side)
    shown = images[:, 0].numpy() / 255
    rows = [list(shown)]
    for one in (0, 1):
        rows += [list(parts[:, one, 0].numpy() / 255), list(shown * given[:, one].numpy())]
    title = "Pairs, their digits, and the pixels that the capsule network gives to each"
    return {title: tiles(title, rows, ["pair", "first digit", "its pixels", "second digit", "its pixels"])}


ROW = Row(CLAIM, jobs, measure)
