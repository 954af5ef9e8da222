"""Shares of a busy engine: between services, and between the tenants of a service.

Each service and each tenant has a virtual time, which runs by the seconds of steps that were spent on it, divided by
its weight (start-time fair queueing: Goyal, Vin and Cheng, 1996). Whoever has nothing left waiting is moved up to the
others, so nobody saves up time while idle.

Services have targets of different lengths, so deadlines may decide between them within a window; a service that is
further ahead than that waits. Where no weights are set, it is ahead by its demand (`demand`), not by virtual time. The
tenants of a service take turns by their virtual times alone.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping

from shoplm.request import Service
from shoplm.scheduler.dearest import Dearest
from shoplm.scheduler.demand import Demand
from shoplm.scheduler.yielding import Yielding

WINDOW_SECONDS = 0.5  # of steps, for a service of average weight
_FEW_TENANTS = 64
_MOST_IDLE = 1024  # tenants without requests of a service whose lead is remembered


class Tenant:
    """One tenant of one service."""

    __slots__ = (
        "backlog_seconds",
        "dearest",
        "name",
        "planned_answers",
        "planned_keys",
        "requests",
        "service",
        "virtual",
        "waiting",
        "waiting_tokens",
        "weight",
        "yielding",
    )

    def __init__(self, name: str, service: ServiceShare, weight: float, virtual: float) -> None:
        self.name = name
        self.service = service
        self.weight = weight
        self.virtual = virtual
        self.requests = 0  # that have not ended
        self.backlog_seconds: defaultdict[int, float] = defaultdict(float)  # of work until first results, by priority
        self.waiting = 0  # requests that have yet to run for the first time
        self.waiting_tokens = 0
        self.planned_answers = self.planned_keys = 0  # of the step that is being planned
        self.yielding = Yielding()  # of these, who makes room in a full queue
        self.dearest = Dearest()  # of these, who may give way to cheaper ones

    def forget_waiting(self) -> None:
        """None of its requests waits: those that have left are kept alive no longer."""
        self.dearest = Dearest()


class ServiceShare:
    """One service and its tenants."""

    def __init__(self, service: Service, weight: float, tenant_weights: Mapping[str, float]) -> None:
        self.service = service
        self.weight = weight
        self.virtual = 0.0
        self.waiting = 0  # requests in the queue
        self.requests = 0  # that have not ended
        self.active_weight = 0.0  # of the tenants that have requests
        self.used_seconds = 0.0  # of steps, since the start
        self.tenants: dict[str, Tenant] = {}
        self.turn = 0.0  # virtual time at which newcomers begin
        self._weights = tenant_weights
        self._sweep_at = _FEW_TENANTS

    def join(self, name: str) -> Tenant:
        """The tenant of that name, with one request more."""
        tenant = self.tenants.get(name)
        if tenant is None:
            if len(self.tenants) >= self._sweep_at:
                self._drop_idle()
            tenant = self.tenants[name] = Tenant(name, self, self._weights.get(name, 1.0), self.turn)
        if not tenant.requests:
            tenant.virtual = max(tenant.virtual, self.turn)
            self.active_weight += tenant.weight
        tenant.requests += 1
        self.requests += 1
        return tenant

    def leave(self, tenant: Tenant) -> None:
        """One of its requests has ended."""
        tenant.requests -= 1
        self.requests -= 1
        if not tenant.requests:
            self.active_weight -= tenant.weight
            tenant.backlog_seconds.clear()
        if not self.requests:  # nobody is ahead of anybody: all begin anew, where the furthest was
            self.turn = max(self.turn, *(each.virtual for each in self.tenants.values()))
            self.tenants.clear()
            self.active_weight = 0.0

    def weight_of(self, name: str) -> float:
        """The weight of a tenant, whether it is here or not."""
        return self._weights.get(name, 1.0)

    def begin_turn(self, virtual_times: Iterable[float | None]) -> None:
        """Newcomers begin where the tenant that is furthest behind is, by the heads of the queues."""
        waiting = [virtual for virtual in virtual_times if virtual is not None]
        if waiting:
            self.turn = max(self.turn, min(waiting))

    def _drop_idle(self) -> None:
        """Forget tenants without requests, but for those that are the furthest ahead of the others."""
        leading = [each for each in self.tenants.values() if not each.requests and each.virtual > self.turn]
        leading = heapq.nlargest(_MOST_IDLE, leading, key=lambda each: each.virtual)
        busy = [each for each in self.tenants.values() if each.requests]
        self.tenants = {each.name: each for each in (*busy, *leading)}
        # Not again for each newcomer while most are in use.
        self._sweep_at = max(_FEW_TENANTS, 2 * len(self.tenants))


class Shares:
    """All services' shares."""

    def __init__(self, service_weights: Mapping[Service, float], tenant_weights: Mapping[str, float]) -> None:
        weights = {service: service_weights.get(service, 1.0) for service in Service}
        mean = sum(weights.values()) / len(weights)
        self.services = {
            service: ServiceShare(service, weight / mean, tenant_weights) for service, weight in weights.items()
        }
        self.demand = Demand()
        self.by_demand = not service_weights
        self._fixed = {service: weight / sum(weights.values()) for service, weight in weights.items()}

    def charge(self, tenant: Tenant, seconds: float) -> None:
        """A part of a step was planned for a tenant."""
        tenant.virtual += seconds / tenant.weight
        tenant.service.virtual += seconds / tenant.service.weight
        tenant.service.used_seconds += seconds

    def settle(self) -> None:
        """A step was planned: services that got all they asked for are moved up to those that wait."""
        services = self.services.values()
        wanting = [each.virtual for each in services if each.waiting]
        floor = min(wanting) if wanting else max(each.virtual for each in services)
        for each in services:
            if not each.waiting and each.virtual < floor:
                each.virtual = floor

    def ahead(self) -> frozenset[Service]:
        """Services that have had so much more than another one that waits, that they must wait now."""
        waiting = [service for service, each in self.services.items() if each.waiting]
        if not waiting:
            return frozenset()
        leads = self.demand.leads() if self.by_demand else {s: each.virtual for s, each in self.services.items()}
        bound = min(leads[service] for service in waiting) + WINDOW_SECONDS
        return frozenset(service for service, lead in leads.items() if lead > bound)

    def fractions(self) -> Mapping[Service, float]:
        """The shares of the services while all of them are busy."""
        return self.demand.shares() if self.by_demand else self._fixed
