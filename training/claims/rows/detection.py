"""Row 13: detection of attacked images, by an attacker who does not know of it and by one who does.

Axes: S seeds, N images, D bounds of the change.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from training.claims.attacks import by_rival, fooled_by, open_scores, pgd, unending
from training.claims.bench import Bench
from training.claims.detectors import DETECTORS, Detector, detectors, evading
from training.claims.drawing import NAMES, axes, png
from training.claims.effort import BOUNDS, EFFORTS, KINDS, Effort, by_network, sample
from training.claims.evidence import Comparison, Evidence, Outcomes
from training.claims.images import Labelled
from training.claims.jobs import Job, Scale
from training.claims.nets import CapsuleNet, PlainNet
from training.claims.row import Claim, Row
from training.claims.store import Arrays
from training.model import to_pixels

CLAIM = Claim(
    number=13,
    title="Detection of attacks",
    sentence="A capsule network notices an attack: it cannot draw the changed digit again from its answer.",
    paper="about 70 % of the attacked images are found at 5 % false alarms (KellerJordan's port); capsule networks "
    "always do better than plain ones, also against an attacker who knows (Qin et al. 2020, arXiv 1907.02957)",
    counter="Gu et al. 2021 (arXiv 2102.10055): an attack on the votes that knows of the detection passes it",
    decides="share of digits that an attacker who knows of the detection cannot make wrong unnoticed, capsules less a "
    "plain network with the same decoder, in percentage points, mean of changes up to 0.1, 0.2 and 0.3",
    enough=10.0,
    limits="Thresholds from held-out digits. Both attackers follow the gradient (PGD); the one who knows also that of "
    "the decoder. The one who does not know starts once and goes on to the end.",
)
UNAWARE, AWARE = "does not know", "knows"
#: The words for the detectors.
BY = {
    "reconstruction": "by reconstruction",
    "margin": "by the lead of the best score",
    "length": "by the best score",
}


def jobs(scale: Scale) -> list[Job]:
    return scale.base(KINDS)


def attack(
    net: CapsuleNet | PlainNet,
    images: torch.Tensor,
    labels: torch.Tensor,
    fitted: Mapping[str, Detector],
    effort: Effort,
    seed: int,
    progress: Callable[[str], None],
) -> Arrays:
    """Attack a network with detectors.

    Returns ``fooled``, (D, N) bool, whether the attacker who does not know of the detection makes an image wrong, and
    by detector, (D, N) bool, whether each attacker makes it wrong unnoticed: ``DETECTOR: does not know`` and
    ``DETECTOR: knows``. The one who knows also has the images of the other.
    """
    fooled: list[torch.Tensor] = []
    silent: dict[str, list[torch.Tensor]] = {f"{name}: {who}": [] for name in fitted for who in (UNAWARE, AWARE)}
    for bound in BOUNDS:
        progress(f"changes of {bound}")
        pursue = unending(by_rival(net))
        changed = pgd(pursue, images, labels, bound, seed, effort.steps, restarts=1).images
        with torch.no_grad():
            wrong = fooled_by(open_scores(net)(changed), labels)
        fooled.append(wrong)
        for name, detector in fitted.items():
            passed = wrong & ~detector.flags(net, changed)
            silent[f"{name}: {UNAWARE}"].append(passed)
            left = (~passed).nonzero().flatten()
            if len(left):
                aim = evading(net, detector)
                tried = pgd(aim, images[left], labels[left], bound, seed, effort.steps, effort.restarts)
                passed = passed.index_put((left,), tried.reached)
            silent[f"{name}: {AWARE}"].append(passed)
    arrays = {name: torch.stack(values).numpy() for name, values in silent.items()}
    return arrays | {"fooled": torch.stack(fooled).numpy()}


def alarms(net: CapsuleNet | PlainNet, fitted: Mapping[str, Detector], test: Labelled) -> Arrays:
    """Return the share of ordinary test images that each detector flags."""
    pixels = to_pixels(test.images)
    return {f"{name}: alarms": np.array(float(one.flags(net, pixels).float().mean())) for name, one in fitted.items()}


def measure(bench: Bench) -> Evidence:
    effort = EFFORTS[bench.scale.name]
    images, labels = sample(bench, effort.detection)
    ordinary = to_pixels(bench.images.held_out.images)

    def attacked(kind: str, seed: int) -> Arrays:
        net = bench.net(bench.base(kind, seed))
        fitted = {name: Detector.fitted(one, net, ordinary) for name, one in detectors(net).items()}
        found = attack(
            net, images, labels, fitted, effort, seed, lambda words: bench.progress(f"{kind} of seed {seed}: {words}")
        )
        return found | alarms(net, fitted, bench.images.test)

    found = by_network(bench, "detection", attacked)
    return evidence(found)


def safe(found: Sequence[Arrays], detector: str, attacker: str) -> Outcomes:
    """Return how often an image cannot be made wrong unnoticed, in % of the bounds: (S, N).

    An image that a change within a bound makes wrong unnoticed is so within every larger bound.
    """
    silent = np.stack([np.logical_or.accumulate(one[f"{detector}: {attacker}"], axis=0) for one in found])
    outcomes: Outcomes = 100.0 * (~silent).mean(1)
    return outcomes


def evidence(found: Mapping[str, Sequence[Arrays]]) -> Evidence:
    """Return the row's evidence from what ``attack`` and ``alarms`` found, by kind of network and seed."""

    def compare(second: str, detector: str, attacker: str) -> Comparison:
        a, b = (safe(found[kind], detector, attacker) for kind in ("K3", second))
        name = f"detection {BY[detector]}, {_attacker(attacker)}"
        return Comparison(name, "K3", second, a, b, "% not made wrong unnoticed")

    deciding = compare("C0r", "reconstruction", AWARE)
    unaware = compare("C0r", "reconstruction", UNAWARE)
    used = {kind: [name for name in DETECTORS if f"{name}: alarms" in found[kind][0]] for kind in found}
    figures = {
        "digits": found["K3"][0]["fooled"].shape[1],
        "wrong and unnoticed in %, by change": {
            kind: {
                f"{BY[name]}, {_attacker(who)}": _by_bound([one[f"{name}: {who}"] for one in found[kind]])
                for name in used[kind]
                for who in (UNAWARE, AWARE)
            }
            for kind in found
        },
        f"wrong ones that are found, in %, {_attacker(UNAWARE)}": {
            kind: {BY[name]: _share_found(found[kind], name) for name in used[kind]} for kind in found
        },
        "false alarms on test digits, in %": {
            kind: {
                BY[name]: round(100 * float(np.mean([one[f"{name}: alarms"] for one in found[kind]])), 2)
                for name in used[kind]
            }
            for kind in found
        },
    }
    return Evidence(
        comparisons=(
            deciding,
            unaware,
            compare("K1", "reconstruction", AWARE),
            compare("C0", "margin", AWARE),
            compare("C0", "length", AWARE),
        ),
        figures=figures,
        pictures={"Attacks that pass unnoticed": _bars(found)},
        said=f"An attacker who does not know of the detection makes {100 - unaware.a.mean():.0f} of 100 digits wrong "
        f"unnoticed, and one who knows {100 - deciding.a.mean():.0f}; in the plain network with a decoder "
        f"{100 - unaware.b.mean():.0f} and {100 - deciding.b.mean():.0f}.",
    )


