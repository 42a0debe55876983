"""Row 15: digits on coloured noise and on coloured patches of clothes."""

import numpy as np

from training.claims.bench import Bench
from training.claims.drawing import bars, tiles
from training.claims.evidence import Comparison, Evidence
from training.claims.jobs import BACKGROUND, Job, Scale
from training.claims.outcomes import errors, mean, of_kind, right
from training.claims.row import Claim, Row
from training.claims.scoring import Sets

KINDS = ("K3", "C0", "K1", "C0r")
GROUNDS = ("noise", "clothes")
CLAIM = Claim(
    number=15,
    title="Busy backgrounds",
    sentence="Busy backgrounds hurt a capsule network more than a plain one: its authors say so.",
    paper="10.6 % errors on CIFAR-10, where backgrounds vary, with an ensemble of seven (Sabour et al. 2017)",
    counter="DeepCaps (Rajasegaran et al. 2019, arXiv 1904.09546): deeper capsule networks do better on such images",
    decides="right answers on both backgrounds, plain less capsules, in percentage points",
    enough=0.5,
    limits="The networks are trained on such backgrounds. The digits are white, the grounds coloured and darker.",
)


def jobs(scale: Scale) -> list[Job]:
    return scale.special(BACKGROUND, KINDS)


def measure(bench: Bench) -> Evidence:
    labels = bench.images.test.labels.numpy()
    all_jobs = jobs(bench.scale)
    found = {
        ground: {kind: right(bench, of_kind(all_jobs, kind), ground, labels) for kind in KINDS} for ground in GROUNDS
    }
    both = {kind: np.mean([found[ground][kind] for ground in GROUNDS], axis=0) for kind in KINDS}
    title = "Errors on busy backgrounds"
    shown = Sets(bench.images, bench.scale).backgrounds
    images = [list(shown[ground][:8].permute(0, 2, 3, 1).numpy() / 255) for ground in GROUNDS]
    return Evidence(
        comparisons=(
            Comparison("both backgrounds", "C0", "K3", both["C0"], both["K3"], "% right"),
            Comparison("both backgrounds", "C0r", "K3", both["C0r"], both["K3"], "% right"),
            Comparison("both backgrounds, routing once", "K1", "K3", both["K1"], both["K3"], "% right"),
            *(Comparison(f"on {ground}", "C0", "K3", one["C0"], one["K3"], "% right") for ground, one in found.items()),
        ),
        figures={f"test errors on {ground}, %, by seed": errors(one) for ground, one in found.items()},
        pictures={title: bars(title, "errors, %", errors(both)), "Such images": tiles("Such images", images, GROUNDS)},
        said=f"On busy backgrounds, of 100 digits the capsule network misreads {100 - mean(both['K3']):.2f}"
        f" and the plain network {100 - mean(both['C0']):.2f}.",
    )


ROW = Row(CLAIM, jobs, measure)
