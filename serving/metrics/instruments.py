"""Counters and histograms for what happens with every request, on prometheus_client's registry.

Those of prometheus_client itself take a lock and check their labels for each number, which for a small network's
requests added up to a tenth of the server's time. These may be written by one thread alone, the event loop's, and read
by any.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Count:
    """How often something happened."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, times: int = 1) -> None:
        self.value += times


class Observations:
    """How many numbers were up to each bound; one on a bound is below it."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times


Child = TypeVar("Child", Count, Observations)


class _Family(Collector, Generic[Child]):
    """The series of a metric, by their labels' values."""

    def __init__(self, labels: Iterable[str], make: Callable[[], Child], registry: CollectorRegistry) -> None:
        self._label_names = tuple(labels)
        self._make: Callable[[], Child] = make
        self._series: dict[tuple[str, ...], Child] = {}
        registry.register(self)

    def labels(self, *values: str) -> Child:
        """The series with these labels, from 0 on if it is new."""
        if len(values) != len(self._label_names):
            raise ValueError(f"labels {values}; expected values for {self._label_names}")
        if values not in self._series:
            self._series[values] = self._make()
        return self._series[values]

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Remove every series that has these labels."""
        wanted = [(self._label_names.index(name), value) for name, value in labels.items()]
        for values in list(self._series):
            if all(values[index] == value for index, value in wanted):
                del self._series[values]

    def _all(self) -> list[tuple[tuple[str, ...], Child]]:
        return list(self._series.items())  # in one step, since another thread may add one


class Counter(_Family[Count]):
    """A counter; its name ends in ``_total``."""

    def __init__(self, name: str, meaning: str, labels: Iterable[str], registry: CollectorRegistry) -> None:
        self._name, self._meaning = name, meaning
        super().__init__(labels, Count, registry)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._meaning, labels=self._label_names)
        for values, count in self._all():
            family.add_metric(values, count.value)
        yield family


class Histogram(_Family[Observations]):
    """A histogram; bounds: the upper ones of its buckets but for the last, which has none."""

    def __init__(
        self, name: str, meaning: str, labels: Iterable[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._meaning = name, meaning
        self._shown = [*map(floatToGoString, bounds), "+Inf"]
        super().__init__(labels, lambda: Observations(bounds), registry)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._meaning, labels=self._label_names)
        for values, seen in self._all():
            family.add_metric(values, list(zip(self._shown, accumulate(seen.counts), strict=True)), seen.sum)
        yield family
