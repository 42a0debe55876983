"""Cost of a batch of n rows: seconds ``t(n) = a * n + b``, fitted while batches are computed."""

from collections.abc import Iterable

_WEIGHT_KEPT = 0.98  # factor of a measurement's weight at each later one: about 50 batches count
_DRIFT_SHARE = 0.1  # share of an unexpected change that is also applied to earlier measurements, maybe of other sizes
_MAX_SURPRISE_FACTOR = 20.0  # a measurement counts as at most this many times longer or shorter than expected


class BatchCost:
    """The cost of a batch by its size, from a least squares fit over the latest batches. Older batches count less."""

    def __init__(self, measured: Iterable[tuple[int, float]]) -> None:
        """Start from measurements: images and seconds of at least one batch."""
        #: Seconds an image, and seconds a batch.
        self.per_image = self.per_batch = 0.0
        # Sums over the measurements, by weight: of 1, n, n^2, t and n t.
        self._one = self._n = self._nn = self._t = self._nt = 0.0
        for images, seconds in measured:
            self._add(images, seconds)
        self._fit()

    def __call__(self, images: int, batches: int = 1) -> float:
        """Return the seconds for ``images`` images in ``batches`` batches, one after the other."""
        return self.per_image * images + self.per_batch * batches

    def learn(self, images: int, seconds: float) -> None:
        """Add the measurement of a batch: its images and seconds."""
        # One slow batch must not cause refusals. If the machine stays slow, the cost follows after a few batches.
        expected = self(images)
        seconds = min(max(seconds, expected / _MAX_SURPRISE_FACTOR), expected * _MAX_SURPRISE_FACTOR)
        # A slower machine is slower for batches of all sizes, even if all present batches have one size.
        drift = 1 + _DRIFT_SHARE * (min(max(seconds / expected, 0.5), 2) - 1)
        self._one *= _WEIGHT_KEPT
        self._n *= _WEIGHT_KEPT
        self._nn *= _WEIGHT_KEPT
        self._t *= _WEIGHT_KEPT * drift
        self._nt *= _WEIGHT_KEPT * drift
        self._add(images, seconds)
        self._fit()

    def _add(self, images: int, seconds: float) -> None:
        self._one += 1
        self._n += images
        self._nn += images * images
        self._t += seconds
        self._nt += images * seconds

    def _fit(self) -> None:
        spread = self._one * self._nn - self._n * self._n
        if spread > 1e-3 * self._n * self._n:
            slope = (self._one * self._nt - self._n * self._t) / spread
        else:  # all of about one size: the division of the time cannot be seen, so it stays unchanged
            before = self.per_image * self._n + self.per_batch * self._one
            slope = self.per_image * self._t / before if before else self._t / self._n
        # Neither cost may be negative.
        self.per_image = min(max(slope, 0.0), self._t / self._n)
        self.per_batch = max(0.0, (self._t - self.per_image * self._n) / self._one)
