"""Outcomes of stored answers, as comparisons take them. Axes: S seeds, N images, K objects an image."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.claims.bench import Bench
from training.claims.evidence import Outcomes
from training.claims.jobs import Job


def of_kind(jobs: Iterable[Job], kind: str) -> list[Job]:
    """Return the jobs of one kind of network, in the order of their seeds."""
    return sorted((job for job in jobs if job.kind == kind), key=lambda job: job.seed)


def right(bench: Bench, jobs: Sequence[Job], name: str, labels: NDArray[Any]) -> Outcomes:
    """Return 100 where a network's one answer to an image of this evaluation set is its label, else 0: (S, N).

    labels: (N,).
    """
    return np.stack([100.0 * (bench.scored(job, name)["answers"][:, 0] == labels) for job in jobs])


def errors(found: Mapping[str, Outcomes]) -> dict[str, list[float]]:
    """Return the percentages of errors by seed, from outcomes that are 100 where an answer is right."""
    return {name: [round(100 - float(one.mean()), 4) for one in seeds] for name, seeds in found.items()}


def mean(outcomes: Outcomes) -> float:
    """Return the mean over seeds and images."""
    return float(outcomes.mean())
