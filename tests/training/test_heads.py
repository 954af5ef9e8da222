"""Heads are fitted to their likelihoods and calibrated on other customers than they were fitted on."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from shoplm.bundle import HeadSpec
from shoplm.readout.targets import intervals, point_amounts, probabilities
from shoplm.training.calibration import calibrated
from shoplm.training.heads import HeadData, Standard, count_loss, fit_head, hazard_loss, spend_loss

FEATURES, HIDDEN = 3, 4


def data(count: int, seed: int) -> HeadData:
    random = np.random.default_rng(seed)
    hidden = (20.0 + random.normal(size=(count, HIDDEN))).astype(np.float32)
    return HeadData(np.arange(count, dtype=np.int32), hidden, random.normal(size=(count, FEATURES)).astype(np.float32))


def uniform(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed + 1000).random(count)


def test_hazards_recover_the_chances_they_were_drawn_from() -> None:
    rows, fresh = data(4000, 0), data(4000, 1)

    def chances(made: HeadData) -> np.ndarray:
        return np.stack([1 / (1 + np.exp(-(made.standard[:, 0] - 1.0))), 1 / (1 + np.exp(-made.standard[:, 1]))], 1)

    first, second = (uniform(4000, seed) < chances(rows)[:, seed] for seed in (0, 1))
    step = torch.from_numpy(np.where(first, 0, np.where(second, 1, 2)))
    head, _ = fit_head(rows, 2, lambda at: hazard_loss(step[at], 2), initial=[0.0, 0.0], seed=0)
    spec = HeadSpec("purchase", "hazard", (0, 1), 0.5, 14, parameters={"slope": 1.0, "intercept": 0.0})
    found = probabilities(spec, head.values(fresh.hidden, fresh.standard))
    true = 1 - (1 - chances(fresh)).prod(1)
    assert np.abs(found - true).mean() < 0.03


def test_the_hidden_state_is_read_where_it_helps() -> None:
    rows = data(2000, 2)
    useful = torch.from_numpy(np.exp(0.8 * (rows.hidden[:, 1] - 20.0) + 0.5).astype(np.float32))
    head, strength = fit_head(rows, 1, lambda at: count_loss(useful[at]), initial=[0.0], seed=0)
    assert strength.hidden_scale > 0
    means = np.exp(head.values(rows.hidden, rows.standard)[:, 0])
    assert np.corrcoef(means, useful.numpy())[0, 1] > 0.9
    blind = torch.from_numpy(np.exp(rows.standard[:, 0]).astype(np.float32))
    head, _ = fit_head(rows, 1, lambda at: count_loss(blind[at]), initial=[0.0], seed=0)
    assert np.abs(head.weight[0, HIDDEN]) > 10 * np.abs(head.weight[0, :HIDDEN]).max()


@pytest.mark.parametrize("seed", [10, 11, 12])
def test_features_that_say_nothing_of_few_customers_move_little(seed: int) -> None:
    """As in a small shop: as many features as heads read, a few hundred rows, and nothing to foretell."""
    random = np.random.default_rng(seed)
    customers, moments, features = 150, 4, 48
    own = random.normal(size=(customers, 1, features)) + 0.3 * random.normal(size=(customers, moments, features))
    standard = own.reshape(-1, features).astype(np.float32)
    who = np.repeat(np.arange(customers, dtype=np.int32), moments)
    rows = HeadData(who, np.zeros((len(who), 0), np.float32), standard)
    visits = torch.from_numpy(random.poisson(1.0, len(who)).astype(np.float32))
    head, _ = fit_head(rows, 1, lambda at: count_loss(visits[at]), initial=[0.0], seed=0)
    fresh = random.normal(size=(1000, features)).astype(np.float32)
    assert head.values(np.zeros((1000, 0), np.float32), fresh).std() < 0.2


def test_spend_intervals_cover_nine_in_ten_on_new_customers() -> None:
    def spend(made: HeadData, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        amount = np.exp(3.0 + 0.5 * made.standard[:, 0] + 0.3 * random.laplace(size=len(made)))
        return np.where(random.random(len(made)) < 0.8, amount, 0.0)

    rows, later, fresh = data(3000, 3), data(2000, 4), data(3000, 5)
    paid = torch.from_numpy(spend(rows, 3).astype(np.float32))
    head, _ = fit_head(rows, 3, lambda at: spend_loss(paid[at]), initial=[0.0, 3.0, 0.0], seed=0)
    draft = HeadSpec("spend", "zero_inflated_lognormal", (0, 1, 2), 0.0, 30)
    spec = calibrated(draft, head.values(later.hidden, later.standard), spend(later, 4))
    values, truth = head.values(fresh.hidden, fresh.standard), spend(fresh, 5)
    low, high = intervals(spec, values)
    assert ((truth >= low) & (truth <= high)).mean() == pytest.approx(0.9, abs=0.03)
    assert point_amounts(spec, values).mean() == pytest.approx(truth.mean(), rel=0.1)


def test_the_spend_of_customers_who_rarely_buy_is_the_expected_one() -> None:
    """Nothing would be off by the least, and would be said of each."""
    random = np.random.default_rng(13)
    rows = data(3000, 13)
    share = 0.2 / (1.0 + np.exp(-2.0 * rows.standard[:, 0]))
    spend = np.where(random.random(3000) < share, np.exp(3.0 + 0.5 * random.normal(size=3000)), 0.0)
    paid = torch.from_numpy(spend.astype(np.float32))
    head, _ = fit_head(rows, 3, lambda at: spend_loss(paid[at]), initial=[0.0, 3.0, 0.0], seed=0)
    values = head.values(rows.hidden, rows.standard)
    spec = calibrated(HeadSpec("spend", "zero_inflated_lognormal", (0, 1, 2), 0.0, 30), values, spend)
    amounts = point_amounts(spec, values)
    assert amounts.mean() == pytest.approx(spend.mean(), rel=0.05)
    assert np.corrcoef(amounts, share)[0, 1] > 0.8
    low, high = intervals(spec, values)
    assert not low.any(), "four in five spend nothing, the likeliest to buy among them"
    assert ((spend >= low) & (spend <= high)).mean() == pytest.approx(0.95, abs=0.02)


def test_count_intervals_cover_at_least_nine_in_ten() -> None:
    def visits(made: HeadData, seed: int) -> np.ndarray:
        mean = np.exp(1.0 + 0.5 * made.standard[:, 0])
        random = np.random.default_rng(seed)
        return random.poisson(mean * random.gamma(2.0, 0.5, len(made))).astype(np.float64)

    rows, later, fresh = data(3000, 6), data(2000, 7), data(3000, 8)
    seen = torch.from_numpy(visits(rows, 6).astype(np.float32))
    head, _ = fit_head(rows, 1, lambda at: count_loss(seen[at]), initial=[1.0], seed=0)
    draft = HeadSpec("purchase_count", "count", (0,), 0.0, 30)
    spec = calibrated(draft, head.values(later.hidden, later.standard), visits(later, 7))
    assert spec.parameters["dispersion"] == pytest.approx(0.5, abs=0.15)
    low, high = intervals(spec, head.values(fresh.hidden, fresh.standard))
    truth = visits(fresh, 8)
    assert 0.88 <= ((truth >= low) & (truth <= high)).mean() <= 0.97


def test_calibration_undoes_a_wrong_slope_and_shift() -> None:
    random = np.random.default_rng(9)
    log_odds = random.normal(size=5000)
    outcome = (random.random(5000) < 1 / (1 + np.exp(-log_odds))).astype(np.float64)
    draft = HeadSpec("purchase", "sigmoid", (0,), 0.0, 7)
    spec = calibrated(draft, (2.0 * log_odds + 3.0)[:, None], outcome)
    assert spec.parameters["slope"] == pytest.approx(0.5, abs=0.05)
    assert spec.parameters["intercept"] == pytest.approx(-1.5, abs=0.15)


def test_separable_outcomes_stay_finite() -> None:
    score = np.linspace(-1, 1, 50)
    spec = calibrated(HeadSpec("purchase", "sigmoid", (0,), 0.0, 7), score[:, None], (score > 0).astype(float))
    assert all(np.isfinite(value) for value in spec.parameters.values())
    assert msgspec.structs.asdict(spec)["outputs"] == (0,)


def test_a_constant_feature_keeps_a_positive_scale() -> None:
    standard = Standard.fit(np.ones((5, 2), np.float32))
    assert (standard.scale > 0).all()
    assert (standard(np.ones((1, 2), np.float32)) == 0).all()
    assert (Standard.fit(np.zeros((0, 2), np.float32)).scale == 1).all()
