"""When a newcomer's first result would be there, and what that would cost others.

The work that is due before it, of other services and tenants no more than their shares, in steps that the running
answers leave room in; once the queue has been seen to move, at the pace at which it does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from shoplm.request import Service
from shoplm.scheduler.backlog import ServiceBacklog
from shoplm.scheduler.budget import Budgeter
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.correction import Correction
from shoplm.scheduler.fairness import Shares
from shoplm.scheduler.forecast import Forecast
from shoplm.scheduler.ordering import PRIORITY_SECONDS
from shoplm.scheduler.pace import Pace
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.survey import Answers

_SHORT_WAIT = 0.5  # of the time that a request has: it does not matter how far the forecast of less is off
_LEAST_RATE = 0.1  # of the time, that prompts are assumed to get


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
        self._backlogs = {service: ServiceBacklog() for service in Service}
        self.corrections = {service: Correction() for service in Service}
        self._pace = Pace()
        self._pace_of = {service: Pace() for service in Service}
        self._planned = dict.fromkeys(Service, 0.0)  # seconds of work on first results, of the step that is planned

    def advance(self, now: float) -> None:
        """What was due before `now` is overdue. Before anything else at this moment."""
        for backlog in self._backlogs.values():
            backlog.advance(now)

    # ---- what was admitted -----------------------------------------------------------------------------------------

    def count(self, sequence: Sequence) -> None:
        """Count what is left of a request's first result in the backlog."""
        self.discount(sequence)
        if not sequence.is_late:
            sequence.work_seconds = self._forecast.work_seconds(sequence)
            if sequence.work_seconds:
                priority, work = sequence.request.priority, sequence.work_seconds
                backlog = self._backlogs[sequence.request.service]
                sequence.work_bucket = backlog.add(priority, sequence.due_seconds, work)
                assert sequence.tenant is not None
                sequence.tenant.backlog_seconds[priority] += work

    def progressed(self, sequence: Sequence) -> None:
        """A part of it was planned."""
        if sequence.work_bucket is not None:
            before = sequence.work_seconds
            self.count(sequence)
            self._planned[sequence.request.service] += before - sequence.work_seconds

    def planned(self, now: float) -> None:
        """A step was planned."""
        services, done = self._shares.services, self._planned
        self._pace.planned(sum(done.values()), any(share.waiting for share in services.values()), now)
        for service, pace in self._pace_of.items():
            pace.planned(done[service], services[service].waiting > 0, now)
        self._planned = dict.fromkeys(Service, 0.0)

    def discount(self, sequence: Sequence) -> None:
        """Count it no more."""
        if sequence.work_bucket is not None:
            priority, work = sequence.request.priority, sequence.work_seconds
            self._backlogs[sequence.request.service].remove(priority, sequence.work_bucket, work)
            sequence.work_bucket = None
            assert sequence.tenant is not None
            sequence.tenant.backlog_seconds[priority] -= work

    def backlog_seconds(self, load: Load) -> float:
        """Seconds of all work that was admitted."""
        known = sum(backlog.total for backlog in self._backlogs.values())
        return max(known, self._forecast.cost.work_seconds(load.queued_tokens, 0, load.queued_requests))

    # ---- newcomers -------------------------------------------------------------------------------------------------

    def saw(self, service: Service, work_seconds: float | None, now: float) -> None:
        """A request that could be served was asked for, whether or not it is let in; None: its work was not looked at,
        and it counts as a typical one."""
        self._shares.demand.asked(service, work_seconds, now)

    def first_result_seconds(self, sequence: Sequence, load: Load) -> float:
        """When the first result of a newcomer will be there, if it is admitted now."""
        cost = self._forecast.cost
        service, work = sequence.request.service, self._forecast.work_seconds(sequence)
        promised = self._forecast.promised_seconds(sequence)
        due = sequence.due_seconds if promised is None else promised
        # What others compute of its own prompt comes first, whenever that is due: it lends them its place.
        awaited = cost.work_seconds(sequence.expected_awaited, 0, 0)
        own = max(self._ahead_of(sequence, due, work), awaited) + work
        arrival = sequence.request.arrival_seconds
        sequence.foreseen_seconds = 0.0
        if own:
            sequence.foreseen_seconds = load.starts_seconds + self._wait_seconds(service, own, due, load) - arrival
        soonest = load.starts_seconds + awaited + self._forecast.alone_seconds(sequence, work)
        # What it takes alone needs no correction: an idle engine refuses nobody by the errors of a busy one.
        levels = (sequence.depth - 1) * cost.coefficients.step
        waits = max(arrival + sequence.foreseen_seconds + levels - soonest, 0.0)
        return soonest + self.corrections[service].factor * waits

    def _wait_seconds(self, service: Service, own: float, due: float, load: Load) -> float:
        """How long so much of a service's own work takes, beside others' that is due first."""
        busy = self._busy_seconds(service, own, due)
        guess = self._steps_seconds(busy, load)
        wait = self._pace.wait_seconds(busy, guess)
        if service in self._shares.ahead():  # held back: others' queues move, its own less
            wait = max(wait, self._pace_of[service].wait_seconds(own, guess))
        return wait

    def _busy_seconds(self, service: Service, own: float, due: float) -> float:
        """Seconds of work until so much of a service's own is done: others' that is due first comes first, but no
        further than their shares."""
        fractions = self._shares.fractions()
        others = [
            (backlog.until(due), fractions[other]) for other, backlog in self._backlogs.items() if other is not service
        ]
        busy = own + sum(ahead for ahead, _ in others)
        for _ in range(4 if busy > own else 0):  # the fixed point from above
            busy = own + sum(min(ahead, fraction * busy) for ahead, fraction in others)
        return busy

    def came(self, sequence: Sequence, now: float) -> None:
        """The first result of a request is there; infinite: it never will be."""
        promised = self._forecast.promised_seconds(sequence)
        if promised is not None:
            arrival = sequence.request.arrival_seconds
            least = _SHORT_WAIT * (promised - arrival)
            correction = self.corrections[sequence.request.service]
            correction.saw(max(sequence.foreseen_seconds, least), max(now - arrival, least))

    def _steps_seconds(self, work: float, load: Load) -> float:
        """How long so much work on prompts takes beside the answers that run, in whole steps."""
        constant = self._forecast.cost.coefficients.step + load.answers.seconds
        longest = self._budgeter.longest_step_seconds(load.starts_seconds)
        if load.answers.requests:
            longest = min(longest, self._config.policy.token_target_seconds)
        return work + math.ceil(work / max(longest - constant, _LEAST_RATE * longest)) * constant

    def costs_others_more(self, sequence: Sequence, predicted: float, promised: float, now: float) -> bool:
        """Whether a request that could be in time, `predicted` before it is `promised`, is so dear that others would
        not be, for its sake.

        The more work it is beside its service's typical request, the less of its time others may be ahead of it. By the
        square root of that ratio: in proportion, dear requests are refused in each short burst that they would survive,
        and without it a queue that is always full refuses cheap and dear ones alike.
        """
        alone = self._forecast.alone_seconds(sequence)
        typical = max(self._shares.demand.typical_seconds[sequence.request.service], 1e-9)
        dearness = math.sqrt(max(1.0, self._forecast.whole_seconds(sequence) / typical))
        return (predicted - now - alone) * dearness > promised - now - alone

    def _ahead_of(self, sequence: Sequence, due: float, work: float) -> float:
        """Seconds of its service's work that come before a newcomer of so much work. Tenants take turns: of the
        others' work no more than their shares, beside what its own tenant has that its priority does not put behind."""
        request = sequence.request
        share, backlog = self._shares.services[request.service], self._backlogs[request.service]
        tenant = share.tenants.get(request.tenant)
        weight = share.weight_of(request.tenant)
        if tenant is None or not tenant.requests:
            return min(backlog.until(due), work * (share.active_weight + weight) / weight)
        ahead = own = 0.0
        for priority, level in backlog.levels.items():
            total = level.total
            # Whose work of a priority is due when is not known: each tenant's as all of it.
            part = min(max(tenant.backlog_seconds[priority], 0.0) / total, 1.0) if total else 0.0
            levels = priority - request.priority
            own_due = due + PRIORITY_SECONDS * levels
            # What is of a lower priority and overdue is due at its deadline, some time.
            before = level.until(own_due) if levels >= 0 or own_due > request.arrival_seconds else 0.0
            ahead += part * before + (1 - part) * level.until(due)
            own += part * (total if levels >= 0 else before)
        return min(ahead, (own + work) * share.active_weight / weight)
