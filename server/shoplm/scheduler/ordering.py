"""Who comes next: the queue of requests that wait, and the rank of prompts beside it.

By slack: what can still be on time comes before what is late, by when it is due; late work gets what is left, oldest
first, and a share of its own, so that it never starves. So does what has missed its target and is due at a later
deadline, once half of its time is over. Services that are ahead of their share come last; the tenants of a service take
turns. Requests whose prefix is cached are due a little earlier: served now, it need not be computed again. By arrival:
first come, first served.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from itertools import count
from typing import Protocol

from shoplm.lazy_heap import mostly_gone
from shoplm.request import Service
from shoplm.scheduler.fairness import ServiceShare, Shares, Tenant
from shoplm.scheduler.forecast import Forecast
from shoplm.scheduler.sequence import Sequence

PRIORITY_SECONDS = 10.0  # by which one level of priority is due earlier, among the requests of a tenant
LATE_SHARE = 0.15  # of the time, for late work while work that can be on time would take all of it
PATIENT_SHARE = 0.15  # the same for what has waited for half of its time, while work that is due before it would
_MOST_CREDIT_SECONDS = 0.2
_MOST_AFFINITY_SECONDS = 0.25


class Order(Protocol):
    """What the scheduler asks of an order."""

    def push(self, sequence: Sequence) -> None:
        """A request begins to wait."""
        ...

    def drop(self, sequence: Sequence) -> None:
        """A request waits no more: it was started or has ended."""
        ...

    def open(self, now: float) -> None:
        """A step is being planned."""
        ...

    def peek(self, now: float) -> Sequence | None:
        """Who is to be started next."""
        ...

    def hold(self, sequence: Sequence) -> None:
        """It cannot be started in this step, and nobody of its service overtakes it."""
        ...

    def before(self, one: Sequence, other: Sequence) -> bool:
        """Whether `one` comes before `other`, each a running prompt or whom `peek` returned."""
        ...

    def overdue(self, sequence: Sequence, now: float) -> bool:
        """Whether it has missed what it was due at; it is ordered by its deadline then, or as late work."""
        ...

    def has_credit(self, sequence: Sequence) -> bool:
        """Whether it has missed its target and waited for half of its time, and comes first by the share of such."""
        ...

    def spent(self, seconds: Mapping[Tenant, float], late_seconds: float, credited_seconds: float) -> None:
        """Seconds of a step, by whom they were given to; how many of them went to late work, and to who had credit."""
        ...


class ArrivalOrder:
    """First come, first served."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._tickets = count(1)
        self._held = False

    def push(self, sequence: Sequence) -> None:
        sequence.ticket = next(self._tickets)
        heapq.heappush(self._heap, (sequence.request.arrival_seconds, sequence.ticket, sequence))

    def drop(self, sequence: Sequence) -> None:
        sequence.ticket = 0

    def open(self, now: float) -> None:
        self._held = False

    def peek(self, now: float) -> Sequence | None:
        return None if self._held else _head(self._heap)

    def hold(self, sequence: Sequence) -> None:
        self._held = True

    def before(self, one: Sequence, other: Sequence) -> bool:
        return one.request.arrival_seconds < other.request.arrival_seconds

    def overdue(self, sequence: Sequence, now: float) -> bool:
        return False

    def has_credit(self, sequence: Sequence) -> bool:
        return False

    def spent(self, seconds: Mapping[Tenant, float], late_seconds: float, credited_seconds: float) -> None:
        """Nobody has a share."""


