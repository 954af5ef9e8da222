"""One load at several rates, under one scheduling policy or several: capacity, goodput over load, the knee.

Capacity is the highest offered rate at which *each* service has at least 90 % of its requests in time: shedding one
service cannot buy another's.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from shoplm.bench.report import LoadResult
from shoplm.simulate.plot import Chart, page

IN_TIME_SHARE = 0.9
KNEE_RATIO = 1.15  # the search ends when the rates on both sides of the knee are this close
MAX_POINTS = 12
Measure = Callable[[float], Awaitable[LoadResult]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Results of one policy ("" is the server's own), by ascending rate in requests per second."""

    policy: str
    points: tuple[LoadResult, ...]

    @property
    def capacity(self) -> float | None:
        """The highest rate that is carried, with all lower ones; None: not even the lowest was."""
        carried = None
        for point in self.points:
            if not is_carried(point):
                break
            carried = point.settings.rate
        return carried


def is_carried(result: LoadResult) -> bool:
    """Whether each service had its share of requests in time; one without requests shows nothing."""
    return all(0 < each.offered * IN_TIME_SHARE <= each.in_time for each in result.services.values())


def goodput(result: LoadResult) -> float:
    """Requests in time per second, all services together."""
    return math.fsum(each.goodput for each in result.services.values())


async def measure_rates(measure: Measure, rates: Sequence[float]) -> tuple[LoadResult, ...]:
    """One load at each rate, ascending."""
    return tuple([await measure(rate) for rate in sorted(set(rates))])


async def find_knee(measure: Measure, first: float, max_points: int = MAX_POINTS) -> tuple[LoadResult, ...]:
    """Rates around the knee: doubled from `first` until one is not carried (or halved until one is), then bisected
    until the two sides are within KNEE_RATIO, then the knee times 1.5 and 2, where goodput must not collapse."""
    points: dict[float, LoadResult] = {}

    async def carried(rate: float) -> bool:
        if rate not in points:
            points[rate] = await measure(rate)
        return is_carried(points[rate])

    low = high = first
    if await carried(first):
        while len(points) < max_points and await carried(high := high * 2):
            low = high
    else:
        while len(points) < max_points and not await carried(low := low / 2):
            high = low
    while len(points) < max_points and high / low > KNEE_RATIO:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if await carried(middle) else (low, middle)
    for factor in (1.5, 2.0):
        await carried(low * factor)
    return tuple(points[rate] for rate in sorted(points))


def print_sweeps(sweeps: Sequence[Sweep], console: Console) -> None:
    """A line for each policy and rate, and what it amounts to."""
    table = Table("policy", "req/s", "goodput/s", "in time, each service", "refused", "degraded", "verdict", box=None)
    for sweep in sweeps:
        for point in sweep.points:
            services = point.services.items()
            table.add_row(
                sweep.policy or "-",
                f"{point.settings.rate:.2f}",
                f"{goodput(point):.2f}",
                "  ".join(f"{name[:4]} {each.in_time / max(each.offered, 1):.0%}" for name, each in services),
                str(sum(each.refused for _, each in services)),
                str(sum(each.degraded for _, each in services)),
                point.verdict.status,
            )
    console.print(table)
    for sweep in sweeps:
        found = "below all of these rates" if sweep.capacity is None else f"{sweep.capacity:.2f} requests/s"
        console.print(f"capacity{f' under {sweep.policy}' if sweep.policy else ''}: [bold]{found}[/bold]")
        invalid = [point for point in sweep.points if point.verdict.status == "INVALID"]
        for reason in sorted({reason for point in invalid for reason in point.verdict.reasons}):
            console.print(f"INVALID: {reason}", style="red", markup=False, highlight=False)


def plot_page(sweeps: Sequence[Sweep], note: str) -> str:
    """Goodput and latency over the offered load, as one HTML document."""
    charts = [_goodput_chart(sweeps)] if len(sweeps) > 1 else []
    for sweep in sweeps:
        rates = [point.settings.rate for point in sweep.points]
        title = f" ({sweep.policy})" if sweep.policy else ""
        names = sorted({name for point in sweep.points for name in point.services})
        good: dict[str, list[float | None]] = {
            name: [point.services[name].goodput for point in sweep.points] for name in names
        }
        charts.append(Chart(f"Goodput{title}", "offered requests/s", "in time/s", rates, good))
        for quantile in ("p50", "p99"):
            late: dict[str, list[float | None]] = {
                name: [_milliseconds(getattr(point.services[name].latency, quantile)) for point in sweep.points]
                for name in names
            }
            charts.append(Chart(f"Latency {quantile}{title}", "offered requests/s", "ms", rates, late))
    return page("Load", note, charts)


def _goodput_chart(sweeps: Sequence[Sweep]) -> Chart:
    rates = sorted({point.settings.rate for sweep in sweeps for point in sweep.points})
    lines: Mapping[str, Sequence[float | None]] = {
        sweep.policy or "server": [
            next((goodput(point) for point in sweep.points if point.settings.rate == rate), None) for rate in rates
        ]
        for sweep in sweeps
    }
    return Chart("Goodput, all services", "offered requests/s", "in time/s", rates, lines)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
