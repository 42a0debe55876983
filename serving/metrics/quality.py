"""Figures of a classifying model's answers, for alerts on changed images or models: classes and capsule lengths."""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: The upper bounds of the buckets of a capsule length or of a difference of lengths.
LENGTH_BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
#: A longer capsule is active: its object is present.
ACTIVE_LENGTH = 0.5
_MAX_IMAGES_KEPT = 512


class ArrayDistribution:
    """A histogram of whole arrays. A value on a bound counts as below it, as in Prometheus."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._edges = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self.sum = 0.0

    @property
    def counts(self) -> list[int]:
        """Return the number of values in each bucket; the last one is above all bounds."""
        counts: list[int] = self._counts.tolist()
        return counts

    def add(self, values: NDArray[np.floating] | NDArray[np.integer]) -> None:
        """Add values (n,)."""
        self._counts += np.bincount(np.searchsorted(self._edges, values), minlength=len(self._counts))
        self.sum += float(values.sum())


class Quality:
    """Figures of all answers of one version of one model.

    winners: by class, how often it had the longest capsule. lengths: the capsule length of the winner. margins: the
    difference to the second longest capsule. active: the number of capsules longer than ACTIVE_LENGTH.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.winners = np.zeros(len(labels), np.int64)
        self.lengths = ArrayDistribution(LENGTH_BOUNDS)
        self.margins = ArrayDistribution(LENGTH_BOUNDS)
        self.active = ArrayDistribution(range(len(labels) + 1))
        # The answers of several batches are counted in one step.
        self._new: list[NDArray[np.float32]] = []
        self._new_images = 0
        self._lock = threading.Lock()

    def add(self, probabilities: NDArray[np.float32]) -> None:
        """Add a batch's finite probabilities (B, J), which ``up_to_date`` counts. Any thread may call it."""
        # A copy: an array of ONNX Runtime keeps all memory of its session, also after the model is unloaded.
        kept = probabilities.copy()
        with self._lock:
            self._new.append(kept)
            self._new_images += len(probabilities)
            if self._new_images >= _MAX_IMAGES_KEPT:
                self._count_new()

    @property
    def up_to_date(self) -> "Quality":
        """Return these figures after counting all added batches. Any thread may call it."""
        with self._lock:
            if self._new:
                self._count_new()
        return self

    def wins(self, index: int) -> int:
        """Return the number of added answers in which the class of this index had the longest capsule."""
        return int(self.up_to_date.winners[index])

    def _count_new(self) -> None:
        """Count the added batches. The caller must hold the lock."""
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
