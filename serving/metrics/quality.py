"""Figures of a classifying model's answers, for alarms when the images or the model change: which classes, how sure."""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Upper bounds of the buckets of a length or of a difference of lengths.
LENGTH_BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
#: A capsule that is longer is active: its object is there.
ACTIVE_LENGTH = 0.5
_MAX_IMAGES_KEPT = 512


class ArrayDistribution:
    """A histogram that takes in whole arrays; a value on a bound is below it, as Prometheus has it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._edges = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self.sum = 0.0

    @property
    def counts(self) -> list[int]:
        """Number of values in each bucket, the one above all bounds last."""
        counts: list[int] = self._counts.tolist()
        return counts

    def add(self, values: NDArray[np.floating] | NDArray[np.integer]) -> None:
        """Take in values (n,)."""
        self._counts += np.bincount(np.searchsorted(self._edges, values), minlength=len(self._counts))
        self.sum += float(values.sum())


class Quality:
    """Figures of all answers of one version of one model.

    winners: how often each class had the longest capsule. lengths: of the winner's capsule. margins: how much longer
    it was than the runner-up's. active: how many capsules were longer than ACTIVE_LENGTH.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.winners = np.zeros(len(labels), np.int64)
        self.lengths = ArrayDistribution(LENGTH_BOUNDS)
        self.margins = ArrayDistribution(LENGTH_BOUNDS)
        self.active = ArrayDistribution(range(len(labels) + 1))
        # Those of several batches are counted in one step.
        self._new: list[NDArray[np.float32]] = []
        self._new_images = 0
        self._lock = threading.Lock()

    def add(self, probabilities: NDArray[np.float32]) -> None:
        """Keep a batch's probabilities (B, J), all finite; ``up_to_date`` counts them. From any thread."""
        with self._lock:
            self._new.append(probabilities)
            self._new_images += len(probabilities)
            if self._new_images >= _MAX_IMAGES_KEPT:
                self._count_new()

    @property
    def up_to_date(self) -> "Quality":
        """These figures, once they count all that was added; from any thread."""
        with self._lock:
            if self._new:
                self._count_new()
        return self

    def wins(self, index: int) -> int:
        """Return how often the class of this index had the longest capsule, in all answers that were added."""
        return int(self.up_to_date.winners[index])

    def _count_new(self) -> None:
        """Count what was kept; the caller holds the lock."""
        probabilities = np.concatenate(self._new)
        self._new, self._new_images = [], 0
        self.winners += np.bincount(probabilities.argmax(1), minlength=len(self.labels))
        if probabilities.shape[1] > 1:
            second, first = np.partition(probabilities, -2, axis=1)[:, -2:].T
        else:
            first, second = probabilities[:, 0], np.zeros(len(probabilities), np.float32)
        self.lengths.add(first)
        self.margins.add(first - second)
        self.active.add((probabilities > ACTIVE_LENGTH).sum(1))
