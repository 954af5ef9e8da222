"""What is sent when: settings of a load and its seeded arrival times."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from shoplm.request import Service
from shoplm.simulate.trace import Arrival as TracedArrival
from shoplm.simulate.trace import moments

MAX_ARRIVALS = 200_000
MAX_SECONDS = 3600.0


def _check_above_zero(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a finite number above 0")


@dataclass(frozen=True, slots=True)
class Targets:
    """By when an answer is in time, in seconds from the intended send time.

    Chat has two: the first text by `chat_first_seconds`, and the end by that plus `chat_token_seconds` per token.
    """

    recommendation_seconds: float = 0.100
    prediction_seconds: float = 0.050
    chat_first_seconds: float = 0.500
    chat_token_seconds: float = 0.060

    def __post_init__(self) -> None:
        _check_above_zero(self, *(each.name for each in fields(self)))


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """A load. Rates in requests per second over all services; `mix` gives their weights.

    Whether an answer is in time is measured against `targets`. `deadline_seconds` is the gRPC deadline of every call,
    which only bounds it, unless `deadline_at_target`: then the server is told when each answer is due. `burstiness` is
    the coefficient of variation of the gaps between arrivals; 1 is a Poisson process. What would exceed
    `max_in_flight` calls is not sent, and the verdict says so.
    """

    rate: float = 2.0
    seconds: float = 60.0
    warmup_seconds: float = 10.0
    mix: Mapping[Service, float] = field(
        default_factory=lambda: {
            Service.RECOMMENDATION: 6.0,
            Service.CHAT: 1.0,
            Service.PREDICTION: 3.0,
        }
    )
    targets: Targets = Targets()
    deadline_seconds: float = 30.0
    deadline_at_target: bool = False
    burstiness: float = 1.0
    allow_degraded: bool = True
    max_in_flight: int = 2048
    customers: int = 64
    new_customer_share: float = 0.5
    count: int = 10
    chat_tokens: int = 32
    seed: int = 1

    def __post_init__(self) -> None:
        _check_above_zero(self, "rate", "seconds", "deadline_seconds", "burstiness")
        if not 0 <= self.warmup_seconds <= MAX_SECONDS or self.seconds > MAX_SECONDS:
            raise ValueError(
                f"seconds={self.seconds} and warmup_seconds={self.warmup_seconds} must be within {MAX_SECONDS:g}"
            )
        if self.rate * (self.seconds + self.warmup_seconds) > MAX_ARRIVALS:
            raise ValueError(f"rate={self.rate} for {self.seconds} s is more than {MAX_ARRIVALS} requests; lower one")
        if not all(0 <= weight < math.inf for weight in self.mix.values()) or sum(self.mix.values()) <= 0:
            raise ValueError(f"mix={dict(self.mix)} must have weights of 0 or more, one of them above 0")
        if not 0 <= self.new_customer_share <= 1:
            raise ValueError(f"new_customer_share={self.new_customer_share} must be from 0 to 1")
        for name in ("customers", "count", "chat_tokens", "max_in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def call_deadline_seconds(self, service: Service) -> float:
        """The gRPC deadline of a call; at the target, that of a whole chat is the target of its last token."""
        if not self.deadline_at_target:
            return self.deadline_seconds
        targets = self.targets
        if service is Service.CHAT:
            return targets.chat_first_seconds + self.chat_tokens * targets.chat_token_seconds
        is_prediction = service is Service.PREDICTION
        return targets.prediction_seconds if is_prediction else targets.recommendation_seconds


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it is to be sent (seconds after the start), where, and about which customer."""

    seconds: float
    service: Service
    customer: int
    measured: bool  # False during the warm-up


def drawn_arrivals(settings: LoadSettings, customers: int) -> tuple[Arrival, ...]:
    """Arrivals with gamma-distributed gaps of mean `1 / rate`; service and customer drawn independently.

    The same settings give the same arrivals. At least one arrival is always there.
    """
    generator = random.Random(settings.seed)
    services = list(settings.mix)
    weights = [settings.mix[service] for service in services]
    end = settings.warmup_seconds + settings.seconds
    arrivals: list[Arrival] = []
    for moment in moments(generator, settings.rate, settings.burstiness):
        if moment >= end and arrivals:
            break
        service = generator.choices(services, weights)[0]
        customer = generator.randrange(customers)
        arrivals.append(Arrival(min(moment, end), service, customer, moment >= settings.warmup_seconds))
    return tuple(arrivals)


def replayed_arrivals(trace: Sequence[TracedArrival], settings: LoadSettings, customers: int) -> tuple[Arrival, ...]:
    """The services, customers and gaps of a trace, faster or slower so that its mean rate is `settings.rate`, from its
    beginning again where it is shorter than the run. Raises ValueError for one that takes no time."""
    length = trace[-1].seconds
    if length <= 0:
        raise ValueError("the trace has all arrivals at 0 s: nothing says how fast they came")
    scale = len(trace) / length / settings.rate
    end = settings.warmup_seconds + settings.seconds
    arrivals: list[Arrival] = []
    for round_start in itertools.count(0.0, length * scale):
        for each in trace:
            moment = round_start + each.seconds * scale
            if moment >= end:
                return tuple(arrivals)
            customer = each.customer % customers  # the shop's preamble, -1 in a trace, is some customer, too
            is_measured = moment >= settings.warmup_seconds
            arrivals.append(Arrival(moment, each.service, customer, is_measured))
    raise AssertionError("a trace is repeated until the run ends")
