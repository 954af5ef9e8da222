"""Pages and state slots when they are short: preemption, recomputation, and what a cancelled request frees."""

from __future__ import annotations

import pytest
from scheduled_requests import PAGE_SIZE, failed, finished, request, simulate
from shoplm.request import (
    Generate,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import CostModel
from shoplm.scheduler.memory import SequenceMemory
from shoplm.scheduler.residents import Residents
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.survey import survey


@pytest.mark.parametrize("pipeline_depth", [1, 2])
@pytest.mark.parametrize("lengths", [(40, 40), (4, 76), (37, 43)])
def test_memory_for_one_request_and_a_half_is_enough(lengths: tuple[int, int], pipeline_depth: int) -> None:
    prompt, answer = lengths
    simulation = simulate(pages=30, pipeline_depth=pipeline_depth)  # 120 tokens, two requests of 80
    simulation.submit(*(request(f"r{i}", range(100 * i, 100 * i + prompt), Generate(answer)) for i in range(2)))
    simulation.run(1_000)
    for i in range(2):
        finished(simulation, f"r{i}")
    assert simulation.engine.scheduler.stats.preemptions >= 1
    simulation.check_idle()


def test_an_important_answer_is_not_preempted_for_another() -> None:
    simulation = simulate(pages=30)
    simulation.submit(request("plain", range(10), Generate(70)))
    simulation.submit(request("important", range(100, 110), Generate(70), priority=1))
    simulation.run()
    steps = simulation.records["important"].token_steps
    assert steps == list(range(steps[0], steps[0] + 70))
    finished(simulation, "plain")


def test_an_answer_that_is_computed_again_leaves_no_page_that_others_would_wait_for() -> None:
    config = SchedulerConfig(max_step_tokens=24, max_mixed_prompt_tokens=24)
    simulation = simulate(config, pages=40, max_context_tokens=160, state_slots=8)
    simulation.submit(*(request(f"r{i}", range(100 * i, 100 * i + 47), Generate(60)) for i in range(3)))
    seen = 0
    while not simulation.engine.is_idle:
        simulation.step()
        for sequence in simulation.engine.scheduler.running():
            if sequence.epoch and not sequence.is_prompt and sequence.pending <= 1 and not sequence.in_flight:
                seen += 1
                assert all(node.filled for node in sequence.nodes), sequence.request.request_id
    assert seen > 20
    for name in simulation.records:
        finished(simulation, name)


def test_an_answer_all_of_which_is_cached_but_its_last_token_goes_on() -> None:
    memory = SequenceMemory(pages=20, page_size=PAGE_SIZE)
    residents = Residents(memory, 1)
    answer = Sequence(request("r", range(10), Generate(9)), 0.0, token_ids(range(13)), computed=12)
    answer.epoch = 1
    assert residents.start(answer)
    assert survey(residents, CostModel(), 0.06).prompts == [answer]


def test_a_state_slot_that_is_lost_is_noticed() -> None:
    simulation = simulate(state_slots=3)
    simulation.submit(request("r", range(10), Generate(9)))
    simulation.step()
    residents = simulation.engine.scheduler._residents
    residents.check()
    residents._slots.pop()
    with pytest.raises(AssertionError, match="1 state slots have no owner"):
        residents.check()


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_a_cancelled_request_frees_everything_at_once_and_its_step_harms_nobody(pipeline_depth: int) -> None:
    simulation = simulate(pages=16, pipeline_depth=pipeline_depth)
    simulation.submit(request("gone", range(30), Generate(30)))
    for _ in range(5):
        simulation.step()
    simulation.engine.cancel("gone")
    memory = simulation.engine.scheduler.memory
    assert memory.tree.available == 16
    simulation.submit(request("next", range(100, 150), Generate(10)))  # takes the pages while the step is in flight
    simulation.run()
    finished(simulation, "next")
    assert failed(simulation, "gone").reason == "CANCELLED"
    simulation.engine.cancel("gone")  # an unknown id by now
    simulation.check_idle()
