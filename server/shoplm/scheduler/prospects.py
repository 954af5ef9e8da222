"""When a newcomer's first result would be there, and what that would cost others.

The work that is due before it, of other services and tenants no more than their shares, at the rate that running
answers leave. Chats that queue for their turn are started as fast as the last ones were.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from shoplm.request import Generate, Service
from shoplm.scheduler.backlog import Backlog
from shoplm.scheduler.budget import Budgeter
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.fairness import Shares
from shoplm.scheduler.forecast import Forecast
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.survey import Answers

_LEAST_RATE = 0.1  # of the time, that prompts are assumed to get
_TYPICAL_WEIGHT = 0.02  # of the latest request in what a service's requests typically cost


class Load(NamedTuple):
    """What a newcomer finds."""

    queued_requests: int
    queued_tokens: int
    answers: Answers
    starts_seconds: float  # when the next step can begin


class Prospects:
    """Predicts first results from what was admitted."""

    def __init__(self, config: SchedulerConfig, forecast: Forecast, budgeter: Budgeter, shares: Shares) -> None:
        self._config = config
        self._forecast = forecast
        self._budgeter = budgeter
        self._shares = shares
        self._backlogs = {service: Backlog() for service in Service}
        self._typical = dict.fromkeys(Service, 0.0)  # seconds of work of a request: the mean of the latest ones
        self._seen = dict.fromkeys(Service, 0)

    def advance(self, now: float) -> None:
        """What was due before `now` is overdue. Before anything else at this moment."""
        for backlog in self._backlogs.values():
            backlog.advance(now)

    # ---- what was admitted -----------------------------------------------------------------------------------------

    def count(self, sequence: Sequence) -> None:
        """Count what is left of a request's first result in the backlog; again after each part of it."""
        self.discount(sequence)
        if not sequence.is_late:
            sequence.work_seconds = self._forecast.work_seconds(sequence)
            if sequence.work_seconds:
                backlog = self._backlogs[sequence.request.service]
                sequence.work_bucket = backlog.add(sequence.due_seconds, sequence.work_seconds)
                assert sequence.tenant is not None
                sequence.tenant.backlog_seconds += sequence.work_seconds

    def discount(self, sequence: Sequence) -> None:
        """Count it no more."""
        if sequence.work_bucket is not None:
            self._backlogs[sequence.request.service].remove(sequence.work_bucket, sequence.work_seconds)
            sequence.work_bucket = None
            assert sequence.tenant is not None
            sequence.tenant.backlog_seconds -= sequence.work_seconds

    def backlog_seconds(self, load: Load) -> float:
        """Seconds of all work that was admitted."""
        known = sum(backlog.total for backlog in self._backlogs.values())
        return max(known, self._forecast.cost.work_seconds(load.queued_tokens, 0, load.queued_requests))

    # ---- newcomers -------------------------------------------------------------------------------------------------

    def saw(self, sequence: Sequence) -> None:
        """A request was asked for, whether or not it is let in."""
        service, work = sequence.request.service, self._forecast.whole_seconds(sequence)
        self._seen[service] += 1
        weight = max(_TYPICAL_WEIGHT, 1 / self._seen[service])
        self._typical[service] += weight * (work - self._typical[service])

    def first_result_seconds(self, sequence: Sequence, load: Load) -> float:
        """When the first result of a newcomer will be there, if it is admitted now."""
        cost = self._forecast.cost
        service, work = sequence.request.service, self._forecast.work_seconds(sequence)
        promised = self._forecast.promised_seconds(sequence)
        due = sequence.due_seconds if promised is None else promised
        own = self._ahead_of(sequence, due, work) + work
        others = [
            (backlog.until(due), self._shares.fraction(other))
            for other, backlog in self._backlogs.items()
            if other is not service
        ]
        busy = own + sum(ahead for ahead, _ in others)
        # Others' work that is due first comes first, but no further than their shares: the fixed point from above.
        for _ in range(4 if busy > own else 0):
            busy = own + sum(min(ahead, fraction * busy) for ahead, fraction in others)
        step = cost.coefficients.step
        cycle = min(self._budgeter.longest_step_seconds(load.starts_seconds), max(busy + step, 2 * step))
        if load.answers.requests:
            cycle = max(min(cycle, self._config.policy.token_target_seconds), step + load.answers.seconds)
        rate = max(1 - (step + load.answers.seconds) / cycle, _LEAST_RATE)
        alone = self._forecast.alone_seconds(sequence, work)
        wait = max(busy / rate, alone, self._queue_seconds(sequence) + alone)
        return load.starts_seconds + wait + (sequence.depth - 1) * step

    def costs_others_more(self, sequence: Sequence, predicted: float, promised: float, now: float) -> bool:
        """Whether a request that could be in time, `predicted` before it is `promised`, is so dear that others would
        not be, for its sake.

        The more work it is beside its service's typical request, the less of its time others may be ahead of it. By the
        square root of that ratio: in proportion, dear requests are refused in each short burst that they would survive,
        and without it a queue that is always full refuses cheap and dear ones alike.
        """
        alone = self._forecast.alone_seconds(sequence)
        typical = max(self._typical[sequence.request.service], 1e-9)
        dearness = math.sqrt(max(1.0, self._forecast.whole_seconds(sequence) / typical))
        return (predicted - now - alone) * dearness > promised - now - alone

    def _ahead_of(self, sequence: Sequence, due: float, work: float) -> float:
        """Seconds of its service's work that come before a newcomer of so much work. Tenants take turns: of the
        others' work no more than their shares, beside what its own tenant has."""
        share = self._shares.services[sequence.request.service]
        ahead = self._backlogs[sequence.request.service].until(due)
        tenant = share.tenants.get(sequence.request.tenant)
        weight = share.weight_of(sequence.request.tenant)
        if tenant is None or not tenant.requests:
            own, total = 0.0, share.active_weight + weight
        else:
            own, total = tenant.backlog_seconds, share.active_weight
        return min(ahead, (own + work) * total / weight)

    def _queue_seconds(self, sequence: Sequence) -> float:
        """How long a chat waits for its turn behind those of its service, at the pace at which they have been started:
        what holds them back is the answers that run, which no backlog of prompts shows."""
        if not isinstance(sequence.request.task, Generate):
            return 0.0
        share = self._shares.services[sequence.request.service]
        tenant = share.tenants.get(sequence.request.tenant)
        waiting = 0 if tenant is None else tenant.waiting
        turns = (waiting + 1) * max(share.active_weight, 1e-9) / share.weight_of(sequence.request.tenant)
        return min(share.waiting, turns) * share.start_gap_seconds