class SlackOrder:
    """By slack, within shares."""

    def __init__(self, shares: Shares, forecast: Forecast, moved: Callable[[Sequence], None]) -> None:
        """`moved` is told of a request that is due at another time now, or late."""
        self._shares = shares
        self._moved = moved
        self._forecast = forecast
        self._tickets = count(1)
        self._timely = {service: _Turns(share) for service, share in shares.services.items()}
        self._late = {service: _Turns(share) for service, share in shares.services.items()}
        self._patient = {service: _Turns(share) for service, share in shares.services.items()}  # timely ones, too
        self._late_credit = 0.0  # seconds of steps that late work is owed
        self._patient_credit = 0.0  # the same of those that have waited for half of their time
        self._now = 0.0  # when the step is planned
        self._ahead: frozenset[Service] = frozenset()
        self._held: set[Service] = set()

    def push(self, sequence: Sequence) -> None:
        request = sequence.request
        sequence.ticket = next(self._tickets)
        earlier = PRIORITY_SECONDS * request.priority
        if sequence.is_late or sequence.limit_seconds is None:  # to be found late wherever it stands among the timely
            self._late[request.service].push(sequence, request.arrival_seconds - earlier)
        elif sequence.patient_until < math.inf:
            self._patient[request.service].push(sequence, sequence.patient_until)
        if not sequence.is_late:
            cached = self._forecast.cost.work_seconds(sequence.expected_cached, 0, 0)
            earlier += min(cached, _MOST_AFFINITY_SECONDS)
            self._timely[request.service].push(sequence, sequence.due_seconds - earlier)

    def drop(self, sequence: Sequence) -> None:
        sequence.ticket = 0

    def open(self, now: float) -> None:
        self._now = now
        self._shares.settle()
        self._ahead = self._shares.ahead()
        self._held.clear()
        for service, share in self._shares.services.items():
            if not share.waiting:
                for turns in (self._timely, self._patient, self._late):
                    turns[service].clear()

    def peek(self, now: float) -> Sequence | None:
        best: Sequence | None = None
        self._ahead = self._shares.ahead()
        for service, share in self._shares.services.items():
            if not share.waiting or service in self._held:
                continue
            timely, patient, late = self._timely[service], self._patient[service], self._late[service]
            for head in (self._head(timely, now), patient.head(), self._head(late, now)):
                if head is not None and (best is None or self.before(head, best)):
                    best = head
            share.begin_turn((timely.virtual, patient.virtual, late.virtual))
        return best

    def hold(self, sequence: Sequence) -> None:
        self._held.add(sequence.request.service)

    def before(self, one: Sequence, other: Sequence) -> bool:
        left, right = self._rank(one), self._rank(other)
        levels = one.request.priority - other.request.priority
        if levels and one.request.tenant == other.request.tenant and left[0] == right[0]:
            # Priorities count among the requests of one tenant only.
            if left[1] == right[1]:
                return left[2] - PRIORITY_SECONDS * levels < right[2]
            if (one if levels > 0 else other).is_late:  # it has missed its target, not its place
                return levels > 0
        return left < right

    def _rank(self, sequence: Sequence) -> tuple[bool, int, float]:
        arrival = sequence.request.arrival_seconds
        if sequence.is_late:
            place, moment = (0, arrival) if self._late_credit > 0 else (2, arrival)
        else:
            place, moment = (0, arrival) if self.has_credit(sequence) else (1, sequence.due_seconds)
        ahead = sequence.request.service in self._ahead
        if ahead and self._shares.by_demand:
            # What was begun has been counted whole: held back, it would wait for others to begin as much.
            ahead = place > 0 and sequence.state_slot is None and not sequence.epoch
        return ahead, place, moment

    def has_credit(self, sequence: Sequence) -> bool:
        return sequence.patient_until <= self._now and self._patient_credit > 0

    def overdue(self, sequence: Sequence, now: float) -> bool:
        limit = sequence.limit_seconds
        if sequence.is_late or self._forecast.can_be_on_time(sequence, now):
            return False
        if limit is None:
            sequence.is_late = True
        elif limit > sequence.due_seconds:
            sequence.due_seconds = limit
            sequence.patient_until = 0.5 * (sequence.request.arrival_seconds + limit)
        else:
            return False  # a lost cause, which is the scheduler's to give up
        self._moved(sequence)
        return True

    def spent(self, seconds: Mapping[Tenant, float], late_seconds: float, credited_seconds: float) -> None:
        for tenant, part in seconds.items():
            self._shares.charge(tenant, part)
        total = sum(seconds.values())
        self._late_credit = _bounded(self._late_credit + LATE_SHARE * total - late_seconds)
        self._patient_credit = _bounded(self._patient_credit + PATIENT_SHARE * total - credited_seconds)

    def _head(self, turns: _Turns, now: float) -> Sequence | None:
        """The first that is in its place: one that has missed its target is due at its deadline, or is late."""
        while (head := turns.head()) is not None and self.overdue(head, now):
            self.push(head)
        return head


class _Turns:
    """Tenants of one service that have requests of one kind waiting, by their virtual times."""

    def __init__(self, share: ServiceShare) -> None:
        self._share = share
        self._tenants: list[tuple[float, int, Tenant]] = []
        self._queues: dict[Tenant, list[tuple[float, int, Sequence]]] = {}
        self._tie = count()

    def push(self, sequence: Sequence, key: float) -> None:
        tenant = sequence.tenant
        assert tenant is not None, "a request that waits has a tenant"
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = []
            tenant.virtual = max(tenant.virtual, self._share.turn)
            heapq.heappush(self._tenants, (tenant.virtual, next(self._tie), tenant))
        heapq.heappush(queue, (key, sequence.ticket, sequence))
        if mostly_gone(len(queue), self._share.waiting):  # far deadlines of who has gone never come up
            queue[:] = [entry for entry in queue if entry[2].ticket == entry[1]]
            heapq.heapify(queue)

    def clear(self) -> None:
        """Nobody waits: forget who did."""
        self._tenants.clear()
        self._queues.clear()

    def head(self) -> Sequence | None:
        """The first request of the tenant whose turn it is."""
        while self._tenants:
            virtual, _, tenant = self._tenants[0]
            head = _head(self._queues[tenant])
            if head is None:
                heapq.heappop(self._tenants)
                del self._queues[tenant]
            elif tenant.virtual > virtual:
                heapq.heapreplace(self._tenants, (tenant.virtual, next(self._tie), tenant))
            else:
                return head
        return None

    @property
    def virtual(self) -> float | None:
        """Virtual time of the tenant whose turn it is, as of the last `head`; None: nobody waits."""
        return self._tenants[0][0] if self._tenants else None


def _bounded(credit_seconds: float) -> float:
    return min(max(credit_seconds, -_MOST_CREDIT_SECONDS), _MOST_CREDIT_SECONDS)


def _head(heap: list[tuple[float, int, Sequence]]) -> Sequence | None:
    """The first entry that is still in its place; entries that are not are dropped."""
    while heap and heap[0][2].ticket != heap[0][1]:
        heapq.heappop(heap)
    return heap[0][2] if heap else None
