"""The rows of a run, in its folder: ``rows/NN/`` has outcomes.npz, evidence.json and pictures, or omission.json."""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.claims.evidence import Comparison, Evidence, Interval, Outcomes, Verdict, bootstrap, judge
from training.claims.row import Claim
from training.claims.store import reading, write_file

_EVIDENCE = "evidence.json"
_OUTCOMES = "outcomes.npz"
_OMISSION = "omission.json"


@dataclass(frozen=True)
class Result:
    """A measured row.

    origin: ``seconds`` of the measurement, its ``device`` and ``commit``, and ``on_gpu``, the names of those networks
    in it that a GPU alone trains.
    """

    claim: Claim
    evidence: Evidence
    origin: dict[str, Any]


@dataclass(frozen=True)
class Omission:
    """The reason why a row has no result. failed: its measurement failed; else something that it needs is missing."""

    reason: str
    failed: bool = False


@dataclass(frozen=True)
class Compared:
    """A comparison as it is reported: the means over its images, and its interval.

    a, b: the means of the two sides by seed, (S,). images: their number.
    """

    name: str
    first: str
    second: str
    unit: str
    a: tuple[float, ...]
    b: tuple[float, ...]
    images: int
    interval: Interval

    @property
    def sides(self) -> tuple[tuple[str, float], tuple[str, float]]:
        """Return the names of the two sides, each with its mean."""
        return (self.first, float(np.mean(self.a))), (self.second, float(np.mean(self.b)))

    @property
    def by_seed(self) -> list[float]:
        """Return the difference of each seed."""
        return [a - b for a, b in zip(self.a, self.b, strict=True)]


@dataclass(frozen=True)
class Finding:
    """A measured row as it is reported; see Evidence and Result. The first comparison decides the verdict.

    outcomes: of its two sides, (S, N) each; None where a written report was read, which does not hold them.
    """

    claim: Claim
    said: str
    compared: tuple[Compared, ...]
    figures: dict[str, Any]
    pictures: dict[str, bytes]
    origin: dict[str, Any]
    outcomes: tuple[Outcomes, Outcomes] | None = None

    @property
    def verdict(self) -> Verdict:
        """Return the verdict."""
        return judge(self.compared[0].interval, self.claim.enough)

    @property
    def note(self) -> str:
        """Return what the verdict leaves open: nothing, or which of its cases holds."""
        if self.verdict is not Verdict.NOT_CONFIRMED:
            return ""
        return "the opposite was measured" if self.compared[0].interval.high < 0 else "no difference could be shown"


def found(result: Result, resamples: int) -> Finding:
    """Compute the means and the intervals of a result's comparisons from their outcomes."""
    evidence = result.evidence
    compared = tuple(
        Compared(
            one.name, one.first, one.second, one.unit,
            tuple(one.a.mean(1).tolist()), tuple(one.b.mean(1).tolist()), one.a.shape[1], bootstrap(one, resamples),
        )
        for one in evidence.comparisons
    )  # fmt: skip
    deciding = evidence.comparisons[0]
    told = (evidence.said, compared, evidence.figures, evidence.pictures, result.origin)
    return Finding(result.claim, *told, outcomes=(deciding.a, deciding.b))


def write_result(result: Result, folder: Path) -> None:
    """Write a measured row into the folder of a run, completely or not at all, instead of an earlier one."""
    place = _place(folder, result.claim)
    place.mkdir(parents=True, exist_ok=True)
    (place / _EVIDENCE).unlink(missing_ok=True)
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
    write_file(place / _EVIDENCE, json.dumps(told, indent=1).encode())
    (place / _OMISSION).unlink(missing_ok=True)


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


def write_omission(omission: Omission, claim: Claim, folder: Path) -> None:
    """Write why a row has no result into the folder of a run."""
    place = _place(folder, claim)
    place.mkdir(parents=True, exist_ok=True)
    write_file(place / _OMISSION, json.dumps(asdict(omission), indent=1).encode())


def read_omission(claim: Claim, folder: Path) -> Omission:
    """Return why a row has no result; without a reason if it was not asked for.

    Raises DamagedRunError if the file cannot be read.
    """
    file = _place(folder, claim) / _OMISSION
    if not file.exists():
        return Omission("")
    with reading(file):
        told = json.loads(file.read_text())
        return Omission(str(told["reason"]), bool(told["failed"]))


def _place(folder: Path, claim: Claim) -> Path:
    return folder / "rows" / f"{claim.number:02}"
