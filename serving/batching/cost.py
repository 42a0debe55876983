"""Cost of a batch of n rows: seconds ``t(n) = a * n + b``, fitted while batches are computed."""

from collections.abc import Iterable

_WEIGHT_KEPT = 0.98  # by a measurement at each later one: about 50 batches count
_DRIFT_TAKEN_ON = 0.1  # part of a batch's surprise that the earlier measurements take on, which may be of other sizes
_MAX_SURPRISE = 20.0  # times longer or shorter than expected that a batch may count


class BatchCost:
    """Seconds that a batch of n images takes, by least squares over the latest batches; older ones count less."""

    def __init__(self, measured: Iterable[tuple[int, float]]) -> None:
        """measured: images and seconds of batches computed before, one at least."""
        #: Seconds an image, and seconds a batch.
        self.per_image = self.per_batch = 0.0
        # Sums over the measurements, by weight: of 1, n, n^2, t and n t.
        self._one = self._n = self._nn = self._t = self._nt = 0.0
        for images, seconds in measured:
            self._add(images, seconds)
        self._fit()

    def __call__(self, images: int, batches: int = 1) -> float:
        """Seconds for so many images in so many batches, one after the other."""
        return self.per_image * images + self.per_batch * batches

    def learn(self, images: int, seconds: float) -> None:
        """Take in a batch of so many images that took so many seconds."""
        # A hiccup is no reason to refuse what follows; a machine that stays slow is believed after a few batches.
        expected = self(images)
        seconds = min(max(seconds, expected / _MAX_SURPRISE), expected * _MAX_SURPRISE)
        # A machine that has become slower has become so for batches of all sizes, of which there may be only one now.
        drift = 1 + _DRIFT_TAKEN_ON * (min(max(seconds / expected, 0.5), 2) - 1)
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
        else:  # all of about one size: how the time divides is not to be seen, so it stays as it was
            before = self.per_image * self._n + self.per_batch * self._one
            slope = self.per_image * self._t / before if before else self._t / self._n
        # Neither an image nor a batch takes less than no time.
        self.per_image = min(max(slope, 0.0), self._t / self._n)
        self.per_batch = max(0.0, (self._t - self.per_image * self._n) / self._one)
