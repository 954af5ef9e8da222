"""Histograms as plain numbers of the event loop that counts, which a scrape makes into series.

A prometheus-client histogram takes two locks and looks at its bounds one after another for each value: a report of the
engine has a thousand of them, and calls would wait for that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class Buckets:
    """How many values lie up to which bound, and their sum."""

    __slots__ = ("_bounds", "_within", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` ascending; a value is within the first that is no smaller."""
        self.total = 0.0
        self._bounds = bounds
        self._within = [0] * (len(bounds) + 1)  # values between two bounds

    def add(self, value: float, count: int = 1) -> None:
        """Count a value so many times."""
        self.total += value * count
        self._within[bisect_left(self._bounds, value)] += count

    def extend(self, values: Iterable[float]) -> None:
        """Count each of these once."""
        bounds, within = self._bounds, self._within
        for value in values:
            self.total += value
            within[bisect_left(bounds, value)] += 1

    def cumulative(self) -> list[tuple[str, float]]:
        """Upper bound and values up to it, as Prometheus has it."""
        return list(zip([*map(str, self._bounds), "+Inf"], accumulate(self._within), strict=True))


class Histogram(Collector):
    """One metric: buckets by the values of a label, or without one."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], label: str = "") -> None:
        """`label` "": there are no labels, and one series."""
        self._name, self._text, self._label = name, text, label
        self._bounds = bounds
        self._series: dict[str, Buckets] = {} if label else {"": Buckets(bounds)}

    def of(self, value: str = "") -> Buckets:
        """The series with this value of the label; it is there from now on."""
        series = self._series.get(value)
        if series is None:
            series = self._series[value] = Buckets(self._bounds)
        return series

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        for value, series in tuple(self._series.items()):
            family.add_metric([value] if self._label else [], series.cumulative(), series.total)
        yield family
