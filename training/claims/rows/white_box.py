"""Row 11: attacks by someone who knows the network, and the attack that flatters capsule networks.

Axes: S seeds, N images, D bounds of the change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.claims.attacks import by_own_loss, by_rival, fgsm, fooled_by, open_scores, pgd, still
from training.claims.bench import Bench
from training.claims.drawing import COLOURS, NAMES, Answered, answers, axes, png
from training.claims.effort import BOUNDS, EFFORTS, KINDS, Effort, by_network, sample
from training.claims.evidence import Comparison, Evidence, Outcomes, Verdict, bootstrap, judge
from training.claims.jobs import Job, Scale
from training.claims.nets import CapsuleNet, PlainNet
from training.claims.row import Claim, Row
from training.claims.store import Arrays
from training.claims.toolboxes import apgd, check_toolboxes, ddn, square

CLAIM = Claim(
    number=11,
    title="White-box attacks",
    sentence="A capsule network resists small changes by someone who knows it better than a plain network does.",
    paper="changes of 50/255: right after FGSM 72.1 % against 52.9 % of a plain network (jsikyoon's port); "
    "more robust to white-box attacks than other networks (Hinton et al. 2018, Frosst et al. 2018)",
    counter="Michels et al. 2019 (arXiv 1906.03612): fooled as easily as plain networks; the same port after BIM: "
    "42.3 % against 62.3 %; Gu et al. 2021 (arXiv 2102.10055): attacks on the votes",
    decides="share of digits that are still right after the worst of all attacks, capsules less plain, "
    "in percentage points, mean of changes up to 0.1, 0.2 and 0.3",
    enough=10.0,
    limits="Neither network was trained against attacks. APGD and Square are given the images that the attacks before "
    "them left; DDN counts where none of its changes is above the bound.",
)
#: The attack that most reports of capsule networks use: one step along the gradient of the loss of the training.
SIMPLE = "FGSM on the loss"
#: The attacks by name, in their order. Each is given all images.
ATTACKS = (SIMPLE, "FGSM on the margin", "PGD on the loss", "PGD on the margin")
#: The toolboxes' attacks. APGD and Square are given the images that all before them left.
FURTHER = ("DDN", "APGD", "Square")
EXAMPLES = 8  # images in the picture
_ROUNDING = 1e-6  # of single precision, above a bound


@dataclass(frozen=True)
class Case:
    """The attack on one network: images (N, 1, 28, 28) from 0 to 1, and labels (N,)."""

    net: CapsuleNet | PlainNet
    images: Tensor
    labels: Tensor
    effort: Effort
    seed: int


def jobs(scale: Scale) -> list[Job]:
    return scale.base(KINDS)


def attack(case: Case, progress: Callable[[str], None]) -> Arrays:
    """Attack a network, and return what fell.

    By attack, (D, N) bool: whether an image is wrong; of APGD and Square, whether they turned it. ``wrong``: (N,) bool,
    without an attack. ``still``: (N,) bool, whether the gradient of the loss is exactly 0. ``distance``: (N,), the norm
    of DDN's change, infinite if it found none. ``examples``, ``answers``: the first images (28, 28) of PGD on the
    margin with the smallest bound, and what they are taken for.
    """
    net, images, labels, effort = case.net, case.images, case.labels, case.effort
    loss, margin = by_own_loss(net), by_rival(net)
    fell: dict[str, list[Tensor]] = {name: [] for name in (*ATTACKS, *FURTHER)}
    progress("DDN")
    moved = ddn(open_scores(net), images, labels, case.seed, effort.ddn_steps)
    changes = (moved - images).flatten(1)
    with torch.no_grad():
        turned = fooled_by(open_scores(net)(moved), labels)
        wrong = fooled_by(open_scores(net)(images), labels)
    found: Arrays = {
        "wrong": wrong.numpy(),
        "still": still(loss, images, labels).numpy(),
        "distance": torch.where(turned, torch.linalg.vector_norm(changes, dim=1), torch.inf).numpy(),
    }
    for bound in BOUNDS:
        progress(f"changes of {bound}")
        done = pgd(margin, images, labels, bound, case.seed, effort.steps, effort.restarts)
        if bound == BOUNDS[0]:
            found["examples"] = done.images[:EXAMPLES, 0].numpy()
            with torch.no_grad():
                found["answers"] = open_scores(net)(done.images[:EXAMPLES]).argmax(1).numpy()
        seen = {
            SIMPLE: fgsm(loss, images, labels, bound).reached,
            "FGSM on the margin": fgsm(margin, images, labels, bound).reached,
            "PGD on the loss": pgd(loss, images, labels, bound, case.seed, effort.steps, effort.restarts).reached,
            "PGD on the margin": done.reached,
            "DDN": turned & (changes.abs().amax(1) <= bound + _ROUNDING),
        }
        seen |= _further(case, bound, torch.stack(list(seen.values())).any(0))
        for name, values in seen.items():
            fell[name].append(values)
    return found | {name: torch.stack(values).numpy() for name, values in fell.items()}


def _further(case: Case, bound: float, fallen: Tensor) -> dict[str, Tensor]:
    """Return what APGD turned of the images that have not fallen, and Square of those that are left then: (N,) bool."""
    seen = {}
    scores = open_scores(case.net)
    for name in ("APGD", "Square"):
        turned, left = torch.zeros_like(fallen), (~fallen).nonzero().flatten()
        if len(left):
            images, labels = case.images[left], case.labels[left]
            if name == "APGD":
                changed = apgd(scores, images, labels, bound, case.seed, case.effort.apgd_steps, restarts=1)
            else:
                changed = square(scores, images, labels, bound, case.seed, case.effort.queries)
            with torch.no_grad():
                turned[left] = fooled_by(scores(changed), labels)
        seen[name], fallen = turned, fallen | turned
    return seen


def standing(found: Sequence[Arrays], attacks: Sequence[str] = (*ATTACKS, *FURTHER)) -> NDArray[np.float64]:
    """Return 100 for an image that is right after each of these attacks within a bound and 0 for others, (S, D, N).

    An image that falls within a bound falls within every larger one: the smaller change is allowed there too.
    """
    fell = np.stack([np.any([one[name] for name in attacks], axis=0) for one in found])
    return 100.0 * ~np.logical_or.accumulate(fell, axis=1)


def right(found: Sequence[Arrays], bound: float) -> Outcomes:
    """Return 100 for an image that is right after the worst of all attacks within a bound, and 0 for others, (S, N)."""
    return standing(found)[:, BOUNDS.index(bound)]


def simple_verdict(found: Mapping[str, Sequence[Arrays]], resamples: int) -> tuple[Comparison, Verdict]:
    """Return the comparison by FGSM on the loss alone, and the verdict that it would have given."""
    a, b = (standing(found[kind], [SIMPLE]).mean(1) for kind in ("K3", "C0"))
    comparison = Comparison("after the simple attack alone (FGSM on the loss)", "K3", "C0", a, b, "% right")
    return comparison, judge(bootstrap(comparison, resamples), CLAIM.enough)


def measure(bench: Bench) -> Evidence:
    check_toolboxes()
    effort = EFFORTS[bench.scale.name]
    images, labels = sample(bench, effort.white_box)

    def attacked(kind: str, seed: int) -> Arrays:
        case = Case(bench.net(bench.base(kind, seed)), images, labels, effort, seed)
        return attack(case, lambda words: bench.progress(f"{kind} of seed {seed}: {words}"))

    found = by_network(bench, "white-box", attacked)
    return evidence(found, labels, bench.scale.resamples)


def evidence(found: Mapping[str, Sequence[Arrays]], labels: Tensor, resamples: int) -> Evidence:
    """Return the row's evidence from what ``attack`` found, by kind of network and seed."""
    overall = {kind: standing(found[kind]).mean(1) for kind in found}

    def compare(first: str, second: str) -> Comparison:
        return Comparison("after the worst of all attacks", first, second, overall[first], overall[second], "% right")

    deciding = compare("K3", "C0")
    simple, claimed = simple_verdict(found, resamples)
    verdict = judge(bootstrap(deciding, resamples), CLAIM.enough)
    by_bound = []
    for bound in BOUNDS:
        name = f"… no pixel changed by more than {bound}"
        by_bound.append(Comparison(name, "K3", "C0", right(found["K3"], bound), right(found["C0"], bound), "% right"))
    figures = {
        "digits": len(labels),
        "right after the worst attack in %, by change": _by_bound(found, (*ATTACKS, *FURTHER)),
        **{f"right after {name} in %, by change": _by_bound(found, [name]) for name in (*ATTACKS, "DDN")},
        "turned by APGD or Square alone, in %, by change": {
            kind: {
                f"{bound}": _mean([one["APGD"][place] | one["Square"][place] for one in found[kind]])
                for place, bound in enumerate(BOUNDS)
            }
            for kind in found
        },
        "images whose gradient of the loss is exactly 0, in %": {
            kind: _mean([one["still"] for one in found[kind]]) for kind in found
        },
        "median Euclidean norm of the smallest change (DDN)": {
            kind: round(float(np.median([one["distance"] for one in found[kind]])), 3) for kind in found
        },
        "verdict of FGSM on the loss alone": claimed.value,
    }
    return Evidence(
        comparisons=(deciding, compare("K3", "K1"), compare("K3", "C0r"), *by_bound, simple),
        figures=figures,
        pictures={
            "Digits still right after the worst attack": _curves(found),
            "Attacked digits": _attacked(found, labels),
        },
        said=_said(deciding, simple, verdict, claimed),
    )


