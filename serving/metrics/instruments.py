"""Declarations of metrics and the series behind them, shown on prometheus_client's registry.

There are two kinds of series. Events are counted when they happen (Count, Observations). Figures that exist anyway are
read when the page is requested (Reading, DistributionReading).

Only the event loop's thread may count events, and any thread may read them. So they need no lock, unlike
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
    """The types of metrics, in Prometheus's words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    #: A counter without the end ``_total``, which prometheus_client gives to every counter's name.
    UNTYPED = "untyped"


@dataclass(frozen=True)
class Declaration:
    """The declaration of a metric for the page, the documentation and the dashboard.

    name: for a counter, with ``_total``. buckets: the upper bounds of a histogram's buckets, without the last,
    unbounded one; empty if each series has its own bounds.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    unit: str = ""
    buckets: tuple[float, ...] = ()

    @property
    def samples(self) -> tuple[str, ...]:
        """Return the names of the metric's samples on the page."""
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
    """The numbers of a histogram. counts has one more entry than bounds. A value on a bound counts as below it."""

    @property
    def bounds(self) -> Sequence[float]: ...

    @property
    def counts(self) -> Sequence[int]: ...

    @property
    def sum(self) -> float: ...


class Count:
    """The number of events."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, times: int = 1) -> None:
        self.value += times


class Observations:
    """Observed numbers, counted by bucket."""

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
    """A number that is read on request: the sum of the results of functions, one for each part."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: dict[str, Callable[[], float]] = {}

    def read(self, function: Callable[[], float], part: str = "") -> None:
        """Set the function that returns a part's number. The thread that writes the page calls it."""
        self._parts[part] = function

    @property
    def value(self) -> float:
        return sum(function() for function in tuple(self._parts.values()))  # a copy: the event loop may add a part


class DistributionReading:
    """A histogram that is read on request."""

    __slots__ = ("_function",)

    def __init__(self) -> None:
        self._function: Callable[[], Distribution] = lambda: Observations(())

    def read(self, function: Callable[[], Distribution]) -> None:
        """Set the function that returns the numbers. The thread that writes the page calls it."""
        self._function = function

    @property
    def value(self) -> Distribution:
        return self._function()


Series = TypeVar("Series", Count, Observations, Reading, DistributionReading)


class Family(Generic[Series]):
    """The series of one metric, by label values."""

    def __init__(self, declaration: Declaration, make: Callable[[], Series]) -> None:
        self.declaration = declaration
        self._make: Callable[[], Series] = make
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: str) -> Series:
        """Return the series with these labels.

        A new one starts at 0. Raises ValueError for a wrong number of labels.
        """
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
        """Return the present state of the metric. Any thread may call it."""
        family = self.declaration.without_samples()
        for labels, series in list(self._series.items()):  # in one step, since another thread may add one
            _add(family, labels, series.value)
        return family


def _add(family: Metric, labels: tuple[str, ...], value: float | Distribution) -> None:
    """Add the present state of a series."""
    if isinstance(value, int | float):
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily | UnknownMetricFamily)
        family.add_metric(labels, value)
    else:
        assert isinstance(family, HistogramMetricFamily)
        shown = (*map(floatToGoString, value.bounds), "+Inf")
        family.add_metric(labels, list(zip(shown, accumulate(value.counts), strict=True)), value.sum)
