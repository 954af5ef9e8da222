"""How many tokens of a prompt fit into the seconds that are left of a step."""

from __future__ import annotations

import math

import pytest
from shoplm.scheduler.budget import Budgeter
from shoplm.scheduler.config import SchedulerConfig
from shoplm.scheduler.cost import Coefficients, CostModel, kv_tokens
from shoplm.scheduler.forecast import Forecast

MOST = 100_000
SECONDS = 0.024


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