def _attacker(knows: str) -> str:
    return f"attacker who {knows} of it"


def _by_bound(silent: Sequence[NDArray[np.bool_]]) -> dict[str, float]:
    means = np.mean([np.logical_or.accumulate(one, axis=0) for one in silent], axis=(0, 2))
    return {f"{bound}": round(100 * float(mean), 2) for bound, mean in zip(BOUNDS, means, strict=True)}


def _share_found(found: Sequence[Arrays], name: str) -> dict[str, float | None]:
    """Return the share of the wrong images that are flagged, by bound; None where no image is wrong."""
    shares: dict[str, float | None] = {}
    for place, bound in enumerate(BOUNDS):
        wrong = sum(int(one["fooled"][place].sum()) for one in found)
        passed = sum(int(one[f"{name}: {UNAWARE}"][place].sum()) for one in found)
        shares[f"{bound}"] = round(100 * (1 - passed / wrong), 2) if wrong else None
    return shares


def _bars(found: Mapping[str, Sequence[Arrays]]) -> bytes:
    """Draw, by network with a decoder and attacker, the share of digits made wrong unnoticed, and all made wrong."""
    figure, panel = axes("Digits made wrong unnoticed (reconstruction)", y="of 100 digits")
    kinds = [kind for kind in found if f"reconstruction: {AWARE}" in found[kind][0]]
    wrong = [100 * np.mean([np.logical_or.accumulate(one["fooled"], axis=0) for one in found[kind]]) for kind in kinds]
    unaware, aware = (
        [100 - safe(found[kind], "reconstruction", who).mean() for kind in kinds] for who in (UNAWARE, AWARE)
    )
    looks = (
        (wrong, "made wrong", "#c8c8c8"),
        (unaware, "unnoticed, attacker does not know", "#7fb0e0"),
        (aware, "unnoticed, attacker knows", "#b03030"),
    )
    for shift, (heights, label, colour) in enumerate(looks):
        bars = panel.bar(
            [place + 0.27 * (shift - 1) for place in range(len(kinds))], heights, 0.25, color=colour, label=label
        )
        panel.bar_label(bars, fmt="%.0f", fontsize=8)
    panel.set_xticks(range(len(kinds)), [NAMES[kind] for kind in kinds], fontsize=8)
    panel.set_ylim(0, 135)
    panel.set_yticks(range(0, 101, 20))
    panel.legend(fontsize=7, frameon=False, loc="upper center", ncols=2)
    return png(figure)


ROW = Row(CLAIM, jobs, measure)
