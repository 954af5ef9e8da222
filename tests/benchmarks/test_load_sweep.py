"""Capacity and the knee, found on servers whose limits are known."""

from __future__ import annotations

import itertools
import math
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping

import pytest
from shoplm.bench.plan import LoadSettings, Targets, drawn_arrivals, replayed_arrivals
from shoplm.bench.report import LoadResult
from shoplm.bench.summary import ServiceSummary, Verdict, distribution
from shoplm.bench.sweep import (
    BEYOND,
    KNEE_RATIO,
    Sweep,
    comparison,
    find_knees,
    goodput,
    is_carried,
    measure_rates,
    plot_page,
)
from shoplm.request import Service
from shoplm.simulate.trace import Arrival as TracedArrival

SECONDS = 10.0


def summary(offered: float, timely: float) -> ServiceSummary:
    count, good = round(offered * SECONDS), round(timely * SECONDS)
    times = distribution([0.01 * offered] * count)
    return ServiceSummary(
        *(count, good, good, 0, count - good, 0, 0, (), 0),
        *(offered, timely, timely, times, None, None, 0, 0, 0),
    )


def result(rate: float, timely: Mapping[Service, float]) -> LoadResult:
    """Half of the rate is recommendations, half predictions; `timely` per second of each."""
    services = {service: summary(rate / 2, min(value, rate / 2)) for service, value in timely.items()}
    verdict = Verdict("VALID", (), server_limited=False)
    settings = LoadSettings(rate=rate, seconds=SECONDS)
    return LoadResult(settings, 1, services, verdict, None, None, (), distribution([]), distribution([]), 0.0)


class Server:
    """Has this many of each service in time per second, whatever is offered."""

    def __init__(self, recommendations: float, predictions: float) -> None:
        self.limits = {Service.RECOMMENDATION: recommendations, Service.PREDICTION: predictions}
        self.measured: list[float] = []

    async def measure(self, rate: float) -> LoadResult:
        self.measured.append(rate)
        return result(rate, self.limits)


def test_one_service_cannot_buy_anothers_capacity() -> None:
    balanced = result(10.0, {Service.RECOMMENDATION: 4.6, Service.PREDICTION: 4.6})
    bought = result(10.0, {Service.RECOMMENDATION: 5.0, Service.PREDICTION: 4.4})
    assert goodput(bought) > goodput(balanced)
    assert is_carried(balanced) and not is_carried(bought)


class Servers:
    """Two policies at the same rates, a clock that each measurement takes time of, and a probe of the first."""

    def __init__(self, *capacities: float) -> None:
        # 90 % of half of the rate are predictions: so much more can be offered of them.
        self.servers = [Server(recommendations=1e9, predictions=0.45 * each) for each in capacities]
        self.probed: list[float] = []

    async def measure(self, rate: float) -> tuple[LoadResult, ...]:
        return tuple([await server.measure(rate) for server in self.servers])

    async def probe(self, rate: float) -> bool:
        self.probed.append(rate)
        return is_carried(await self.servers[0].measure(rate))

    def has_time(self, more: int) -> bool:
        return len(self.servers[1].measured) + more <= self.most

    most = 100


@pytest.mark.parametrize("first", [1.0, 7.0, 300.0])
@pytest.mark.parametrize("other", [31.0, 40.0, 55.0])
async def test_the_knees_of_both_are_found_at_the_same_rates(first: float, other: float) -> None:
    servers = Servers(40.0, other)
    points = await find_knees(servers.measure, servers.probe, first, servers.has_time)
    rates = [[point.settings.rate for point in each] for each in points]
    assert rates[0] == rates[1] == sorted(servers.servers[1].measured)
    for knee, each in zip((40.0, other), points, strict=True):
        capacity = Sweep("", each).capacity
        assert capacity is not None
        assert knee / KNEE_RATIO - 0.1 <= capacity <= knee
    capacity = Sweep("", points[0]).capacity
    assert capacity is not None
    for factor in BEYOND:
        assert min(abs(rate / capacity - factor) for rate in rates[0]) < 0.01
    assert len(rates[0]) <= 12


async def test_the_search_ends_in_time_with_the_rates_beyond_the_knee() -> None:
    servers = Servers(40.0, 10.0)
    servers.most = 6
    points = await find_knees(servers.measure, servers.probe, 1.0, servers.has_time)
    assert len(points[0]) <= servers.most


