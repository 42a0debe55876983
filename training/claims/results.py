"""The measured rows of a run, in its folder: ``rows/NN/`` has outcomes.npz, evidence.json and pictures."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.claims.evidence import Comparison, Evidence, Interval, Verdict, bootstrap, judge
from training.claims.row import Claim
from training.claims.store import reading

_EVIDENCE = "evidence.json"
_OUTCOMES = "outcomes.npz"


@dataclass(frozen=True)
class Result:
    """A measured row. origin: ``seconds`` of the measurement, its ``device`` and ``commit``."""

    claim: Claim
    evidence: Evidence
    origin: dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """A result with the intervals of its comparisons and the verdict of the first one."""

    result: Result
    intervals: tuple[Interval, ...]
    verdict: Verdict

    @property
    def note(self) -> str:
        """Return what the verdict leaves open: nothing, or which of its cases holds."""
        if self.verdict is not Verdict.NOT_CONFIRMED:
            return ""
        return "the opposite was measured" if self.intervals[0].high < 0 else "no difference could be shown"


def judged(result: Result, resamples: int) -> Judged:
    """Compute a result's intervals and verdict from its outcomes."""
    intervals = tuple(bootstrap(one, resamples) for one in result.evidence.comparisons)
    return Judged(result, intervals, judge(intervals[0], result.claim.enough))


def write_result(result: Result, folder: Path) -> None:
    """Write a measured row into the folder of a run, completely or not at all."""
    place = _place(folder, result.claim)
    place.mkdir(parents=True, exist_ok=True)
    evidence = result.evidence
    for number, picture in enumerate(evidence.pictures.values()):
        (place / f"{number}.png").write_bytes(picture)
    content = io.BytesIO()
    outcomes = {
        f"{number}.{side}": getattr(one, side) for number, one in enumerate(evidence.comparisons) for side in "ab"
    }
    np.savez_compressed(content, allow_pickle=False, **outcomes)
    (place / _OUTCOMES).write_bytes(content.getvalue())
    told = {
        "said": evidence.said,
        "comparisons": [[one.name, one.first, one.second, one.unit] for one in evidence.comparisons],
        "figures": evidence.figures,
        "pictures": list(evidence.pictures),
        "origin": result.origin,
    }
    partial = place / f"{_EVIDENCE}.partial"
    partial.write_text(json.dumps(told, indent=1))
    partial.replace(place / _EVIDENCE)


def read_result(claim: Claim, folder: Path) -> Result | None:
    """Return a measured row, or None if it was not measured in this folder.

    Raises DamagedRunError if a file of it cannot be read.
    """
    place = _place(folder, claim)
    if not (place / _EVIDENCE).exists():
        return None
    with reading(place / _EVIDENCE):
        told = json.loads((place / _EVIDENCE).read_text())
        names, origin, said, figures = (told[name] for name in ("comparisons", "origin", "said", "figures"))
        pictures = {title: (place / f"{number}.png").read_bytes() for number, title in enumerate(told["pictures"])}
    with reading(place / _OUTCOMES), np.load(io.BytesIO((place / _OUTCOMES).read_bytes())) as outcomes:
        comparisons = tuple(
            Comparison(name, first, second, outcomes[f"{number}.a"], outcomes[f"{number}.b"], unit)
            for number, (name, first, second, unit) in enumerate(names)
        )
    return Result(claim, Evidence(comparisons, figures, pictures, said), origin)


def _place(folder: Path, claim: Claim) -> Path:
    return folder / "rows" / f"{claim.number:02}"
