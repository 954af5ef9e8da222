"""How many tokens of a prompt fit into the seconds that are left of a step."""

from __future__ import annotations

import math

import pytest
from shoplm.request import Generate, Predict, Request, Service, token_ids
from shoplm.scheduler.budget import Budgeter
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import Coefficients, CostModel, kv_tokens
from shoplm.scheduler.forecast import Forecast
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.survey import Answers

MOST = 100_000
SECONDS = 0.024


LARGE = Coefficients(step=0.05, token=2e-5, kv=1e-9, row=1e-4)  # a step takes as long as a token's target


def budgeter(each: Coefficients) -> Budgeter:
    config, cost = SchedulerConfig(), CostModel()
    cost.coefficients, cost.samples = each, 100
    return Budgeter(config, cost, Forecast(config, cost))


def tokens_within(each: Coefficients, seconds: float, start: int) -> int:
    config, cost = SchedulerConfig(max_step_tokens=MOST), CostModel()
    cost.coefficients = each
    return Budgeter(config, cost, Forecast(config, cost)).tokens_within(seconds, start)


@pytest.mark.parametrize("start", [0, 1, 464, 8000])
@pytest.mark.parametrize("token", [0.0, 5e-7, 2e-4])
@pytest.mark.parametrize("kv", [1e-9, 8e-8, 7e-7])
def test_they_fill_the_time_however_little_a_token_costs_beside_its_keys(token: float, kv: float, start: int) -> None:
    each = Coefficients(step=1e-3, token=token, kv=kv, row=4e-5)
    count = tokens_within(each, SECONDS, start)

    def added(tokens: int) -> float:
        return each.row + each.token * tokens + each.kv * kv_tokens(start, tokens)

    assert added(count) <= SECONDS < added(count + 1)


def test_where_nothing_adds_to_a_step_and_where_no_time_is_counted_the_step_is_the_bound() -> None:
    nothing, laptop = Coefficients(1e-3, 0.0, 0.0, 0.0), Coefficients(14e-3, 9e-4, 4e-7, 1.5e-3)
    assert tokens_within(nothing, SECONDS, 0) == MOST
    assert tokens_within(laptop, math.inf, 464) == MOST


def test_no_token_fits_into_less_than_a_row() -> None:
    assert tokens_within(Coefficients(14e-3, 9e-4, 4e-7, 1.5e-3), 1e-3, 464) == 0


def test_where_no_step_is_in_time_for_answers_cheap_prompts_fill_it_and_dear_ones_keep_to_the_bound() -> None:
    answers = Answers(4, 4, 5e-4, first_due=0.06)
    assert budgeter(LARGE).open(answers, None, 0.0).prompt_tokens == SchedulerConfig().max_step_tokens
    dear = LARGE._replace(token=2e-3)
    assert budgeter(dear).open(answers, None, 0.0).prompt_tokens == SchedulerConfig().max_mixed_prompt_tokens


def test_a_step_that_is_mostly_its_constant_part_does_not_end_early_for_one_prompt() -> None:
    """Who is urgent would be in time, with next to nothing beside it, and so would nobody behind it be."""
    request = Request("urgent", Service.PREDICTION, token_ids(range(20)), Predict(()), 0.0)
    for within, ends_early in ((0.06, False), (0.15, True)):
        urgent = Sequence(request, within, request.tokens)
        seconds = budgeter(LARGE).open(Answers(), urgent, 0.0).seconds
        assert (seconds == pytest.approx(within - LARGE.step)) == ends_early
        assert seconds >= LARGE.step


@pytest.mark.parametrize(("step", "running", "may"), [(0.047, 60, True), (0.047, 250, False), (0.005, 60, False)])
def test_answers_that_cost_little_beside_a_steps_constant_part_keep_no_others_out(
    step: float, running: int, may: bool
) -> None:
    each = LARGE._replace(step=step, row=1e-4 if step > 0.01 else 1e-3)
    request = Request("chat", Service.CHAT, token_ids(range(20)), Generate(9), 0.0)
    answers = Answers(running, running, running * (each.token + each.row), first_due=1.0)
    assert budgeter(each).may_answer(Sequence(request, 1.0, request.tokens), answers) == may
