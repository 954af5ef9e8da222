"""Guesses of how answers go on: what is guessed, how far, and that it changes nothing but the number of steps."""

from __future__ import annotations

import pytest
from shoplm.request import FailureKind, FinishedOutput, FinishReason, Generate, Request, Service, token_ids
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import Coefficients, CostModel
from shoplm.scheduler.drafts import Drafter, Lookup, accepted
from shoplm.scheduler.sequence import Sequence
from simulation import CheckingBackend, Clock, Simulation

PAGE_SIZE = 4
LOOPED = 1  # a vocabulary of one token: every guess is right


def test_what_followed_the_last_two_tokens_is_guessed_and_the_latest_place_counts() -> None:
    lookup, tokens = Lookup(), token_ids([7, 8, 1, 2, 7, 8, 3, 4, 5, 7, 8])
    assert lookup.guess(tokens, 3) == (3, 4, 5)
    tokens.extend([6, 7, 8])
    assert lookup.guess(tokens, 2) == (6, 7)
    assert lookup.guess(token_ids([*tokens, 9, 9]), 2) == ()


def test_what_ends_at_the_last_token_is_taken_to_repeat_itself() -> None:
    assert Lookup().guess(token_ids([5, 1, 2, 3, 1, 2]), 7) == (3, 1, 2, 3, 1, 2, 3)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 1]])
def test_of_tokens_that_are_too_few_nothing_is_known(tokens: list[int]) -> None:
    assert Lookup().guess(token_ids(tokens), 4) == ()


