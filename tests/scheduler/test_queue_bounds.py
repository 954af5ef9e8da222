"""What is refused on arrival, and who gives way in a full queue."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from scheduled_requests import DEEP, failed, finished, request, simulate
from shoplm.request import (
    FailedOutput,
    FailureKind,
    Generate,
    Predict,
    Select,
    Service,
    Task,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.sequence import Sequence


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"task": Generate(0)}, FailureKind.INVALID, "BAD_MAX_TOKENS"),
        ({"task": Select(1, 1, trie="unknown")}, FailureKind.INVALID, "UNKNOWN_TRIE"),
        ({"task": Generate(505)}, FailureKind.INVALID, "CONTEXT_EXCEEDED"),
        ({"tokens": token_ids(range(513))}, FailureKind.INVALID, "CONTEXT_EXCEEDED"),
        ({"tokens": token_ids(range(511)), "task": DEEP}, FailureKind.INVALID, "CONTEXT_EXCEEDED"),
        ({"tokens": token_ids(range(510)), "task": DEEP}, FailureKind.INVALID, "CACHE_EXCEEDED"),
        ({"task": Select(1, 33, trie="deep")}, FailureKind.INVALID, "BEAMS_EXCEED_STEP"),
        ({"task": Generate(300)}, FailureKind.INVALID, "CACHE_EXCEEDED"),
        ({"tokens": token_ids(range(250)), "task": DEEP}, FailureKind.INVALID, "CACHE_EXCEEDED"),
        ({"deadline_seconds": 1.0}, FailureKind.EXPIRED, "EXPIRED"),
    ],
)
def test_what_can_never_be_served_is_refused_on_arrival(
    changes: dict[str, Any], kind: FailureKind, reason: str
) -> None:
    simulation = simulate(pages=64)
    simulation.clock.now = 1.0
    good = request("r", range(8), Generate(4), arrival_seconds=1.0)
    simulation.submit(msgspec.structs.replace(good, **changes))
    simulation.run()
    simulation.step()
    assert (failed(simulation, "r").kind, failed(simulation, "r").reason) == (kind, reason)
    assert simulation.backend.batches == []
    # The same request without the fault is served.
    simulation.submit(msgspec.structs.replace(good, request_id="good"))
    simulation.run()
    finished(simulation, "good")


def test_the_queue_is_bounded_by_requests() -> None:
    simulation = simulate(SchedulerConfig(max_queued_requests=3))
    simulation.submit(*(request(f"r{i}", range(5), Predict(())) for i in range(5)))
    simulation.run()
    for i in range(3):
        finished(simulation, f"r{i}")
    for i in (3, 4):
        refused = failed(simulation, f"r{i}")
        assert (refused.kind, refused.reason) == (FailureKind.OVERLOADED, "QUEUE_FULL")
        assert refused.retry_seconds > 0
    assert simulation.engine.scheduler.stats.failures == {"prediction:overloaded": 2}


def test_the_queue_is_bounded_by_tokens() -> None:
    simulation = simulate(SchedulerConfig(max_queued_tokens=100))
    simulation.submit(request("a", range(60), Predict(())), request("b", range(41), Predict(())))
    simulation.submit(request("c", range(40), Predict(())))
    assert simulation.engine.scheduler.queued_tokens == 100
    simulation.run()
    assert failed(simulation, "b").reason == "QUEUE_TOKENS_FULL"
    finished(simulation, "a")
    finished(simulation, "c")
    assert simulation.engine.scheduler.queued_tokens == 0


@pytest.mark.parametrize("bound", ["requests", "tokens"])
@pytest.mark.parametrize("service", [Service.PREDICTION, Service.CHAT])
def test_a_full_queue_lets_in_who_has_less_than_its_share(bound: str, service: Service) -> None:
    limits = {"max_queued_requests": 8} if bound == "requests" else {"max_queued_tokens": 40}
    simulation = simulate(SchedulerConfig(**limits))
    flood = [request(f"f{i}", range(10 * i, 10 * i + 5), Predict(()), tenant="flood") for i in range(9)]
    simulation.submit(*flood)
    task: Task = Predict(()) if service is Service.PREDICTION else Generate(2)
    calm = [request(f"c{i}", range(500 + 10 * i, 505 + 10 * i), task, tenant="calm") for i in range(5)]
    simulation.submit(*calm, request("f9", range(300, 305), Predict(()), tenant="flood"))
    assert simulation.engine.scheduler.queued_requests == 8
    simulation.run()
    refused = [name for name in simulation.records if isinstance(simulation.records[name].end, FailedOutput)]
    # Half of the queue is the other's; the flood's newest made room, and what had waited longest stayed.
    assert sorted(refused) == ["c4", "f4", "f5", "f6", "f7", "f8", "f9"]
    assert {failed(simulation, name).kind for name in refused} == {FailureKind.OVERLOADED}
    same_service = service is Service.PREDICTION
    assert (failed(simulation, "f7").reason == "TENANT_QUEUE_FULL") == same_service
    for name in ("f0", "f3", "c0", "c3"):
        finished(simulation, name)
    simulation.check_idle()


@pytest.mark.parametrize("bound", ["requests", "tokens"])
def test_a_full_queue_gives_up_the_newest_of_the_lowest_priority_of_the_same_tenant(bound: str) -> None:
    limits = {"max_queued_requests": 6} if bound == "requests" else {"max_queued_tokens": 30}
    simulation = simulate(SchedulerConfig(**limits))
    priorities = {"a": -1, "b": -2, "c": -2, "d": 0}
    for number, (name, priority) in enumerate(priorities.items()):
        simulation.submit(request(name, range(10 * number, 10 * number + 5), Predict(()), priority=priority))
    simulation.submit(*(request(f"other {i}", range(200 + i, 205 + i), Predict(()), tenant="o") for i in range(2)))
    for number, name in enumerate(("e", "f", "g")):
        simulation.submit(request(name, range(300 + 10 * number, 305 + 10 * number), Predict(())))
    # "e", "f" and "g" are of the same priority as "d": three others had a lower one.
    simulation.submit(request("same", range(400, 405), Predict(())))
    simulation.submit(request("large", range(500, 530), Predict(()), priority=1))
    assert simulation.engine.scheduler.queued_requests == 6
    outputs = simulation.step()
    ends = [output.request_id for output in outputs if isinstance(output, FailedOutput)]
    assert ends == ["c", "b", "a", "same", "large" if bound == "tokens" else "g"]
    assert {failed(simulation, name).reason for name in ("a", "b", "c")} == {
        "QUEUE_FULL" if bound == "requests" else "QUEUE_TOKENS_FULL"
    }
    simulation.run()
    for name in ("d", "e", "f", "other 0", "other 1"):
        finished(simulation, name)
    simulation.check_idle()


def test_who_finds_the_queue_full_counts_as_asked_for() -> None:
    simulation = simulate(SchedulerConfig(max_queued_requests=10))
    simulation.submit(*(request(f"r{i}", range(10 + i), Predict(())) for i in range(100)))
    demand = simulation.engine.scheduler.shares.demand
    assert demand._asked[Service.PREDICTION] == pytest.approx(100)
    assert demand._seen[Service.PREDICTION] == 10  # whose work was looked at


def test_whoever_is_turned_away_costs_no_look_at_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(SchedulerConfig(max_queued_requests=2))
    simulation.submit(request("first", range(10), Predict(())), request("second", range(10), Predict(())))
    looked_up: list[Sequence] = []
    monkeypatch.setattr(simulation.engine.scheduler.memory, "look_up", looked_up.append)
    simulation.clock.now = 1.0
    simulation.engine.submit(request("first", range(10), Predict(())))
    simulation.submit(
        request("full", range(10), Predict(())),
        request("expired", range(10), Predict(()), deadline_seconds=0.5),
        request("too long", range(600), Predict(())),
    )
    refused = [output for output in simulation.engine.step() if isinstance(output, FailedOutput)]
    reasons = ["DUPLICATE_REQUEST", "QUEUE_FULL", "EXPIRED", "CONTEXT_EXCEEDED"]
    assert [output.reason for output in refused] == reasons
    assert looked_up == []
