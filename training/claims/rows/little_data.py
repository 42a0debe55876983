"""Row 5: few training images of each class, with equally many steps."""

import numpy as np

from training.claims.bench import Bench
from training.claims.drawing import curves
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.jobs import Job, Scale
from training.claims.outcomes import errors, mean, of_kind, right
from training.claims.row import Claim, Row

KINDS = ("K3", "C0", "C0r")
CLAIM = Claim(
    number=5,
    title="Little data",
    sentence="A capsule network needs fewer training images than a plain network.",
    paper="back at full accuracy over 25 times faster than a plain network, from 1 to 100 examples of a new digit"
    ' ("Capsule networks for low-data transfer learning"); no figure in the first paper',
    counter="none found that measures it on MNIST",
    decides="right answers, averaged over the numbers of training images, capsules less plain, in percentage points",
    enough=1.0,
    limits="All networks learn for equally many steps, with the same distortions of their few images.",
)


def jobs(scale: Scale) -> list[Job]:
    return [job for count in scale.per_class for job in scale.few(KINDS, per_class=count)]


def measure(bench: Bench) -> Evidence:
    labels = bench.images.test.labels.numpy()
    counts = bench.scale.per_class
    found: dict[int, dict[str, Outcomes]] = {}
    for count in counts:
        of_count = bench.scale.few(KINDS, per_class=count)
        found[count] = {kind: right(bench, of_kind(of_count, kind), "test", labels) for kind in KINDS}
    means = {kind: np.mean([found[count][kind] for count in counts], axis=0) for kind in KINDS}
    lines = {kind: (counts, [100 - mean(found[count][kind]) for count in counts]) for kind in KINDS}
    title = "Errors by the number of training images of each digit"
    fewest = found[counts[0]]
    return Evidence(
        comparisons=(
            Comparison("all numbers of images", "K3", "C0", means["K3"], means["C0"], "% right"),
            Comparison("all numbers of images", "K3", "C0r", means["K3"], means["C0r"], "% right"),
            *(
                Comparison(f"{count} images a class", "K3", "C0", one["K3"], one["C0"], "% right")
                for count, one in found.items()
            ),
        ),
        figures={f"test errors with {count} images a class, %, by seed": errors(found[count]) for count in counts},
        pictures={title: curves(title, "training images of each digit", "errors, %", lines, logarithmic=True)},
        said=f"After {counts[0]} examples of each digit, of 100 digits the capsule network misreads"
        f" {100 - mean(fewest['K3']):.1f} and the plain network {100 - mean(fewest['C0']):.1f}.",
    )


ROW = Row(CLAIM, jobs, measure)
