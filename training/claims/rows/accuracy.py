"""Row 1: accuracy on MNIST, with and without routing, with and without reconstruction, and beside the paper's CNN."""

import torch

from training.claims.bench import Bench
from training.claims.drawing import bars
from training.claims.evidence import Comparison, Evidence
from training.claims.jobs import PAPER, Job, Scale
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
PAPER_ERRORS = "0.39 % errors (Sabour et al. 2017)"


def jobs(scale: Scale) -> list[Job]:
    return scale.base(KINDS)


def on_gpu(scale: Scale) -> list[Job]:
    return scale.paper()


def measure(bench: Bench) -> Evidence:
    labels = bench.images.test.labels.numpy()
    found = {kind: right(bench, bench.scale.base([kind]), "test", labels) for kind in KINDS}
    large = bench.scale.paper()
    trained = all(map(bench.store.finished, large))
    if trained:
        found[PAPER] = right(bench, large, "test", labels)
        count = bench.store.figures(large[0])["parameters"]
        told = f"trained with {count:,} parameters; published: {PAPER_ERRORS}"
    else:
        told = f"{PAPER_ERRORS}: quoted, not trained: {'no time was left' if torch.cuda.is_available() else 'no GPU'}"

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
            *([compare("capsules against the paper's plain network", "K3", PAPER)] if trained else []),
        ),
        figures={"test errors in %, by seed": errors(found), "the paper's plain network": told},
        pictures={title: bars(title, "errors, %", errors(found))},
        said=f"Of 100 digits, the capsule network misreads {100 - mean(found['K3']):.2f}"
        f" and the plain network {100 - mean(found['C0']):.2f}.",
    )


ROW = Row(CLAIM, jobs, measure, on_gpu)
