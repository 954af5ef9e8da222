"""The step loop: failures of steps, what a cancellation frees, and the report."""

from __future__ import annotations

import pytest
from shoplm.request import (
    FailedOutput,
    FailureKind,
    FinishedOutput,
    Generate,
    Predict,
    Request,
    Select,
    Service,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig
from simulation import CheckingBackend, Clock, CostCurve, Simulation


def chat(name: str, length: int = 8, tokens: int = 6) -> Request:
    start = 1000 * (1 + sum(map(ord, name)))
    return Request(name, Service.CHAT, token_ids(range(start, start + length)), Generate(tokens), 0.0)


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_a_step_that_fails_takes_its_own_requests_with_it(pipeline_depth: int) -> None:
    backend = CheckingBackend(Clock(), pipeline_depth=pipeline_depth)
    simulation = Simulation(backend, SchedulerConfig(max_step_tokens=32, max_queued_requests=50))
    simulation.submit(chat("a"), chat("b"))
    for _ in range(4):
        simulation.step()
    # "c" is on its way while the step of "a" and "b" fails; it is not in that step.
    backend.broken_steps.add(len(backend.batches))
    simulation.step()
    simulation.submit(chat("c"))
    simulation.run()
    for name in "ab":
        end = simulation.records[name].end
        assert isinstance(end, FailedOutput)
        assert (end.kind, end.reason) == (FailureKind.INTERNAL, "ENGINE_FAILURE")
        assert "RuntimeError" in end.message
        simulation.check_answer(name)
    assert isinstance(simulation.records["c"].end, FinishedOutput)
    simulation.check_answer("c")
    simulation.check_idle()


def test_what_a_failed_step_should_have_written_is_not_shared() -> None:
    backend = CheckingBackend(Clock())
    simulation = Simulation(backend)
    backend.broken_steps.add(0)
    simulation.submit(chat("a", length=30))
    simulation.run()
    assert simulation.engine.scheduler.memory.tree.idle == 0
    simulation.check_idle()


def test_the_third_failure_in_a_row_ends_the_engine() -> None:
    backend = CheckingBackend(Clock())
    simulation = Simulation(backend)
    backend.broken_steps.update((0, 1, 3, 4, 5))
    for name in "ab":
        simulation.submit(chat(name, tokens=1))
        simulation.run()
    simulation.submit(chat("good", tokens=1))  # a step that works: the count starts again
    simulation.run()
    for name in "cd":
        simulation.submit(chat(name, tokens=1))
        simulation.run()
    simulation.submit(chat("e", tokens=1))
    with pytest.raises(RuntimeError, match="told to fail"):
        simulation.run()


def test_two_steps_are_in_flight_when_the_backend_can_take_them() -> None:
    """The device is never idle between two steps: its time is the sum of its steps."""
    cost = CostCurve(step_seconds=1.0, token_seconds=0.0)
    ends = {}
    for depth in (1, 2):
        backend = CheckingBackend(Clock(), pipeline_depth=depth, cost=cost)
        simulation = Simulation(backend)
        simulation.submit(chat("a", tokens=10))
        submitted_ahead = 0
        while not simulation.engine.is_idle:
            simulation.step()
            submitted_ahead = max(submitted_ahead, len(backend.batches) - backend.taken)
        ends[depth] = simulation.clock.now
        assert submitted_ahead == depth - 1
        simulation.check_answer("a")
    assert ends == {1: 10.0, 2: 10.0}


def test_the_report_counts_what_happened_and_starts_again() -> None:
    backend = CheckingBackend(Clock(), cost=CostCurve(step_seconds=0.5, token_seconds=0.0))
    simulation = Simulation(backend)
    simulation.submit(
        chat("chat", length=8, tokens=3),
        Request("select", Service.RECOMMENDATION, token_ids(range(8)), Select(2, 4, trie="deep"), 0.0),
        Request("predict", Service.PREDICTION, token_ids(range(50, 59)), Predict(()), 0.0),
    )
    refused = Request("refused", Service.CHAT, token_ids([1]), Generate(0), 0.0)
    simulation.submit(refused)
    queued = simulation.engine.report()
    assert queued.queued_requests == {"recommendation": 1, "chat": 1, "prediction": 1}
    assert (queued.queued_tokens, queued.failures) == (25, {"chat:invalid": 1})
    simulation.run()
    report = simulation.engine.report()
    assert report.step_seconds == (0.5, 0.5, 0.5)
    assert report.tokens == {"chat": 8 + 2, "recommendation": 8 + 2 * 4, "prediction": 9}
    assert report.rows == {"chat": 3, "recommendation": 3, "prediction": 1}
    assert report.mixed_steps == 3
    assert report.prefix_query_tokens == 25
    assert {service: len(values) for service, values in report.total_seconds.items()} == {
        "chat": 1,
        "recommendation": 1,
        "prediction": 1,
    }
    assert report.inter_token_seconds == ((0.5, 1), (0.5, 1))
    assert report.pages_used == 0 and report.pages_cached + report.pages_free == 64
    assert set(report.running_requests.values()) == {0}
    again = simulation.engine.report()
    assert (again.step_seconds, again.tokens, again.prefix_query_tokens, again.failures) == ((), {}, 0, {})
