"""One engine on simulated time, and what became of each request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shoplm.engine.engine import Engine
from shoplm.request import (
    FailedOutput,
    Generate,
    Predict,
    Request,
    Sampling,
    Select,
    Service,
    Task,
    TokensOutput,
    by_request,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig, SchedulingPolicy
from shoplm.simulate.backend import STOP_TOKEN, Capacity, Clock, SimulatedBackend
from shoplm.simulate.curve import CostCurve
from shoplm.simulate.trace import PREAMBLE, Arrival

_TOKEN_IDS = 1 << 30
_SUFFIXES = 1 << 40  # beyond all customers


@dataclass(slots=True)
class Outcome:
    """What became of a request. Times are seconds since its arrival."""

    arrival: Arrival
    reason: str = ""  # why it was not served; "": it was, or the trace ended before it was
    first_seconds: float | None = None
    end_seconds: float | None = None
    tokens: int = 0
    degraded: bool = False

    @property
    def served(self) -> bool:
        return self.end_seconds is not None and not self.reason

    def in_time(self, policy: SchedulingPolicy) -> bool:
        """Served by its target; a chat's first token by one, and its end by that and a token target for each token."""
        if not self.served or self.first_seconds is None or self.end_seconds is None:
            return False
        target = policy.target_seconds[self.arrival.service]
        if self.arrival.service is Service.CHAT:
            whole = target + self.tokens * policy.token_target_seconds
            return self.first_seconds <= target and self.end_seconds <= whole
        return self.end_seconds <= target


class Replica:
    """An engine with its own clock. Arrivals are handed in between steps, as the engine's process does it."""

    def __init__(
        self,
        config: SchedulerConfig,
        curve: CostCurve,
        capacity: Capacity,
        *,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.clock = Clock()
        self.backend = SimulatedBackend(self.clock, curve, capacity, noise=noise, seed=seed)
        self.engine = Engine(self.backend, config, self.clock)
        self.outcomes: list[Outcome] = []
        self._alive: dict[str, Outcome] = {}

    def run(self, arrivals: Iterable[Arrival]) -> list[Outcome]:
        """Serve all arrivals, in their order, to the end."""
        pending = iter(arrivals)
        following = next(pending, None)
        while following is not None or not self.engine.is_idle:
            if self.engine.is_idle and following is not None:
                self.clock.now = max(self.clock.now, following.seconds)
            while following is not None and following.seconds <= self.clock.now:
                self._submit(following)
                following = next(pending, None)
            self._step()
        return self.outcomes

    def _step(self) -> None:
        for output in by_request(self.engine.step()):
            outcome = self._alive[output.request_id]
            since = self.clock.now - outcome.arrival.seconds
            if isinstance(output, TokensOutput):
                outcome.tokens += len(output.tokens)
                if outcome.first_seconds is None:
                    outcome.first_seconds = since
                continue
            del self._alive[output.request_id]
            outcome.end_seconds = since
            if isinstance(output, FailedOutput):
                outcome.reason = output.reason
            else:
                outcome.first_seconds = output.timings.first_seconds
                outcome.degraded = bool(output.degraded)

    def _submit(self, arrival: Arrival) -> None:
        name = str(len(self.outcomes))
        outcome = Outcome(arrival)
        self.outcomes.append(outcome)
        self._alive[name] = outcome
        self.engine.submit(request_of(arrival, name))


def request_of(arrival: Arrival, name: str) -> Request:
    """What the engine is sent: customers' prefixes are the same tokens each time, what follows is like nobody's.

    `name`: a number that no other request of the engine has.
    """
    history = _tokens(arrival.customer - PREAMBLE, arrival.history_tokens)
    suffix = _tokens(_SUFFIXES + int(name), arrival.suffix_tokens)
    return Request(
        name,
        arrival.service,
        token_ids(history + suffix),
        _task(arrival),
        arrival_seconds=arrival.seconds,
        deadline_seconds=None if arrival.deadline_seconds is None else arrival.seconds + arrival.deadline_seconds,
        history_tokens=arrival.history_tokens,
        tenant=arrival.tenant,
        priority=arrival.priority,
        allow_degraded=arrival.allow_degraded,
    )


def _tokens(key: int, count: int) -> tuple[int, ...]:
    start = key * 1_000_003
    return tuple((start + index) % _TOKEN_IDS for index in range(count))


def _task(arrival: Arrival) -> Task:
    match arrival.service:
        case Service.CHAT:
            most = max(arrival.max_tokens, arrival.output_tokens)
            return Generate(most, Sampling(seed=arrival.output_tokens), stop_token_ids=(STOP_TOKEN,))
        case Service.RECOMMENDATION:
            return Select(count=min(10, arrival.beam_width), beam_width=arrival.beam_width)
        case Service.PREDICTION:
            return Predict(())
