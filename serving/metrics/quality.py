"""What a model's answers look like, for alarms when the images or the model change: which classes, how sure."""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Upper bounds of the buckets of a length or of a difference of lengths.
LENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
#: A capsule that is longer is active: its object is there.
ACTIVE = 0.5
_AT_ONCE = 512  # images


class Distribution:
    """A histogram that takes in whole arrays; a value on a bound is below it, as Prometheus has it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._edges = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self.sum = 0.0

    def add(self, values: NDArray[np.floating] | NDArray[np.integer]) -> None:
        self._counts += np.bincount(np.searchsorted(self._edges, values), minlength=len(self._counts))
        self.sum += float(values.sum())

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many values up to it), as prometheus_client takes them."""
        bounds = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(bounds, np.cumsum(self._counts).tolist(), strict=True))


class Quality:
    """Of all answers of one version of one model.

    winners: how often each class had the longest capsule. lengths: of the winner's capsule. margins: how much longer
    it was than the runner-up's. active: how many capsules were longer than ACTIVE.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.winners = np.zeros(len(labels), np.int64)
        self.lengths = Distribution(LENGTHS)
        self.margins = Distribution(LENGTHS)
        self.active = Distribution(range(len(labels) + 1))
        # Few at a time would cost more than a small network itself.
        self._new: list[NDArray[np.float32]] = []
        self._new_images = 0
        self._lock = threading.Lock()

    def add(self, probabilities: NDArray[np.float32]) -> None:
        """Take in a batch's probabilities (B, J), all finite; from any thread. They show after ``update``."""
        with self._lock:
            self._new.append(probabilities)
            self._new_images += len(probabilities)
            many = self._new_images >= _AT_ONCE
        if many:
            self.update()

    def update(self) -> None:
        """Take in what was added; from any thread."""
        with self._lock:
            new, self._new, self._new_images = self._new, [], 0
            if new:
                self._take_in(np.concatenate(new))

    def _take_in(self, probabilities: NDArray[np.float32]) -> None:
        self.winners += np.bincount(probabilities.argmax(1), minlength=len(self.labels))
        if probabilities.shape[1] > 1:
            second, first = np.partition(probabilities, -2, axis=1)[:, -2:].T
        else:
            first, second = probabilities[:, 0], np.zeros(len(probabilities), np.float32)
        self.lengths.add(first)
        self.margins.add(first - second)
        self.active.add((probabilities > ACTIVE).sum(1))
