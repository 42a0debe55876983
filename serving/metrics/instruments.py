"""Declarations of metrics and the series behind them, shown on prometheus_client's registry.

There are two kinds of series. An event is counted when it happens (Count, Observations). A figure that exists anyway is
read off when the page is asked for (Reading, DistributionReading).

Events may be counted by one thread alone, the event loop's, and read by any, so that they need no lock, unlike those of
prometheus_client's instruments.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.utils import floatToGoString


class Kind(Enum):
    """Type of a metric, in Prometheus's words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    #: A counter whose name does not end in ``_total``, which prometheus_client gives to every counter.
    UNTYPED = "untyped"


@dataclass(frozen=True)
class Declaration:
    """A metric as the page, the documentation and the dashboard know it.

    name: as a counter's sample has it, with ``_total``. buckets: upper bounds of a histogram's buckets but the last,
    which has none; empty where each series has bounds of its own.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    unit: str = ""
    buckets: tuple[float, ...] = ()

    @property
    def samples(self) -> tuple[str, ...]:
        """Names of the metric's samples on the page."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "count", "sum"))
        return (self.name,)

    def without_samples(self) -> Metric:
        """Return prometheus_client's object of this metric."""
        match self.kind:
            case Kind.COUNTER:
                return CounterMetricFamily(self.name, self.meaning, labels=self.labels)
            case Kind.GAUGE:
                return GaugeMetricFamily(self.name, self.meaning, labels=self.labels)
            case Kind.HISTOGRAM:
                return HistogramMetricFamily(self.name, self.meaning, labels=self.labels)
            case Kind.UNTYPED:
                return UnknownMetricFamily(self.name, self.meaning, labels=self.labels)


class Distribution(Protocol):
    """A histogram's numbers: counts has one more entry than bounds; a value on a bound is below it."""

    @property
    def bounds(self) -> Sequence[float]: ...

    @property
    def counts(self) -> Sequence[int]: ...

    @property
    def sum(self) -> float: ...


class Count:
    """Number of times that something happened."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, times: int = 1) -> None:
        self.value += times


class Observations:
    """Numbers that were observed, by the bucket that each falls into."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def value(self) -> Distribution:
        return self


class Reading:
    """A number that is read off: the sum of what the functions return, one function a part."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: dict[str, Callable[[], float]] = {}

    def read(self, function: Callable[[], float], part: str = "") -> None:
        """Take a part's number from this function from now on; the thread that writes the page calls it."""
        self._parts[part] = function

    @property
    def value(self) -> float:
        return sum(function() for function in tuple(self._parts.values()))  # a copy: the event loop may add a part


class DistributionReading:
    """A histogram that is read off."""

    __slots__ = ("_function",)

    def __init__(self) -> None:
        self._function: Callable[[], Distribution] = lambda: Observations(())

    def read(self, function: Callable[[], Distribution]) -> None:
        """Take the numbers from this function from now on; the thread that writes the page calls it."""
        self._function = function

    @property
    def value(self) -> Distribution:
        return self._function()


Series = TypeVar("Series", Count, Observations, Reading, DistributionReading)


class Family(Generic[Series]):
    """The series of one metric, by the values of their labels."""

    def __init__(self, declaration: Declaration, make: Callable[[], Series]) -> None:
        self.declaration = declaration
        self._make: Callable[[], Series] = make
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: str) -> Series:
        """Return the series with these labels; a new one begins at 0. Raises ValueError for a wrong number of them."""
        if len(values) != len(self.declaration.labels):
            raise ValueError(f"labels {values}; expected values for {self.declaration.labels}")
        if values not in self._series:
            self._series[values] = self._make()
        return self._series[values]

    def remove(self, labels: Mapping[str, str]) -> None:
        """Remove every series that has these labels."""
        wanted = [(self.declaration.labels.index(name), value) for name, value in labels.items()]
        for values in list(self._series):
            if all(values[index] == value for index, value in wanted):
                del self._series[values]

    def collect(self) -> Metric:
        """Return the metric as it is now; from any thread."""
        family = self.declaration.without_samples()
        for labels, series in list(self._series.items()):  # in one step, since another thread may add one
            _add(family, labels, series.value)
        return family


def _add(family: Metric, labels: tuple[str, ...], value: float | Distribution) -> None:
    """Add a series as it is now."""
    if isinstance(value, int | float):
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily | UnknownMetricFamily)
        family.add_metric(labels, value)
    else:
        assert isinstance(family, HistogramMetricFamily)
        shown = (*map(floatToGoString, value.bounds), "+Inf")
        family.add_metric(labels, list(zip(shown, accumulate(value.counts), strict=True)), value.sum)