async def test_a_server_that_carries_nothing_ends_the_search() -> None:
    servers = Servers(0.0, 0.0)
    servers.has_time = lambda more: len(servers.probed) < 8  # type: ignore[method-assign]
    points = await find_knees(servers.measure, servers.probe, 1.0, servers.has_time)
    assert [Sweep("", each).capacity for each in points] == [None, None]


async def test_what_the_first_policy_carries_beside_the_other_is_told() -> None:
    servers = Servers(40.0, 20.0)
    points = await measure_rates(servers.measure, [20.0, 40.0, 60.0, 80.0])
    told = comparison([Sweep("slack", points[0]), Sweep("fcfs", points[1])])
    assert told[0] == "capacity beside fcfs: x 2.00"
    # All recommendations, and 18 or 9 predictions a second.
    assert told[1] == "at 1.5 x capacity: goodput 48.00/s, fcfs 39.00 (x 1.23)"
    assert told[2] == "  of each service's goodput at capacity: recommendation 150%, prediction 100%"
    assert told[3].startswith("at 2 x capacity: goodput 58.00/s")
    assert comparison([Sweep("slack", ()), Sweep("fcfs", points[1])]) == []


async def test_capacity_needs_all_lower_rates_too() -> None:
    (points,) = await measure_rates(Servers(20.0).measure, [40.0, 10.0, 20.0])
    assert [point.settings.rate for point in points] == [10.0, 20.0, 40.0]
    assert Sweep("", points).capacity == 20.0
    broken = (result(5.0, {Service.CHAT: 0.0}), *points)
    assert Sweep("", broken).capacity is None


async def test_the_plot_is_well_formed_and_has_a_line_for_each_service() -> None:
    (points,) = await measure_rates(Servers(6.0).measure, [5.0, 10.0, 20.0])
    html = plot_page([Sweep("slack", points), Sweep("fcfs <b>", points)], "note & more")
    charts = html.count("<svg")
    assert charts == 1 + 2 * 3
    for part in html.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part[: part.index("</svg>")] + "</svg>")
    assert "recommendation" in html and "fcfs <b>" not in html


def test_bursty_arrivals_keep_the_rate() -> None:
    settings = LoadSettings(rate=50, seconds=390, warmup_seconds=10, burstiness=3.0, seed=5)
    arrivals = drawn_arrivals(settings, 4)
    gaps = [later.seconds - earlier.seconds for earlier, later in itertools.pairwise(arrivals)]
    # 20,000 gaps whose deviation is three times their mean: the mean is known to 2 %.
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.08)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(3.0, rel=0.1)


def test_a_trace_is_replayed_at_the_rate_asked_for() -> None:
    trace = [
        TracedArrival(1.0, Service.PREDICTION, 3),
        TracedArrival(2.0, Service.RECOMMENDATION, 70),
        TracedArrival(4.0, Service.PREDICTION, -1),
    ]
    settings = LoadSettings(rate=1.5, seconds=4.0, warmup_seconds=1.0)
    arrivals = replayed_arrivals(trace, settings, 64)
    # Three requests in four seconds, twice as fast, repeated from its end.
    assert [each.seconds for each in arrivals] == [0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 4.5]
    assert [each.service.value for each in arrivals[:3]] == ["prediction", "recommendation", "prediction"]
    assert [each.customer for each in arrivals[:3]] == [3, 6, 63]
    assert [each.measured for each in arrivals] == [False, *[True] * 6]
    with pytest.raises(ValueError, match="all arrivals at 0 s"):
        replayed_arrivals([TracedArrival(0.0, Service.PREDICTION)], settings, 64)


def test_deadlines_at_the_targets() -> None:
    targets = Targets(0.2, 0.1, 0.5, 0.01)
    settings = LoadSettings(targets=targets, deadline_at_target=True, chat_tokens=30)
    found = {service.value: settings.call_deadline_seconds(service) for service in Service}
    assert found == {"recommendation": 0.2, "prediction": 0.1, "chat": pytest.approx(0.8)}
    assert math.isclose(LoadSettings().call_deadline_seconds(Service.CHAT), 30.0)
