"""Row 16: a network of one class, trained against negatives."""

import numpy as np

from training.claims.bench import Bench
from training.claims.drawing import bars
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.jobs import ONE_CLASS, Job, Scale
from training.claims.outcomes import mean, of_kind
from training.claims.row import Claim, Row
from training.claims.streams import ONE_CLASS_DIGIT
from training.evaluate import PRESENT_LENGTH

KINDS = ("K3", "C0", "C0r")
SETS = {"test": "digits", "clothes": "clothes", "noise": "noise"}
CLAIM = Claim(
    number=16,
    title="One class alone",
    sentence="A single capsule tells better than a plain network whether its object is there at all.",
    paper="both ways to find images of other kinds by capsules beat the usual methods in many cases (Li et al. 2019,"
    " arXiv 1907.06312); no figure in the first paper",
    counter="Peer, Stabinger and Rodríguez-Sánchez 2019 (arXiv 1905.08744): a capsule's length cannot tell a pose"
    " from its negative",
    decides="right answers to digits, clothes and noise, a third each, capsules less plain, in percentage points",
    enough=1.0,
    limits=f"One digit, {ONE_CLASS_DIGIT}, against the nine others; no clothes and no noise in the training.",
)


def jobs(scale: Scale) -> list[Job]:
    return scale.special(ONE_CLASS, KINDS)


def measure(bench: Bench) -> Evidence:
    present = bench.images.test.labels.numpy() == ONE_CLASS_DIGIT
    all_jobs = jobs(bench.scale)
    found: dict[str, dict[str, Outcomes]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for name in SETS:
            scores = np.stack([bench.scored(job, name)["scores"] for job in of_kind(all_jobs, kind)])
            true = present if name == "test" else np.zeros(scores.shape[1], bool)
            found[kind][name] = 100.0 * ((scores > PRESENT_LENGTH) == true)
    third = {kind: np.mean(list(one.values()), axis=0) for kind, one in found.items()}
    wrong = {kind: [100 - float(seed.mean()) for seed in one] for kind, one in third.items()}
    title = "Wrong answers of a network of one class"

    def false(kind: str) -> float:
        return 100 - (mean(found[kind]["clothes"]) + mean(found[kind]["noise"])) / 2

    return Evidence(
        comparisons=(
            Comparison("digits, clothes and noise", "K3", "C0", third["K3"], third["C0"], "% right"),
            Comparison("digits, clothes and noise", "K3", "C0r", third["K3"], third["C0r"], "% right"),
            *(
                Comparison(words, "K3", "C0", found["K3"][name], found["C0"][name], "% right")
                for name, words in SETS.items()
            ),
        ),
        figures={
            "right, %": {
                kind: {words: round(mean(one[name]), 3) for name, words in SETS.items()} for kind, one in found.items()
            }
        },
        pictures={title: bars(title, "wrong, % (digits, clothes, noise)", wrong)},
        said=f"Of 100 images without any digit, the capsule takes {false('K3'):.1f} for a {ONE_CLASS_DIGIT},"
        f" and the plain network {false('C0'):.1f}.",
    )


ROW = Row(CLAIM, jobs, measure)