def _said(deciding: Comparison, simple: Comparison, verdict: Verdict, claimed: Verdict) -> str:
    """Return the figures in words, and what the simple attack alone would have made of them."""
    text = (
        f"After the worst attack the capsule network still reads {deciding.a.mean():.0f} of 100 digits and the plain "
        f"network {deciding.b.mean():.0f}. The simple attack that is often reported, one step along the gradient of "
        f"the training's loss (FGSM), leaves {simple.a.mean():.0f} and {simple.b.mean():.0f}"
    )
    if claimed == verdict:
        return f"{text}; by it alone the verdict would have been the same."
    return f"{text}; by it alone this report would have lied: it would have said {claimed.value}."


def _mean(shares: Sequence[NDArray[np.bool_]]) -> float:
    return round(100 * float(np.mean(shares)), 2)


def _by_bound(found: Mapping[str, Sequence[Arrays]], attacks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the mean share of images that stand, in %, by kind and bound."""
    means = {kind: standing(found[kind], attacks).mean((0, 2)) for kind in found}
    return {
        kind: {f"{bound}": round(float(value), 2) for bound, value in zip(BOUNDS, values, strict=True)}
        for kind, values in means.items()
    }


def _curves(found: Mapping[str, Sequence[Arrays]]) -> bytes:
    """Draw the share of right answers by bound, after all attacks as a line, after the simple one dashed."""
    figure, panel = axes("Digits still right after an attack", "largest change of a pixel (0 to 1)", "right, %")

    def draw(kind: str, attacks: Sequence[str], line: str, words: str) -> None:
        clean = 100 - _mean([one["wrong"] for one in found[kind]])
        up = [clean, *standing(found[kind], attacks).mean((0, 2))]
        panel.plot((0, *BOUNDS), up, f"o{line}", color=COLOURS[kind], markersize=3, label=f"{NAMES[kind]}{words}")

    for kind in found:
        draw(kind, (*ATTACKS, *FURTHER), "-", "")
    for kind in ("K3", "C0"):
        draw(kind, [SIMPLE], "--", ", simple attack alone")
    panel.set_xticks((0, *BOUNDS))
    panel.set_ylim(-3, 103)
    panel.legend(fontsize=7, frameon=False)
    return png(figure)


def _attacked(found: Mapping[str, Sequence[Arrays]], labels: Tensor) -> bytes:
    """Draw the first digits as PGD on the margin changed them with the smallest bound."""
    rows = {
        kind: [
            Answered(image, label, int(answer))
            for image, label, answer in zip(one["examples"], labels.tolist(), one["answers"], strict=False)
        ]
        for kind, one in ((kind, found[kind][0]) for kind in ("K3", "C0"))
    }
    return answers(f"Digits changed by at most {BOUNDS[0]}", rows)


ROW = Row(CLAIM, jobs, measure)