def test_drawn_tokens_count_up_to_the_first_behind_a_wrong_guess() -> None:
    assert accepted((1, 2, 3), [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert accepted((1, 2, 3), [1, 9, 3, 4]) == [1, 9]
    assert accepted((1, 2, 3), [9, 2, 3, 4]) == [9]


def test_guesses_that_were_wrong_make_the_next_ones_shorter() -> None:
    lookup = Lookup()
    before = lookup.accuracy
    lookup.saw(5, 0)
    wrong = lookup.accuracy
    lookup.saw(5, 5)
    assert wrong < before and wrong < lookup.accuracy < 1


def _cost(**coefficients: float) -> CostModel:
    cost = CostModel()
    cost.coefficients = Coefficients(**{"step": 0.0, "token": 1e-3, "kv": 0.0, "row": 0.0, **coefficients})
    return cost


def _repeating(max_tokens: int = 100) -> Sequence:
    request = Request("chat", Service.CHAT, token_ids([1, 2, 3] * 5), Generate(max_tokens), 0.0)
    return Sequence(request, 0.0, token_ids([1, 2, 3] * 5 + [1]), computed=15)


def test_a_guess_is_as_long_as_it_pays() -> None:
    lengths = []
    for answers in (1, 2, 8, 32):
        drafts = Drafter(7, _cost(step=1e-2)).drafts(answers)
        lengths.append(len(drafts.of(_repeating(), 100)) if drafts is not None else None)
    # A token costs a tenth of a step. One that is right two times of three in the last place saves its part of a step.
    assert lengths == [5, 4, 1, 0]
    assert Drafter(7, _cost(step=1e-2)).drafts(500) is None  # not even if all were right
    assert Drafter(0, _cost(step=1e-2)).drafts(1) is None
    assert Drafter(7, _cost(step=1e-2)).drafts(0) is None


def test_keys_that_a_guess_reads_count() -> None:
    drafts = Drafter(7, _cost(step=1e-2, kv=1e-3)).drafts(1)
    assert drafts is not None and len(drafts.of(_repeating(), 100)) == 1


def test_the_bounds_of_step_and_answer_hold() -> None:
    drafts = Drafter(7, _cost(step=1.0)).drafts(1)
    assert drafts is not None
    assert len(drafts.of(_repeating(), 100)) == 7
    assert len(drafts.of(_repeating(), 2)) == 2
    assert drafts.of(_repeating(), 0) == ()
    assert len(drafts.of(_repeating(max_tokens=4), 100)) == 2  # one is there, and one is drawn behind the guesses
    assert drafts.of(_repeating(max_tokens=2), 100) == ()


def test_a_work_that_costs_nothing_is_guessed_to_the_end() -> None:
    drafts = Drafter(7, _cost(token=0.0, step=1e-2)).drafts(1)
    assert drafts is not None and len(drafts.of(_repeating(), 100)) == 7


def _simulate(vocabulary: int, *, drafted: int, **backend: int) -> Simulation:
    config = SchedulerConfig(max_step_tokens=32, max_mixed_prompt_tokens=8, max_draft_tokens=drafted)
    return Simulation(CheckingBackend(Clock(), page_size=PAGE_SIZE, vocabulary=vocabulary, **backend), config)


def _chat(name: str, prompt: list[int], task: Generate) -> Request:
    return Request(name, Service.CHAT, token_ids(prompt), task, 0.0)


@pytest.mark.parametrize("prompt", range(1, 10))
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 16, 23])
def test_an_answer_that_was_foreseen_takes_fewer_steps(prompt: int, max_tokens: int) -> None:
    steps = []
    for drafted in (0, 7):
        simulation = _simulate(LOOPED, drafted=drafted)
        simulation.submit(_chat("chat", list(range(prompt)), Generate(max_tokens)))
        simulation.run()
        simulation.check_answer("chat")
        simulation.check_idle()
        steps.append(len(simulation.backend.batches))
    assert steps[1] <= steps[0] and (max_tokens < 16 or steps[1] <= steps[0] // 2)


def test_a_stop_token_among_the_guesses_ends_the_answer() -> None:
    simulation = _simulate(2, drafted=7)
    simulation.submit(_chat("chat", [0, 1, 0, 1], Generate(64)))
    simulation.run()
    whole = simulation.records["chat"].tokens
    assert len(whole) == 64 and simulation.engine.scheduler.stats.accepted_tokens > 0
    simulation = _simulate(7, drafted=7)  # each of seven tokens stops one of these
    for stop in range(7):
        simulation.submit(_chat(f"chat {stop}", [1, 2, 3, 1, 2, 3, stop], Generate(40, stop_token_ids=(stop,))))
    simulation.run()
    ends = []
    for name, record in simulation.records.items():
        simulation.check_answer(name)
        assert isinstance(record.end, FinishedOutput)
        ends.append(record.end.finish_reason)
    assert FinishReason.STOP in ends
    simulation.check_idle()


def _step_until_drafted(simulation: Simulation) -> int:
    """Returns the guesses so far."""
    stats = simulation.engine.scheduler.stats
    for _ in range(8):
        simulation.step()
        if stats.drafted_tokens:
            return stats.drafted_tokens
    raise AssertionError("nothing was guessed")


def test_guesses_stop_where_the_pages_do() -> None:
    simulation = _simulate(LOOPED, drafted=7, pages=8)
    for name, first in (("one", 0), ("two", 20)):
        simulation.submit(_chat(name, list(range(first, first + 4)), Generate(14)))
    simulation.run()
    for name in simulation.records:
        simulation.check_answer(name)
    assert simulation.engine.scheduler.stats.accepted_tokens > 0
    simulation.check_idle()


def test_who_waits_for_a_first_result_comes_before_guesses() -> None:
    simulation = _simulate(LOOPED, drafted=7)
    simulation.submit(_chat("chat", [1, 2, 3], Generate(60)))
    seen = _step_until_drafted(simulation)
    simulation.submit(_chat("prompt", list(range(200, 224)), Generate(1)))
    simulation.step()
    assert simulation.engine.scheduler.stats.drafted_tokens == seen
    simulation.run()
    for name in simulation.records:
        simulation.check_answer(name)


def test_a_step_with_guesses_that_fails_ends_its_answer_alone() -> None:
    simulation = _simulate(LOOPED, drafted=7)
    simulation.submit(_chat("chat", [1, 2, 3], Generate(60)))
    _step_until_drafted(simulation)
    simulation.backend.broken_steps.add(len(simulation.backend.batches))
    simulation.step()
    end = simulation.records["chat"].end
    assert not isinstance(end, FinishedOutput) and end is not None and end.kind is FailureKind.INTERNAL
    assert simulation.backend.batches[-1].rows[0].query_len > 1
    simulation.check_idle()


def test_a_backend_that_draws_behind_the_last_token_alone_gets_no_guesses() -> None:
    simulation = _simulate(LOOPED, drafted=7, pipeline_depth=2)
    simulation.submit(_chat("chat", [1, 2, 3], Generate(20)))
    simulation.run()
    simulation.check_answer("chat")
    assert simulation.engine.scheduler.stats.drafted_tokens == 0


def test_a_bound_of_less_than_none_is_refused() -> None:
    with pytest.raises(ValueError, match="max_draft_tokens is -1"):
        SchedulerConfig(max_draft_tokens=-1)
