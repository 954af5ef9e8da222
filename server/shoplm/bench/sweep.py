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
KNEE_RATIO = 1.1  # the search ends when the rates on both sides of the knee are this close
BEYOND = (1.5, 2.0)  # of the capacity, where goodput must not collapse
_STRIDE = 1.2  # to the next rate where all that were measured are carried, or none
_LEAST_RATES = 3 + len(BEYOND)
MeasureAll = Callable[[float], Awaitable[tuple[LoadResult, ...]]]  # at a rate, a result of each policy
Probe = Callable[[float], Awaitable[bool]]


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


def read_rates(text: str) -> list[float]:
    """`--rates`. Raises ValueError for what is no list of numbers above 0."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0.0 < rate < math.inf for rate in rates):
        raise ValueError(f"--rates {text!r}: expected requests a second above 0, such as 3,6,9")
    return rates


async def measure_rates(measure: MeasureAll, rates: Sequence[float]) -> tuple[tuple[LoadResult, ...], ...]:
    """Each policy's results, at each of the rates, ascending."""
    return tuple(zip(*[await measure(rate) for rate in sorted(set(rates))], strict=True))


async def find_knees(
    measure: MeasureAll, probe: Probe, first: float, has_time: Callable[[int], bool]
) -> tuple[tuple[LoadResult, ...], ...]:
    """All policies at the same rates, ascending: around the knee of each, and BEYOND times the first one's capacity.

    `probe` says whether the first policy carries a rate in a short run, doubled from `first` until it does not (or
    halved until it does); what is between is bisected until the sides of each knee are within KNEE_RATIO. No further
    rate is searched unless `has_time` for so many.
    """
    carried, failed = first, first
    if await probe(first):
        while has_time(_LEAST_RATES) and await probe(failed := carried * 2):
            carried = failed
    else:
        while has_time(_LEAST_RATES) and not await probe(carried := failed / 2):
            failed = carried
    points: dict[float, tuple[LoadResult, ...]] = {}
    policy = 0
    while not points or (policy < len(next(iter(points.values()))) and has_time(1 + len(BEYOND))):
        rate = _next_rate({rate: is_carried(each[policy]) for rate, each in points.items()}, carried, failed)
        if rate is None:
            policy += 1
        else:
            points[rate] = await measure(rate)
    knee = Sweep("", tuple(points[rate][0] for rate in sorted(points))).capacity or min(points)
    for rate in (_rounded(knee * factor) for factor in BEYOND):
        if rate not in points:
            points[rate] = await measure(rate)
    return tuple(zip(*(points[rate] for rate in sorted(points)), strict=True))


def _next_rate(found: Mapping[float, bool], carried: float, failed: float) -> float | None:
    """What to measure next of a policy that carries these rates or not; None: its knee is known. Before one is known,
    that is expected between the other two."""
    high = min((rate for rate, holds in found.items() if not holds), default=None)
    low = max((rate for rate, holds in found.items() if holds and (high is None or rate < high)), default=None)
    if low is None and high is None:
        return _rounded(math.sqrt(carried * failed))
    if low is None:
        assert high is not None
        return carried if carried < high else _rounded(high / _STRIDE)
    if high is None:
        return failed if failed > low else _rounded(low * _STRIDE)
    return None if high / low <= KNEE_RATIO else _rounded(math.sqrt(low * high))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


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
    for line in comparison(sweeps):
        console.print(line, highlight=False)
    for sweep in sweeps:
        invalid = [point for point in sweep.points if point.verdict.status == "INVALID"]
        for reason in sorted({reason for point in invalid for reason in point.verdict.reasons}):
            console.print(f"INVALID: {reason}", style="red", markup=False, highlight=False)


def comparison(sweeps: Sequence[Sweep]) -> list[str]:
    """What the first policy carries beside the others, and what becomes of its goodput beyond its capacity."""
    first = sweeps[0]
    capacity = first.capacity
    if capacity is None:
        return []
    lines = []
    for other in sweeps[1:]:
        ratio = "which carries none of these rates" if other.capacity is None else f"x {capacity / other.capacity:.2f}"
        lines.append(f"capacity beside {other.policy}: {ratio}")
    at_capacity = _at(first, capacity)
    for factor in BEYOND:
        point = _at(first, _rounded(capacity * factor))
        if point is None or at_capacity is None:
            continue
        beside = [
            f"{other.policy} {goodput(there):.2f}{_times(goodput(point), goodput(there))}"
            for other in sweeps[1:]
            if (there := _at(other, point.settings.rate)) is not None
        ]
        kept = ", ".join(
            f"{name} {each.goodput / before:.0%}"
            for name, each in point.services.items()
            if (before := at_capacity.services[name].goodput)
        )
        lines.append(f"at {factor:g} x capacity: goodput {', '.join([f'{goodput(point):.2f}/s', *beside])}")
        lines.append(f"  of each service's goodput at capacity: {kept}")
    return lines


def _at(sweep: Sweep, rate: float) -> LoadResult | None:
    return next((point for point in sweep.points if point.settings.rate == rate), None)


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


def _times(one: float, other: float) -> str:
    return f" (x {one / other:.2f})" if other else ""
