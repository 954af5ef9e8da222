"""Prompts that begin alike: computed once, found in the cache, and waited for by whoever needs the same pages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from scheduled_requests import DEEP, PAGE_SIZE, computed_tokens, failed, finished, request, simulate
from shoplm.request import (
    Embed,
    FailureKind,
    Generate,
    Predict,
    Select,
    Task,
)
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import MIN_SAMPLES, Coefficients
from simulation import expected_answer


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_the_same_prefix_is_computed_once_however_many_ask_at_once(pipeline_depth: int) -> None:
    simulation = simulate(pages=64, pipeline_depth=pipeline_depth)
    history = list(range(100))
    tasks: list[Task] = [Predict(()), Select(1, 1, trie="flat"), Embed(), Predict(()), Generate(1)]
    simulation.submit(*(request(f"r{i}", [*history, 900 + i, 901], task) for i, task in enumerate(tasks)))
    simulation.run()
    assert computed_tokens(simulation) == 100 + 2 * len(tasks)
    for name in simulation.records:
        finished(simulation, name)
    simulation.check_idle()


def test_a_later_request_finds_the_prefix_and_says_so() -> None:
    simulation = simulate()
    simulation.submit(request("first", range(41), Predict(())))
    simulation.run()
    simulation.submit(request("second", [*range(41), 77], DEEP))
    simulation.run()
    assert finished(simulation, "first").cached_tokens == 0
    assert finished(simulation, "second").cached_tokens == 40
    assert computed_tokens(simulation) == 41 + 2 + 2 * 5


def test_the_last_token_is_computed_even_if_all_is_cached() -> None:
    simulation = simulate()
    for name in ("first", "second"):
        simulation.submit(request(name, range(40), Predict(())))
        simulation.run()
    assert finished(simulation, "second").cached_tokens == 39
    assert computed_tokens(simulation) == 40 + 1


def test_a_cached_prompt_that_fills_the_pool_computes_its_last_page_again() -> None:
    simulation = simulate(pages=10)
    for name in ("first", "second"):
        simulation.submit(request(name, range(40), Predict(())))
        simulation.run()
    assert finished(simulation, "second").cached_tokens == 36
    simulation.check_idle()


def test_a_cached_prompt_takes_the_time_of_the_tokens_that_are_left_of_it() -> None:
    simulation = simulate()
    simulation.submit(request("before", range(40), Predict(())))
    simulation.run()
    cost, now = simulation.engine.scheduler.cost, simulation.clock.now
    cost.coefficients, cost.samples = Coefficients(step=1e-3, token=1e-3, kv=0.0, row=0.0), MIN_SAMPLES
    # A step of 25 ms, half of a prediction's target, has 4 ms left behind the prompt of 20 tokens.
    simulation.submit(
        request("new", range(100, 120), Predict(()), arrival_seconds=now, priority=1),
        request("cached", [*range(40), 77, 78, 79], Predict(()), arrival_seconds=now),
    )
    simulation.step()
    assert [row.query_len for row in simulation.backend.batches[-1].rows] == [20, 3]


def test_an_answer_goes_on_behind_a_prompt_that_was_all_cached() -> None:
    simulation = simulate()
    for name, task in (("first", Embed()), ("second", Generate(9)), ("third", DEEP)):
        simulation.submit(request(name, range(40), task))
        simulation.run()
    assert computed_tokens(simulation) == 40 + 9 + 1 + 2 * 5
    for name in simulation.records:
        finished(simulation, name)
    simulation.check_idle()


def test_the_next_turn_finds_the_answer_in_the_cache() -> None:
    simulation = simulate()
    first = request("first", range(21), Generate(20))
    simulation.submit(first)
    simulation.run()
    answer = expected_answer(first)
    assert isinstance(answer, tuple)
    simulation.submit(request("second", [*range(21), *map(int, answer), 5, 6, 7], Generate(3)))
    simulation.run()
    # 21 + 20 tokens less the last one, which was drawn but not computed, are ten pages.
    assert finished(simulation, "second").cached_tokens == 40


def test_other_roots_share_nothing() -> None:
    simulation = simulate()
    for root in ("one", "two"):
        simulation.submit(request(root, range(40), Predict(()), cache_root=root))
        simulation.run()
    assert computed_tokens(simulation) == 80


@pytest.mark.parametrize("pipeline_depth", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_cancelled_writer_is_taken_over(steps: int, pipeline_depth: int) -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=10), pages=64, pipeline_depth=pipeline_depth)
    simulation.submit(request("writer", range(60), Predict(())))
    simulation.submit(*(request(f"reader {i}", [*range(60), i], Predict(())) for i in range(3)))
    for _ in range(steps):
        simulation.step()
    simulation.engine.cancel("writer")
    simulation.run()
    assert failed(simulation, "writer").kind is FailureKind.CANCELLED
    for i in range(3):
        finished(simulation, f"reader {i}")
    # Lost are at most the steps that were in flight and a page that was not full.
    assert computed_tokens(simulation) <= 60 + 3 + 10 * (pipeline_depth - 1) + PAGE_SIZE
    simulation.check_idle()


@pytest.mark.parametrize("holder", [{"priority": -1}, {"priority": 100}, {"tenant": "another"}])
def test_whoever_waits_for_a_page_lends_its_place_to_whoever_computes_it(holder: dict[str, Any]) -> None:
    """A stream of work would come before the holder, and is less urgent than who waits for it."""
    config = SchedulerConfig(max_step_tokens=32, max_mixed_prompt_tokens=32)
    simulation = simulate(config, pages=800, state_slots=64, max_context_tokens=2048)
    history = list(range(1_000, 1_200))
    simulation.submit(request("holder", [*history, 1], Predict(()), **holder))
    simulation.step()
    numbers = itertools.count(1)

    def flood(most: int) -> None:
        waiting = sum(sequence.state_slot is None for sequence in simulation.engine.scheduler.alive())
        for number in itertools.islice(numbers, max(most - waiting, 0)):
            tokens = range(10_000 * number, 10_000 * number + 40)
            now = simulation.clock.now
            simulation.submit(request(f"f{number}", tokens, Predict(()), arrival_seconds=now))

    flood(20)
    simulation.submit(request("urgent", [*history, 2], Predict(()), arrival_seconds=simulation.clock.now, priority=100))
    steps = 0
    while simulation.records["urgent"].end is None:
        flood(20)
        simulation.step()
        steps += 1
        assert steps < 20, "it waits for who waits for everybody else"
    finished(simulation, "urgent")


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_who_lends_its_place_does_not_have_twice_what_is_on_its_way(pipeline_depth: int) -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=12), pages=200, pipeline_depth=pipeline_depth)
    history = list(range(40))
    tasks: list[Task] = [DEEP, Generate(5), Predict(())]
    simulation.submit(*(request(f"holder {i}", [*history, i], task, priority=-i) for i, task in enumerate(tasks)))
    simulation.submit(*(request(f"urgent {i}", [*history, 9 + i], task) for i, task in enumerate(tasks)))
    simulation.run()
    for name in simulation.records:
        finished(simulation, name)
    assert computed_tokens(simulation) == 40 + 6 + 2 * (2 * 5 + 4)


def test_what_others_have_yet_to_compute_of_a_prompt_is_foreseen() -> None:
    simulation = simulate(SchedulerConfig(max_step_tokens=32), pages=400)
    for i in range(MIN_SAMPLES):
        simulation.submit(request(f"w{i}", range(1_000 * i, 1_000 * i + 30), Predict(())))
        simulation.run()
    now, history = simulation.clock.now, list(range(50_000, 50_400))
    # A chat is due so much later that its work does not count before a prediction's.
    simulation.submit(request("holder", [*history, 1], Generate(2), arrival_seconds=now))
    simulation.step()
    for name, seconds in (("hasty", 0.02), ("patient", 0.4)):  # 400 tokens of 0.1 ms each
        now = simulation.clock.now
        tokens = [*history, 2]
        simulation.submit(request(name, tokens, Predict(()), arrival_seconds=now, deadline_seconds=now + seconds))
    simulation.run()
    assert failed(simulation, "hasty").reason == "DEADLINE_UNREACHABLE"
    finished(simulation, "patient")
