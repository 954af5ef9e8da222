"""What the scheduler counts between two reports."""

from __future__ import annotations

from collections import Counter, defaultdict

from shoplm.request import FailureKind, Service
from shoplm.scheduler.plan import Plan


class SchedulerStats:
    """Counters and samples since the last `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start a new interval."""
        self.tokens: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.mixed_steps = 0
        self.preemptions = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self.queue_seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.first_seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.total_seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.inter_token_seconds: list[tuple[float, int]] = []
        self.failures: Counter[str] = Counter()
        self.submitted: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.degraded: Counter[str] = Counter()
        self.cost_errors: list[float] = []

    def step(self, plan: Plan) -> None:
        """A step was computed."""
        tokens: dict[str, int] = dict(plan.answers_of)
        rows: dict[str, int] = dict(plan.answers_of)
        for row in plan.rows:
            service = row.sequence.request.service
            tokens[service] = tokens.get(service, 0) + row.count
            rows[service] = rows.get(service, 0) + 1
        self.tokens.update(tokens)
        self.rows.update(rows)
        self.mixed_steps += len(rows) > 1

    def queued(self, service: Service, seconds: float) -> None:
        """The first step that computes something of a request was planned."""
        self.queue_seconds[service].append(seconds)

    def first(self, service: Service, seconds: float) -> None:
        """A request's first token or result is there."""
        self.first_seconds[service].append(seconds)

    def inter_token(self, seconds: float, count: int) -> None:
        """So many times, the same time between two tokens of one answer."""
        self.inter_token_seconds.append((seconds, count))

    def finished(self, service: Service, seconds: float) -> None:
        """A request was served."""
        self.total_seconds[service].append(seconds)

    def failure(self, service: Service, kind: FailureKind, reason: str) -> None:
        """A request was not served."""
        self.failures[f"{service}:{kind}"] += 1
        if kind is FailureKind.OVERLOADED:
            self.refusals[f"{service}:{reason}"] += 1
