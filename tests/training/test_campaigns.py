"""The coupon head: types differ in their rate, share what makes a customer redeem, and never read the hidden state."""

from __future__ import annotations

import numpy as np
import pytest
from shoplm.readout.targets import probabilities
from shoplm.training.campaigns import Campaigns, fit_campaigns
from shoplm.training.heads import Standard
from shoplm.training.metrics import auc

HIDDEN, FEATURES = 6, 3
TYPES = ["A", "B"]


def campaigns(count: int, seed: int) -> tuple[Campaigns, np.ndarray]:
    """The chance depends on the first feature and the type; also returns the true chances."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, FEATURES)).astype(np.float32)
    kind = random.integers(0, 2, count)
    chance = 1 / (1 + np.exp(-(1.5 * features[:, 0] + np.array([0.0, -2.0])[kind])))
    redeemed = random.random(count) < chance
    customer = np.arange(count, dtype=np.int32)
    return Campaigns(customer, features, kind.astype(np.int64), redeemed, customer.astype(np.str_)), chance


def test_chances_are_recovered_per_type() -> None:
    train, _ = campaigns(3000, 0)
    tune, _ = campaigns(1500, 1)
    fresh, chance = campaigns(1500, 2)
    standard = Standard.fit(train.features)
    heads, specs = fit_campaigns(train, tune, TYPES, standard, HIDDEN, seed=0)
    assert [spec.campaign_type for spec in specs] == TYPES
    assert (heads[0].weight[:, :HIDDEN] == 0).all()
    values = heads[0].values(np.ones((len(fresh), HIDDEN), np.float32), standard(fresh.features))
    for index, spec in enumerate(specs):
        of_type = fresh.kind == index
        found = probabilities(spec, values[of_type])
        assert np.abs(found - chance[of_type]).mean() < 0.04
        assert auc(found, fresh.redeemed[of_type]) > 0.7
        assert spec.base_rate == pytest.approx(train.redeemed[train.kind == index].mean())


def test_without_enough_redemptions_there_is_no_target() -> None:
    train, _ = campaigns(200, 3)
    tune, _ = campaigns(200, 4)
    never = Campaigns(train.customer, train.features, train.kind, np.zeros(200, bool), train.campaign)
    assert fit_campaigns(never, tune, TYPES, Standard.fit(train.features), HIDDEN, seed=0) == ([], [])
    assert fit_campaigns(train, never, TYPES, Standard.fit(train.features), HIDDEN, seed=0) == ([], [])
    few = train.where(np.arange(200) < 10)
    assert fit_campaigns(few, tune, TYPES, Standard.fit(train.features), HIDDEN, seed=0) == ([], [])
