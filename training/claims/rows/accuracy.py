"""Row 1: accuracy on MNIST, with and without routing, and with and without reconstruction."""

from training.claims.bench import Bench
from training.claims.drawing import bars
from training.claims.evidence import Comparison, Evidence
from training.claims.jobs import Job, Scale
from training.claims.nets import KINDS
from training.claims.outcomes import errors, mean, right
from training.claims.row import Claim, Row

CLAIM = Claim(
    number=1,
    title="Accuracy",
    sentence="A capsule network reads handwritten digits more accurately than a plain network.",
    paper="0.25 % errors on MNIST, against 0.39 % of a plain network with 35.4 million parameters (Sabour et al. 2017)",
    counter='Byerly et al. 2021, "No routing needed between capsules": 0.17 %, the best of many trials',
    decides="right answers to the test digits, capsules with routing less plain, in percentage points",
    enough=0.07,
    limits="Our networks have 0.2 million parameters; the paper's have 8.2 and 35.4 million.",
)


def jobs(scale: Scale) -> list[Job]:
    return scale.base(KINDS)


def measure(bench: Bench) -> Evidence:
    labels = bench.images.test.labels.numpy()
    found = {kind: right(bench, bench.scale.base([kind]), "test", labels) for kind in KINDS}

    def compare(name: str, first: str, second: str) -> Comparison:
        return Comparison(name, first, second, found[first], found[second], "% right")

    title = "Errors on MNIST's test digits"
    return Evidence(
        comparisons=(
            compare("capsules against plain", "K3", "C0"),
            compare("capsules against plain with our decoder", "K3", "C0r"),
            compare("routing three times against once", "K3", "K1"),
            compare("with reconstruction against without", "K3", "K3n"),
            compare("routing without reconstruction", "K3n", "K1n"),
        ),
        figures={"test errors in %, by seed": errors(found)},
        pictures={title: bars(title, "errors, %", errors(found))},
        said=f"Of 100 digits, the capsule network misreads {100 - mean(found['K3']):.2f}"
        f" and the plain network {100 - mean(found['C0']):.2f}.",
    )


ROW = Row(CLAIM, jobs, measure)
