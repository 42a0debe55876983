"""The evidence for a claim: outcomes by seed and image, an interval from a paired bootstrap, and the verdict.

Axes: S seeds, N images, R resamples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Outcomes = NDArray[np.float64]
CONFIDENCE = 0.95
_PART = 100  # resamples at once


class Verdict(Enum):
    """The result of a row, computed from its deciding comparison."""

    CONFIRMED = "CONFIRMED"
    WEAKER = "WEAKER"
    NOT_CONFIRMED = "NOT CONFIRMED"


@dataclass(frozen=True)
class Comparison:
    """Outcomes of two sides on the same images with the same seeds; a larger outcome speaks for the claim.

    first, second: the names of the sides. a, b: their outcomes, (S, N), such as 1 for a right answer and 0 for a wrong
    one. Their means over images and seeds are the figures of the two sides, in ``unit``.
    """

    name: str
    first: str
    second: str
    a: Outcomes
    b: Outcomes
    unit: str = ""

    def __post_init__(self) -> None:
        if self.a.shape != self.b.shape or self.a.ndim != 2 or not self.a.size:
            raise ValueError(f"{self.name}: outcomes of shapes {self.a.shape} and {self.b.shape}; expected (S, N) both")
        if not (np.isfinite(self.a).all() and np.isfinite(self.b).all()):
            raise ValueError(f"{self.name}: an outcome is not finite")

    @classmethod
    def between(
        cls, name: str, first: str, second: str, outcomes: Mapping[str, Outcomes], unit: str = ""
    ) -> "Comparison":
        """Return the comparison of two sides from the outcomes (S, N) of each side by name."""
        return cls(name, first, second, outcomes[first], outcomes[second], unit)

    @classmethod
    def to_value(cls, name: str, first: str, a: Outcomes, value: float, unit: str = "") -> "Comparison":
        """Return the comparison of outcomes (S, N) with a fixed value, such as the one that a claim names."""
        return cls(name, first, f"{value:g}", a, np.full(a.shape, float(value)), unit)


@dataclass(frozen=True)
class Interval:
    """The mean difference of a comparison, and its bounds at CONFIDENCE."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Evidence:
    """The measurements of a row.

    comparisons: the first one decides the verdict. figures: other measured values by name: numbers, texts, and lists
    and dictionaries of them. pictures: PNG files by title; the first is shown on the opening page. said: the figures of
    this run in one sentence for a lay reader.
    """

    comparisons: tuple[Comparison, ...]
    figures: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    said: str = ""


def bootstrap(comparison: Comparison, resamples: int, seed: int = 0) -> Interval:
    """Return the interval of the mean of ``a - b`` from a paired bootstrap on two levels, seeds and images.

    Each resample draws S seeds and, for all seeds alike, N images with replacement; both sides keep their pairs. The
    bounds are quantiles of the resamples' means (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).
    """
    difference = comparison.a - comparison.b  # (S, N)
    seeds, images = difference.shape
    source = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _PART):
        count = min(_PART, resamples - start)
        drawn = np.stack([np.bincount(source.integers(images, size=images), minlength=images) for _ in range(count)])
        by_seed = drawn @ difference.T / images  # (R, S)
        chosen = source.integers(seeds, size=(count, seeds))
        means.append(np.take_along_axis(by_seed, chosen, 1).mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(difference.mean()), float(low), float(high))


def judge(interval: Interval, enough: float) -> Verdict:
    """Return the verdict of a deciding comparison's interval.

    CONFIRMED: the whole interval is above 0, and the mean difference is ``enough`` or more. WEAKER: it is above 0, but
    less than that. NOT_CONFIRMED: it may be 0, or the opposite holds.
    """
    if interval.low <= 0:
        return Verdict.NOT_CONFIRMED
    return Verdict.CONFIRMED if interval.mean >= enough else Verdict.WEAKER
