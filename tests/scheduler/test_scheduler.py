"""What the scheduler puts into steps, and how requests end."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from scheduled_requests import DEEP, computed_tokens, failed, finished, request, simulate
from shoplm.request import (
    FailedOutput,
    FailureKind,
    FinishedOutput,
    Generate,
    Predict,
    Select,
    Service,
    TokensOutput,
    by_request,
)
from shoplm.scheduler.config import SchedulerConfig
from simulation import CostCurve, expected_answer


def test_an_answer_of_which_the_caller_has_all_it_wanted_counts_as_finished() -> None:
    simulation = simulate()
    simulation.submit(request("chat", range(20), Generate(200)))
    while len(simulation.records["chat"].tokens) < 5:
        simulation.step()
    simulation.engine.cancel("chat", answered=True)
    simulation.engine.cancel("chat", answered=True)  # the end was under way
    simulation.step()
    end = simulation.records["chat"].end
    assert isinstance(end, FinishedOutput) and 5 <= end.completion_tokens == len(simulation.records["chat"].tokens)
    assert not any(simulation.engine.scheduler.stats.failures.values())
    simulation.check_idle()


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_prompts_never_starve_answers(pipeline_depth: int) -> None:
    config = SchedulerConfig(max_step_tokens=64, max_mixed_prompt_tokens=16)
    simulation = simulate(config, pages=2_000, pipeline_depth=pipeline_depth)
    simulation.submit(request("chat", range(10), Generate(60)))
    while not simulation.records["chat"].tokens:
        simulation.step()
    long_prompts = [request(f"long {i}", range(1000 * (i + 1), 1000 * (i + 1) + 300), DEEP) for i in range(12)]
    simulation.submit(*long_prompts)
    started = len(simulation.backend.batches)
    while simulation.records["chat"].end is None:
        simulation.step()
    steps = simulation.records["chat"].token_steps
    # A token in each step; only the first may wait for steps that were in flight.
    assert max(after - before for before, after in itertools.pairwise(steps[1:])) == 1
    mixed = simulation.backend.batches[started:]
    # A searching request adds its lanes to the chat's token and the prompts' share.
    assert max(len(batch.tokens) for batch in mixed) <= 16 + 1 + 12 * 5
    assert sum(len(batch.tokens) for batch in mixed) > 10 * len(steps)  # and the prompts got on meanwhile
    simulation.run()
    for long_prompt in long_prompts:
        finished(simulation, long_prompt.request_id)


def test_a_search_as_wide_as_a_step_gets_its_turn_among_answers() -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=8, max_mixed_prompt_tokens=4), pages=200)
    simulation.submit(*(request(f"chat {i}", [i], Generate(30)) for i in range(4)))
    simulation.submit(request("wide", range(50, 60), Select(3, 8, trie="deep")))
    simulation.run(200)
    finished(simulation, "wide")


def test_whoever_is_due_first_is_served_first() -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=16))
    simulation.submit(
        request("chat", range(100, 116), Generate(1)),  # due at 0.5
        request("recommendation", range(200, 216), Select(1, 1, trie="flat")),  # at 0.1
        request("prediction", range(300, 316), Predict(())),  # at 0.05
        request("hurried", range(400, 416), Generate(1), deadline_seconds=0.04),
        request("important", range(500, 516), Generate(1), priority=1),
    )
    simulation.run()
    ends = {name: finished(simulation, name).timings.total_seconds for name in simulation.records}
    assert sorted(ends, key=ends.__getitem__) == ["important", "hurried", "prediction", "recommendation", "chat"]


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_the_time_in_the_queue_ends_before_the_first_step(pipeline_depth: int) -> None:
    curve = CostCurve(step_seconds=1.0, token_seconds=0.0)
    simulation = simulate(SchedulerConfig(max_step_tokens=16), cost=curve, pipeline_depth=pipeline_depth)
    simulation.submit(request("alone", range(64), Predict(())))
    simulation.run()
    alone = finished(simulation, "alone").timings
    assert (alone.queue_seconds, alone.first_seconds) == (0.0, 4.0)
    # Whoever comes while the step is full waits, and the metric says the same as the answer.
    simulation.submit(*(request(f"r{i}", range(100 * i, 100 * i + 16), Generate(1)) for i in range(2, 4)))
    arrived = simulation.clock.now
    simulation.run()
    waits = [finished(simulation, f"r{i}").timings.queue_seconds - arrived for i in range(2, 4)]
    assert waits == ([0.0, 1.0] if pipeline_depth == 1 else [0.0, 0.0])
    queued = simulation.engine.scheduler.stats.queue_seconds
    assert (queued[Service.PREDICTION], sum(queued[Service.CHAT])) == ([0.0], sum(waits) + 2 * arrived)


def test_a_step_is_no_larger_than_its_budget() -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=12, max_mixed_prompt_tokens=12), pages=300)
    simulation.submit(*(request(f"r{i}", range(100 * i, 100 * i + 30), DEEP) for i in range(8)))
    simulation.submit(*(request(f"c{i}", range(100 * i, 100 * i + 30), Generate(9)) for i in range(8)))
    simulation.run()
    assert max(len(batch.tokens) for batch in simulation.backend.batches) == 12
    for name in simulation.records:
        finished(simulation, name)


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_popularity_alone_needs_no_beams_however_deep_the_trie(pipeline_depth: int) -> None:
    simulation = simulate(pipeline_depth=pipeline_depth)
    simulation.submit(request("empty", range(5), Select(3, 7, trie="deep", popularity_only=True)))
    simulation.run()
    assert finished(simulation, "empty").selected is not None
    assert computed_tokens(simulation) == 5


def test_an_id_that_is_in_use_is_refused_and_its_owner_is_not_disturbed() -> None:
    simulation = simulate()
    simulation.submit(request("same", range(10), Generate(5)))
    simulation.engine.submit(request("same", range(20, 30), Generate(2)))
    outputs = [output for _ in range(10) for output in simulation.engine.step()]
    refused, *others = outputs
    assert isinstance(refused, FailedOutput)
    assert (refused.kind, refused.reason) == (FailureKind.INVALID, "DUPLICATE_REQUEST")
    tokens = [token for output in by_request(others) if isinstance(output, TokensOutput) for token in output.tokens]
    assert tuple(tokens) == expected_answer(simulation.records["same"].request)
    assert isinstance(others[-1], FinishedOutput)
    # The id is free again.
    simulation.engine.submit(request("same", range(10), Predict(())))
    assert any(isinstance(output, FinishedOutput) for _ in range(3) for output in simulation.engine.step())


def test_expired_work_is_dropped_wherever_it_is() -> None:
    config = SchedulerConfig(max_step_tokens=8, max_mixed_prompt_tokens=8)
    simulation = simulate(config, state_slots=1, cost=CostCurve(step_seconds=0.1, token_seconds=0.0))
    simulation.submit(request("runs", range(8), Generate(50), deadline_seconds=1.05))
    simulation.submit(request("waits", range(8), Generate(50), deadline_seconds=1.06))
    # Due later than the chats, whose answers are long: it takes the only state slot after them.
    simulation.submit(request("prediction", range(8), Predict(())))
    simulation.run()
    assert "while it ran" in failed(simulation, "runs").message
    assert len(simulation.records["runs"].tokens) == 11  # one each 0.1 s, the last just after the deadline
    assert "in the queue" in failed(simulation, "waits").message
    assert {failed(simulation, name).kind for name in ("runs", "waits")} == {FailureKind.EXPIRED}
    finished(simulation, "prediction")
    simulation.check_idle()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SchedulerConfig)][:4])
def test_a_bound_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        dataclasses.replace(SchedulerConfig(), **{name: 0})  # type: ignore[arg-type]
