"""Guesses of how answers go on: what is guessed, how far, and that it changes nothing but the number of steps."""

from __future__ import annotations

from typing import Any

import pytest
from shoplm.request import (
    Degradation,
    FailureKind,
    FinishedOutput,
    FinishReason,
    Generate,
    Request,
    Select,
    Service,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import Coefficients, CostModel
from shoplm.scheduler.drafts import FARTHEST, MOST_ANSWERS, Drafter, Lookup, accepted
from shoplm.scheduler.sequence import Sequence
from simulation import CheckingBackend, Clock, Simulation

PAGE_SIZE = 4
LOOPED = 1  # a vocabulary of one token: every guess is right


def looked_up(tokens: list[int], answer: int = 0) -> Lookup:
    lookup = Lookup(len(tokens), answer)
    lookup.follow(token_ids(tokens))
    return lookup


def guess(tokens: list[int], most: int) -> tuple[int, ...]:
    return looked_up(tokens).guess(token_ids(tokens), most)


def test_what_followed_the_last_two_tokens_is_guessed_and_the_latest_place_counts() -> None:
    assert guess([7, 8, 1, 2, 7, 8, 3, 4, 5, 7, 8], 3) == (3, 4, 5)
    assert guess([7, 8, 1, 2, 7, 8, 3, 4, 5, 7, 8, 6, 7, 8], 2) == (6, 7)
    assert guess([7, 8, 1, 2, 7, 8, 9, 9], 2) == ()


def test_what_ends_at_the_last_token_is_taken_to_repeat_itself() -> None:
    assert guess([5, 1, 2, 3, 1, 2], 7) == (3, 1, 2, 3, 1, 2, 3)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 1]])
def test_of_tokens_that_are_too_few_nothing_is_known(tokens: list[int]) -> None:
    assert guess(tokens, 4) == ()


def test_no_more_than_the_nearest_tokens_are_looked_at() -> None:
    far = [7, 8, 9, *range(100, 100 + FARTHEST), 7, 8]
    assert guess(far, 1) == ()
    assert guess([*far[4:], 7, 8], 1) == (7,)


def test_drawn_tokens_count_up_to_the_first_behind_a_wrong_guess() -> None:
    assert accepted((1, 2, 3), [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert accepted((1, 2, 3), [1, 9, 3, 4]) == [1, 9]
    assert accepted((1, 2, 3), [9, 2, 3, 4]) == [9]


def test_an_answer_s_own_record_says_how_likely_a_guess_is_and_may_change() -> None:
    prompt = [1, 2, 3, 4, 5, 6] * 3
    fresh = looked_up(prompt, len(prompt))
    assert fresh.accuracy == pytest.approx(2 / 3)  # how a prompt repeats itself says nothing of the answer
    quotes = looked_up([*prompt, 1, 2, 3, 4, 5, 6], len(prompt))
    assert quotes.accuracy > fresh.accuracy
    straying = prompt + [1, 2, 4, 1, 2, 5, 1, 2, 6, 1, 2, 7] * 3
    strays = looked_up(straying, len(prompt))
    assert strays.accuracy < fresh.accuracy
    strays.follow(token_ids(straying + [1, 2, 3, 4, 5, 6] * 8))
    assert strays.accuracy > 0.8


def _cost(**coefficients: float) -> CostModel:
    cost = CostModel()
    cost.coefficients = Coefficients(**{"step": 0.0, "token": 1e-3, "kv": 0.0, "row": 0.0, **coefficients})
    return cost


def _repeating(max_tokens: int = 100, **task: Any) -> Sequence:
    request = Request("chat", Service.CHAT, token_ids([1, 2, 3] * 5), Generate(max_tokens, **task), 0.0)
    return Sequence(request, 0.0, token_ids([1, 2, 3] * 5 + [1]), computed=15)


def _length(cost: CostModel, answers: int = 1, most: int = 100, **sequence: Any) -> int:
    return len(Drafter(7, cost).draft(_repeating(**sequence), answers, most))


def test_a_guess_is_as_long_as_it_pays() -> None:
    # A token costs a tenth of a step. One that is right in the last place saves its part of a step.
    assert [_length(_cost(step=1e-2), answers) for answers in (1, 2, 8, 32)] == [7, 6, 2, 0]
    assert [_length(_cost(step=1e-2, row=2e-3), answers) for answers in (1, 8)] == [5, 1]
    assert _length(_cost(step=1e-2, kv=1e-3)) < 7  # 15 keys are read
    assert _length(_cost(token=1.0)) == 0  # a step costs nothing beside its tokens
    assert _length(_cost(token=0.0)) == 7  # nothing costs anything


def test_among_many_answers_nobody_looks() -> None:
    sequence = _repeating()
    assert Drafter(7, _cost(step=1.0)).draft(sequence, MOST_ANSWERS + 1, 100) == ()
    assert Drafter(0, _cost(step=1.0)).draft(sequence, 1, 100) == ()
    assert Drafter(7, _cost(step=1.0)).draft(sequence, 1, 0) == ()
    assert sequence.lookup is None


def test_the_bounds_of_step_and_answer_hold() -> None:
    cost = _cost(step=1.0)
    assert (_length(cost), _length(cost, most=2)) == (7, 2)
    assert _length(cost, max_tokens=4) == 2  # one is there, and one is drawn behind the guesses
    assert _length(cost, max_tokens=2) == 0


def test_nothing_is_guessed_from_a_stop_token_on() -> None:
    assert _length(_cost(step=1.0), stop_token_ids=(3,)) == 1
    assert _length(_cost(step=1.0), stop_token_ids=(2,)) == 0


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
    simulation.check_answers()
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
    simulation.check_answers()


def test_who_searches_is_not_kept_waiting_by_guesses() -> None:
    simulation = _simulate(LOOPED, drafted=7)
    simulation.submit(_chat("chat", [1, 2, 3], Generate(60)))
    seen = _step_until_drafted(simulation)
    simulation.submit(Request("search", Service.RECOMMENDATION, token_ids([5]), Select(2, 2, trie="deep"), 0.0))
    while simulation.records["search"].end is None:
        simulation.step()
        assert simulation.engine.scheduler.stats.drafted_tokens == seen
    simulation.run()
    simulation.check_answers()
    assert simulation.engine.scheduler.stats.drafted_tokens > seen


@pytest.mark.parametrize("deadline", [0.0403 + 0.0017 * part for part in range(12)])
def test_an_answer_that_may_be_cut_short_is_cut_before_its_deadline(deadline: float) -> None:
    simulation = _simulate(LOOPED, drafted=7, pages=200)
    for number in range(10):  # the cost model has been fitted
        simulation.submit(_chat(f"before {number}", [number, 2, 3], Generate(12)))
        simulation.run()
    for number in range(80):  # answers are short as a rule: nobody shortens this one beforehand
        simulation.submit(_chat(f"short {number}", [number, 2, 3], Generate(100, stop_token_ids=(0,))))
        simulation.run()
    request = Request(
        *("chat", Service.CHAT, token_ids([1, 2, 3]), Generate(400), simulation.clock.now),
        deadline_seconds=simulation.clock.now + deadline,
        allow_degraded=True,
    )
    simulation.submit(request)
    simulation.run()
    end = simulation.records["chat"].end
    assert isinstance(end, FinishedOutput) and end.degraded == (Degradation.FEWER_TOKENS,)
    simulation.check_idle()


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
