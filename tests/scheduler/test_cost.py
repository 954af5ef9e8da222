"""The cost model finds a machine's curve, and nothing odd spoils it."""

from __future__ import annotations

import random
import statistics

import pytest
from shoplm.scheduler.cost import PRIOR, Coefficients, CostModel, StepLoad, kv_tokens

LAPTOP = Coefficients(step=14e-3, token=9e-4, kv=4e-7, row=1.5e-3)
LARGE = Coefficients(step=50e-3, token=2e-5, kv=1e-9, row=1e-4)
GPU = Coefficients(step=2.5e-3, token=9e-6, kv=2e-9, row=5e-6)


def random_load(generator: random.Random) -> StepLoad:
    """A few answers, sometimes with a chunk of a prompt."""
    answers = generator.randrange(24)
    lengths = [generator.randrange(20, 900) for _ in range(answers)]
    chunk = generator.choice((0, 0, 16, 60, 128, 400)) or (0 if answers else 16)
    start = generator.randrange(500)
    kv = sum(kv_tokens(length, 1) for length in lengths) + kv_tokens(start, chunk)
    return StepLoad(answers + chunk, kv, answers + (chunk > 0))


def teach(model: CostModel, truth: Coefficients, steps: int, generator: random.Random, noise: float = 0.05) -> None:
    for _ in range(steps):
        load = random_load(generator)
        model.observe(load, truth.seconds(load) * generator.lognormvariate(0.0, noise))


def typical_error(model: CostModel, truth: Coefficients, generator: random.Random) -> float:
    loads = [random_load(generator) for _ in range(200)]
    return statistics.median(abs(model.seconds(load) / truth.seconds(load) - 1) for load in loads)


def test_keys_read_are_counted_token_by_token() -> None:
    assert kv_tokens(10, 4) == 11 + 12 + 13 + 14
    assert kv_tokens(0, 1) == 1


def test_before_its_first_step_it_is_the_prior_and_says_that_it_is_no_prediction() -> None:
    model = CostModel()
    load = StepLoad(100, 5_000, 3)
    assert model.seconds(load) == pytest.approx(PRIOR.seconds(load))
    assert not model.is_fitted


@pytest.mark.parametrize("truth", [LAPTOP, GPU], ids=["laptop", "gpu"])
@pytest.mark.parametrize("seed", range(3))
def test_it_learns_a_machine_within_a_hundred_steps(truth: Coefficients, seed: int) -> None:
    generator = random.Random(seed)
    model = CostModel()
    teach(model, truth, 100, generator)
    assert model.is_fitted
    assert typical_error(model, truth, generator) < 0.06


@pytest.mark.parametrize("factor", [0.05, 30.0])
def test_one_step_in_ten_that_is_far_off_does_not_spoil_it(factor: float) -> None:
    generator = random.Random(1)
    model = CostModel()
    for _ in range(400):
        load = random_load(generator)
        odd = factor if generator.random() < 0.1 else 1.0
        model.observe(load, LAPTOP.seconds(load) * odd * generator.lognormvariate(0.0, 0.05))
    # Slow outliers are part of how long things take: up to a bound they count.
    assert typical_error(model, LAPTOP, generator) < (0.15 if factor < 1 else 0.45)
    for _ in range(60):
        load = random_load(generator)
        model.observe(load, LAPTOP.seconds(load))
    assert typical_error(model, LAPTOP, generator) < 0.06


def test_a_slow_spell_is_followed_within_a_few_dozen_steps_and_left_again() -> None:
    generator = random.Random(2)
    model = CostModel()
    teach(model, LAPTOP, 200, generator)
    slow = Coefficients(*(2 * each for each in LAPTOP))
    teach(model, slow, 40, generator)
    assert typical_error(model, slow, generator) < 0.2
    teach(model, LAPTOP, 40, generator)
    assert typical_error(model, LAPTOP, generator) < 0.2


def test_no_coefficient_falls_below_zero_when_steps_are_all_alike() -> None:
    model = CostModel()
    for _ in range(1_000):
        error = model.observe(StepLoad(8, 800, 8), 0.02)
    assert min(model.coefficients) >= 0
    assert error < 0.01
    # And a longer prompt is still predicted to take longer.
    assert model.seconds(StepLoad(508, 130_000, 9)) > 1.5 * model.seconds(StepLoad(8, 800, 8))


@pytest.mark.parametrize("truth", [LAPTOP, GPU, LARGE], ids=["laptop", "gpu", "large"])
def test_what_was_learnt_stays_known_while_steps_are_all_alike(truth: Coefficients) -> None:
    generator = random.Random(3)
    model = CostModel()
    teach(model, truth, 400, generator)
    for number in range(5_000):
        answers = generator.choice((7, 8, 9))
        load = StepLoad(answers, answers * (100 + number % 200), answers)
        model.observe(load, truth.seconds(load) * generator.lognormvariate(0.0, 0.05))
    assert typical_error(model, truth, generator) < 0.15


def test_the_error_that_is_returned_is_that_of_the_prediction_before() -> None:
    model = CostModel()
    load = StepLoad(10, 100, 2)
    predicted = model.seconds(load)
    assert model.observe(load, 4 * predicted) == pytest.approx(0.75)
