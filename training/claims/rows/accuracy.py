"""Row 1: accuracy on MNIST, with and without routing, and with and without reconstruction."""

import numpy as np

from training.claims.bench import Bench
from training.claims.drawing import bars
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.jobs import Job, Scale
from training.claims.nets import KINDS
from training.claims.row import Claim, Row

CLAIM = Claim(
    number=1,
    title="Accuracy",
    sentence="A capsule network reads handwritten digits more accurately than a plain network.",
    paper="0.25 % errors on MNIST, against 0.39 % of a plain network with 35.4 million parameters (Sabour et al. 2017)",
    counter="Byerly et al. 2021: without any routing 0.17 %, the best of many trials",
    decides="share of right answers, capsules with routing less plain, in percentage points",
    enough=0.07,
    limits="Our networks have 0.2 million parameters; the paper's 8.2 and 35.4 million.",
)


def jobs(scale: Scale) -> list[Job]:
    return scale.base(KINDS)


def right(bench: Bench, kind: str) -> Outcomes:
    """Return 100 for a right answer to a test image and 0 for a wrong one, (S, N), of the networks of a kind."""
    labels = bench.images.test.labels.numpy()
    answers = [bench.scored(bench.base(kind, seed), "test")["answers"][:, 0] for seed in bench.seeds]
    return np.stack([100.0 * (one == labels) for one in answers])


def measure(bench: Bench) -> Evidence:
    found = {kind: right(bench, kind) for kind in KINDS}

    def compare(name: str, first: str, second: str) -> Comparison:
        return Comparison(name, first, second, found[first], found[second], "% right")

    errors = {kind: [round(100 - float(one.mean()), 4) for one in found[kind]] for kind in KINDS}
    mean = {kind: float(np.mean(seen)) for kind, seen in errors.items()}
    return Evidence(
        comparisons=(
            compare("capsules against plain", "K3", "C0"),
            compare("capsules against plain with our decoder", "K3", "C0r"),
            compare("routing three times against once", "K3", "K1"),
            compare("with reconstruction against without", "K3", "K3n"),
            compare("routing without reconstruction", "K3n", "K1n"),
        ),
        figures={"test errors in % by seed": errors},
        pictures={"Errors on MNIST's test digits": bars("Errors on MNIST's test digits", "errors, %", errors)},
        said=f"Of 100 digits, the capsule network misreads {mean['K3']:.2f} and the plain one {mean['C0']:.2f}.",
    )


ROW = Row(CLAIM, jobs, measure)
