"""What is remembered of tenants: no more than their shares need."""

from __future__ import annotations

import gc

import pytest
from shoplm.request import Predict, Request, Service, token_ids
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.fairness import Shares
from shoplm.scheduler.scheduler import Scheduler
from shoplm.scheduler.sequence import Sequence


class Shop:
    """A scheduler whose steps take 10 ms."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(),
            pages=400,
            page_size=16,
            state_slots=64,
            max_context_tokens=1024,
            trie_depths={"": 1},
            lanes=lambda select: 0,
        )
        self.now = 0.0
        self.number = 0

    def ask(self, tenant: str) -> None:
        self.number += 1
        tokens = token_ids([self.number % 997, *range(30)])
        request = Request(f"r{self.number}", Service.PREDICTION, tokens, Predict((0.5,)), self.now, tenant=tenant)
        self.scheduler.admit(request, self.now)

    def step(self) -> bool:
        plan = self.scheduler.plan(self.now)
        if not plan.load.rows:
            return False
        self.now += 0.01
        self.scheduler.commit(plan, [(0.5,)] * len(plan.rows), self.now)
        self.scheduler.drain_outputs()
        return True


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    shop = Shop()
    before = _sequences()
    for tenant in ("a", "b", "a", "c"):
        for _ in range(5):
            shop.ask(tenant)
        assert _sequences() == before + 5
        while shop.step():
            pass
        assert _sequences() == before


def test_who_left_a_long_queue_is_forgotten_before_the_turn_comes() -> None:
    """Deadlines of an hour: their entries would come up in an hour."""
    shop = Shop()
    for _ in range(300):
        shop.ask("a")
    before = _sequences()
    for _ in range(20):
        for _ in range(100):
            shop.ask("b")
            shop.scheduler.cancel(f"r{shop.number}")
        shop.scheduler.drain_outputs()
    assert _sequences() < before + 2 * 300 + 100


def _sequences() -> int:
    gc.collect()
    return sum(type(each) is Sequence for each in gc.get_objects())


def test_tenants_who_come_one_after_the_other_are_forgotten() -> None:
    shop = Shop()
    share = shop.scheduler.shares.services[Service.PREDICTION]
    for number in range(300):
        shop.ask(f"tenant {number}")
        while shop.step():
            pass
        assert len(share.tenants) == 0
    assert share.turn > 0.0


def test_of_tenants_without_requests_those_furthest_ahead_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoplm.scheduler.fairness._MOST_IDLE", 10)
    shares = Shares({}, {})
    share = shares.services[Service.CHAT]
    share.join("always here")
    for number in range(1000):
        tenant = share.join(f"tenant {number}")
        shares.charge(tenant, 5.0 if number % 100 == 0 else 0.01)
        share.leave(tenant)
    assert len(share.tenants) <= 64
    assert {"always here", *(f"tenant {number}" for number in range(0, 1000, 100))} <= share.tenants.keys()
    assert share.join("tenant 100").virtual == 5.0


def test_who_was_ahead_begins_beside_newcomers_once_nobody_is_left() -> None:
    shares = Shares({}, {})
    share = shares.services[Service.CHAT]
    first, second = share.join("first"), share.join("second")
    shares.charge(first, 3.0)
    share.leave(first)
    assert share.join("first").virtual == 3.0  # the second is still here
    share.leave(first)
    share.leave(second)
    assert share.join("first").virtual == share.join("newcomer").virtual == 3.0
    assert share.active_weight == 2.0
