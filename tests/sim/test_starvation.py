"""A request that needs nearly all pages beside a stream of small ones, which would take each page as it comes free."""

from __future__ import annotations

import itertools

import pytest
from shoplm.request import FinishedOutput, Generate, Request, Select, Service, token_ids
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.planner import PATIENCE_SECONDS
from simulation import CheckingBackend, Clock, CostCurve, Simulation

PAGES, PAGE_SIZE = 400, 4


@pytest.mark.parametrize("depth", [1, 2])
def test_a_large_request_gets_its_turn(depth: int) -> None:
    backend = CheckingBackend(
        Clock(),
        pages=PAGES,
        page_size=PAGE_SIZE,
        state_slots=64,
        pipeline_depth=depth,
        cost=CostCurve(1e-3, 1e-4),
        max_context_tokens=4096,
    )
    simulation = Simulation(backend, SchedulerConfig(max_step_tokens=512, max_mixed_prompt_tokens=128))
    numbers = itertools.count()

    def small() -> None:
        first = 100 * next(numbers)
        tokens = token_ids(range(first, first + 40))
        task = Select(8, 16, trie="deep")
        simulation.submit(Request(f"small{first}", Service.RECOMMENDATION, tokens, task, simulation.clock.now))

    for _ in range(30):
        small()
    for _ in range(20):
        simulation.step()
    begun = simulation.clock.now
    large = token_ids(range(1_000_000, 1_000_000 + int(0.94 * PAGES * PAGE_SIZE)))
    simulation.submit(Request("large", Service.CHAT, large, Generate(4), begun))
    while simulation.records["large"].end is None and simulation.clock.now < begun + 3 * PATIENCE_SECONDS:
        waiting = sum(sequence.state_slot is None for sequence in simulation.engine.scheduler.alive())
        for _ in range(12 - waiting):
            small()
        simulation.step()
    assert isinstance(simulation.records["large"].end, FinishedOutput)
    for _ in range(100):  # and then the small ones go on
        simulation.step()
    assert not list(simulation.engine.scheduler.alive())
