"""Row 6: the error of networks of several sizes."""

import numpy as np

from training.claims.bench import Bench
from training.claims.drawing import curves
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.jobs import Job, Scale
from training.claims.outcomes import errors, mean, of_kind, right
from training.claims.row import Claim, Row

KINDS = ("K3", "C0")
CLAIM = Claim(
    number=6,
    title="Few parameters",
    sentence="A capsule network needs fewer parameters than a plain network.",
    paper="8.2 million parameters, against 35.4 million of the plain network that it beats (Sabour et al. 2017)",
    counter="P-CapsNets (Chen et al. 2019): over 99 % right with 3,888 parameters, after routing was removed",
    limits="The paper compares one large network of each kind; here both kinds have three equal sizes.",
    decides="right answers at equal size, averaged over the sizes, capsules less plain, in percentage points",
    enough=0.07,
)


def jobs(scale: Scale) -> list[Job]:
    return [job for size in scale.sizes for job in scale.few(KINDS, size)]


def measure(bench: Bench) -> Evidence:
    labels = bench.images.test.labels.numpy()
    sizes = bench.scale.sizes
    found: dict[str, dict[str, Outcomes]] = {}
    counts: dict[str, dict[str, int]] = {}
    for size in sizes:
        of_size = bench.scale.few(KINDS, size)
        found[size] = {kind: right(bench, of_kind(of_size, kind), "test", labels) for kind in KINDS}
        counts[size] = {kind: bench.store.figures(of_kind(of_size, kind)[0])["parameters"] for kind in KINDS}
    means = {kind: np.mean([found[size][kind] for size in sizes], axis=0) for kind in KINDS}
    lines = {
        kind: ([counts[size][kind] for size in sizes], [100 - mean(found[size][kind]) for size in sizes])
        for kind in KINDS
    }
    small, large = sizes[0], sizes[1]
    title = "Errors by the number of parameters"
    return Evidence(
        comparisons=(
            Comparison("all sizes", "K3", "C0", means["K3"], means["C0"], "% right"),
            *(Comparison(f"size {size}", "K3", "C0", one["K3"], one["C0"], "% right") for size, one in found.items()),
            Comparison(
                f"capsules of {small} against plain of {large}",
                "K3",
                "C0",
                found[small]["K3"],
                found[large]["C0"],
                "% right",
            ),
        ),
        figures={
            "parameters without the decoder": counts,
            **{f"test errors at {size}, %, by seed": errors(found[size]) for size in sizes},
        },
        pictures={title: curves(title, "parameters", "errors, %", lines, logarithmic=True)},
        said=f"With {small} parameters, of 100 digits the capsule network misreads"
        f" {100 - mean(found[small]['K3']):.2f} and the plain network {100 - mean(found[small]['C0']):.2f}.",
    )


ROW = Row(CLAIM, jobs, measure)
