"""Replicas side by side: whom a request goes to, and what the fleet did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from shoplm.request import Service
from shoplm.scheduler.config import SchedulerConfig, SchedulingPolicy
from shoplm.simulate.backend import Capacity
from shoplm.simulate.curve import CostCurve
from shoplm.simulate.replica import Outcome, Replica
from shoplm.simulate.trace import PREAMBLE, Arrival

IN_TIME_SHARE = 0.9  # of each service's requests, at a fleet's capacity
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Fleet:
    """Equal replicas. A customer's requests go to one of them, where its prefix is; chats take turns."""

    config: SchedulerConfig
    curve: CostCurve
    capacity: Capacity = field(default_factory=Capacity)
    replicas: int = 1
    sample: int | None = None  # simulate only so many of the replicas; the others are like them
    noise: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.replicas < 1 or (self.sample is not None and not 1 <= self.sample <= self.replicas):
            raise ValueError(f"replicas is {self.replicas}, sample {self.sample}: 1 <= sample <= replicas is needed")

    @property
    def simulated(self) -> int:
        """Replicas that are computed."""
        return self.sample or self.replicas

    def run(self, arrivals: Iterable[Arrival]) -> FleetResult:
        """Serve a trace to its end."""
        parts: list[list[Arrival]] = [[] for _ in range(self.simulated)]
        end = 0.0
        for number, arrival in enumerate(arrivals):
            end = arrival.seconds
            key = number if arrival.customer == PREAMBLE else arrival.customer
            # A multiplicative hash, so that neighbouring customers do not meet on one replica.
            replica = (key * 2_654_435_761 % (1 << 32)) * self.replicas >> 32
            if replica < self.simulated:
                parts[replica].append(arrival)
        return self._serve(parts, end)

    def _serve(self, parts: Sequence[Sequence[Arrival]], end: float) -> FleetResult:
        outcomes: list[Outcome] = []
        busy, served = 0.0, end
        for index, part in enumerate(parts):
            replica = Replica(self.config, self.curve, self.capacity, noise=self.noise, seed=self.seed + index)
            outcomes += replica.run(part)
            busy += replica.backend.busy_seconds
            served = max(served, replica.clock.now)
        whole = max(end, 1e-9) * len(parts)
        # What is left when the trace ends is served beyond it.
        utilisation = busy / (max(served, 1e-9) * len(parts))
        return FleetResult(outcomes, self.config.policy, whole, self.replicas / self.simulated, utilisation)

    def run_split(self, arrivals: Iterable[Arrival]) -> FleetResult:
        """The static split: three engines, one for each service, each on a third of the machine and its memory."""
        pages, slots = self.capacity.pages // 3, max(self.capacity.state_slots // 3, 1)
        third = replace(self.capacity, pages=pages, state_slots=slots)
        every = list(arrivals)
        parts = [[each for each in every if each.service is service] for service in Service]
        result = replace(self, curve=self.curve.slower(3.0), capacity=third)._serve(parts, every[-1].seconds)
        return replace(result, replica_seconds=result.replica_seconds / 3, scale=1.0)


@dataclass(frozen=True, slots=True)
class ServiceResult:
    """One service. Seconds; None where there are too few answers for the quantile."""

    offered: int
    refused: int  # on arrival or while it waited or ran: RESOURCE_EXHAUSTED
    expired: int
    degraded: int
    in_time: int
    late: int
    goodput: float  # answers in time per second
    latency: dict[str, float | None]
    first: dict[str, float | None]

    @property
    def in_time_share(self) -> float | None:
        """None: nothing was offered."""
        return self.in_time / self.offered if self.offered else None


@dataclass(frozen=True, slots=True)
class FleetResult:
    """What a fleet did with a trace."""

    outcomes: list[Outcome] = field(repr=False)
    policy: SchedulingPolicy = field(repr=False)
    replica_seconds: float  # of the simulated replicas, from the first to the last arrival
    scale: float  # replicas for each that was simulated
    utilisation: float

    def service(self, service: Service, warm_up: float = 0.0) -> ServiceResult:
        """Results of the arrivals after the warm-up."""
        own = [each for each in self.outcomes if each.arrival.service is service and each.arrival.seconds >= warm_up]
        served = [each for each in own if each.served]
        timely = sum(each.in_time(self.policy) for each in served)
        return ServiceResult(
            offered=len(own),
            refused=sum(bool(each.reason) and each.reason != "EXPIRED" for each in own),
            expired=sum(each.reason == "EXPIRED" for each in own),
            degraded=sum(each.degraded for each in served),
            in_time=timely,
            late=len(served) - timely,
            goodput=self.scale * timely / max(self._seconds(warm_up), 1e-9),
            latency=quantiles([each.end_seconds for each in served if each.end_seconds is not None]),
            first=quantiles([each.first_seconds for each in served if each.first_seconds is not None]),
        )

    def services(self, warm_up: float = 0.0) -> dict[Service, ServiceResult]:
        """Results of all services."""
        return {service: self.service(service, warm_up) for service in Service}

    def goodput(self, warm_up: float = 0.0) -> float:
        """Answers in time per second, of all services."""
        return sum(each.goodput for each in self.services(warm_up).values())

    def holds(self, warm_up: float = 0.0) -> bool:
        """Whether each service that was asked for has enough of its requests in time."""
        shares = [each.in_time_share for each in self.services(warm_up).values() if each.in_time_share is not None]
        return bool(shares) and min(shares) >= IN_TIME_SHARE

    def replica_seconds_per_answer(self) -> float:
        """What an answer in time costs."""
        timely = sum(each.in_time(self.policy) for each in self.outcomes)
        return self.replica_seconds / timely if timely else math.inf

    def _seconds(self, warm_up: float) -> float:
        return max((each.arrival.seconds for each in self.outcomes), default=0.0) - warm_up


def quantiles(values: list[float]) -> dict[str, float | None]:
    """The named quantiles, each where at least ten values lie beyond it or it is the median of some."""
    ordered = sorted(values)
    found: dict[str, float | None] = {}
    for name, share in QUANTILES.items():
        enough = len(ordered) * (1 - share) >= 10 or (name == "p50" and ordered)
        found[name] = ordered[min(int(share * len(ordered)), len(ordered) - 1)] if enough else None
    return found


def find_capacity(holds: Callable[[float], bool], start: float, *, precision: float = 0.02) -> float:
    """The highest rate at which `holds`, within `precision`; `holds` is taken to be true below it and false above.

    0 when it does not hold at a thousandth of `start`.
    """
    low, high = 0.0, start
    if holds(high):
        while holds(2 * high) and high < 1e6 * start:
            high *= 2
        low, high = high, 2 * high
    else:
        low = high / 2
        while not holds(low):
            high, low = low, low / 2
            if low < start / 1000:
                return 0.0
    while high - low > precision * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
