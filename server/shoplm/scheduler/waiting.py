"""The queue's bounds, and how services and tenants share them while it is full.

A full queue lets in who has less than a share of it: a request of whoever is furthest above its own share gives way,
of these the lowest priority first and the newest of it. So nobody who floods the queue locks out another. The share of
a tenant is that of its service among those that wait, and its own among the tenants of the service that wait, by their
weights. Who has no share left may still take the place of requests of lower priority of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.fairness import ServiceShare, Shares, Tenant
from shoplm.scheduler.sequence import Sequence


class WaitingRoom:
    """Counts the requests that have yet to run. Who was preempted has been let in for good and counts no more."""

    def __init__(self, config: SchedulerConfig, shares: Shares) -> None:
        self._most_requests, self._most_tokens = config.max_queued_requests, config.max_queued_tokens
        self._shares = shares
        self._tenants: dict[Tenant, None] = {}  # who has somebody that waits, in the order in which they came
        self.requests = 0
        self.tokens = 0

    def enter(self, sequence: Sequence) -> None:
        """A request begins to wait; its tenant is known."""
        if sequence.epoch:
            return
        tenant = _tenant(sequence)
        sequence.queued_tokens = len(sequence.tokens)
        self.requests += 1
        self.tokens += sequence.queued_tokens
        self._tenants[tenant] = None
        tenant.waiting += 1
        tenant.waiting_tokens += sequence.queued_tokens
        tenant.yielding.enter(sequence)
        if sequence.limit_seconds is not None:  # nobody else is refused by time
            tenant.dearest.push(sequence, tenant.waiting)

    def leave(self, sequence: Sequence) -> None:
        """It waits no more."""
        if not sequence.queued_tokens:
            return
        tenant = _tenant(sequence)
        self.requests -= 1
        self.tokens -= sequence.queued_tokens
        tenant.waiting -= 1
        tenant.waiting_tokens -= sequence.queued_tokens
        tenant.yielding.leave(sequence)
        sequence.queued_tokens = 0
        if not tenant.waiting:
            del self._tenants[tenant]
            tenant.forget_waiting()

    def has_room(self, tokens: int) -> bool:
        """Whether a request of so many tokens fits beside those that wait."""
        return self.requests < self._most_requests and self.tokens + tokens <= self._most_tokens

    def may_displace(self, sequence: Sequence) -> bool:
        """Whether a newcomer to a full queue has less than its share of it, so that others have more than theirs, or
        its tenant has enough there that is of lower priority."""
        return self._has_share_left(sequence) or self._outranks(sequence)

    def _has_share_left(self, sequence: Sequence) -> bool:
        service = self._shares.services[sequence.request.service]
        tenant = service.tenants.get(sequence.request.tenant)
        waiting, tokens = (tenant.waiting, tenant.waiting_tokens) if tenant is not None else (0, 0)
        share = self._fractions(service, sequence.request.tenant)[service, sequence.request.tenant]
        fits = waiting + 1 <= share * self._most_requests
        return fits and tokens + len(sequence.tokens) <= share * self._most_tokens

    def _outranks(self, sequence: Sequence) -> bool:
        tenant = self._shares.services[sequence.request.service].tenants.get(sequence.request.tenant)
        requests, tokens = (0, 0) if tenant is None else tenant.yielding.below(sequence.request.priority)
        fits = self.requests - requests < self._most_requests
        return fits and self.tokens - tokens + len(sequence.tokens) <= self._most_tokens

    def is_shared(self, sequence: Sequence) -> bool:
        """Whether other tenants of the service wait, too."""
        request = sequence.request
        return any(each.service.service is request.service and each.name != request.tenant for each in self._tenants)

    def dearest(self, sequence: Sequence) -> Sequence | None:
        """Of the requests of a newcomer's service and tenant that wait and have a deadline, the most work."""
        tenant = self._shares.services[sequence.request.service].tenants.get(sequence.request.tenant)
        return None if tenant is None else tenant.dearest.peek()

    def displaced(self, sequence: Sequence) -> Iterator[Sequence]:
        """Who gives way to a newcomer that may displace others; each must leave before the next is asked for."""
        service, name = self._shares.services[sequence.request.service], sequence.request.tenant
        among_own = not self._has_share_left(sequence)
        while not self.has_room(len(sequence.tokens)):
            victim = service.tenants[name] if among_own else self._furthest_above(service, name)
            yield victim.yielding.first()

    def _furthest_above(self, service: ServiceShare, name: str) -> Tenant:
        """Who has the most of the queue beside its share, once the named tenant has one."""
        by_tokens = self.requests < self._most_requests
        shares = self._fractions(service, name)
        most, victim = 0.0, None
        for each in self._tenants:
            used = each.waiting_tokens if by_tokens else each.waiting
            over = used / shares[each.service, each.name]
            if over > most:
                most, victim = over, each
        assert victim is not None, "a full queue has somebody who waits"
        return victim

    def _fractions(self, service: ServiceShare, name: str) -> dict[tuple[ServiceShare, str], float]:
        """The shares of all who wait, and of the named tenant; they add up to 1."""
        weights = {(each.service, each.name): each.weight for each in self._tenants}
        weights[service, name] = service.weight_of(name)
        of_services: dict[ServiceShare, float] = {}
        for (owner, _), weight in weights.items():
            of_services[owner] = of_services.get(owner, 0.0) + weight
        total = sum(owner.weight for owner in of_services)
        return {key: weight / of_services[key[0]] * key[0].weight / total for key, weight in weights.items()}


def _tenant(sequence: Sequence) -> Tenant:
    assert sequence.tenant is not None, "a request that waits has a tenant"
    return sequence.tenant
