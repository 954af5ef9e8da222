"""The coupon head: types differ in their rate, share what makes a customer redeem, and never read the hidden state."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from shoplm.bundle import HeadSpec
from shoplm.readout.targets import probabilities
from shoplm.training import stumps
from shoplm.training.campaigns import Campaigns, fit_campaigns
from shoplm.training.heads import Standard
from shoplm.training.metrics import auc

HIDDEN, FEATURES = 6, 3
TYPES = ["A", "B"]


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads without stumps, which take seconds to fit and change nothing here."""
    monkeypatch.setattr(stumps, "FEWEST_ROWS", 10_000)


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
    train, _ = campaigns(4500, 0)
    fresh, chance = campaigns(1500, 2)
    standard = Standard.fit(train.features)
    heads, specs = fit_campaigns(train, TYPES, standard, HIDDEN, seed=0)
    assert [spec.campaign_type for spec in specs] == TYPES
    assert (heads[0].weight[:, :HIDDEN] == 0).all()
    values = heads[0].values(np.ones((len(fresh), HIDDEN), np.float32), standard(fresh.features))
    for index, spec in enumerate(specs):
        of_type = fresh.kind == index
        found = probabilities(spec, values[of_type])
        assert np.abs(found - chance[of_type]).mean() < 0.04
        assert auc(found, fresh.redeemed[of_type]) > 0.7
        assert spec.base_rate == pytest.approx(train.redeemed[train.kind == index].mean())


@pytest.mark.usefixtures("linear")
def test_a_type_is_calibrated_on_campaigns_that_the_head_did_not_know() -> None:
    """What speaks for redeeming in one campaign speaks against it in the other: a head that knows both leans to the
    larger one, but whoever knows only one is wrong about the other."""
    rows, _ = campaigns(3000, 5)
    campaign = (np.random.default_rng(6).random(len(rows)) < 0.3).astype(np.int64)
    redeemed = np.random.default_rng(7).random(len(rows)) < 1 / (1 + np.exp(-rows.features[:, 0] * (1 - 2 * campaign)))
    kind = np.zeros(len(rows), np.int64)
    known = Campaigns(rows.customer, rows.features, kind, redeemed, campaign.astype(np.str_))
    slopes = []
    for each in (known, dataclasses.replace(known, campaign=rows.campaign)):
        _, specs = fit_campaigns(each, TYPES, Standard.fit(rows.features), HIDDEN, seed=0)
        assert [spec.campaign_type for spec in specs] == ["A"]
        slopes.append(specs[0].parameters["slope"])
    assert slopes[0] < -0.5
    assert slopes[1] > 0.5, "customers held out of known campaigns show nothing of this"


def assert_rates_are_kept(rows: Campaigns, within: float) -> list[HeadSpec]:
    """The mean chance of each type is the share that redeemed; returns the targets."""
    standard = Standard.fit(rows.features)
    heads, specs = fit_campaigns(rows, TYPES, standard, HIDDEN, seed=0)
    values = heads[0].values(np.zeros((len(rows), HIDDEN), np.float32), standard(rows.features))
    for index, spec in enumerate(specs):
        found = probabilities(spec, values)[rows.kind == index].mean()
        assert found == pytest.approx(rows.redeemed[rows.kind == index].mean(), abs=within)
    return specs


@pytest.mark.usefixtures("linear")
def test_each_type_has_an_intercept_of_its_own() -> None:
    """Of one type, every campaign does twice as well as the customers' features let expect; the other's do as badly."""
    random = np.random.default_rng(8)
    count, campaigns_per_type = 6000, 6
    kind = random.integers(0, 2, count)
    campaign = kind * campaigns_per_type + random.integers(0, campaigns_per_type, count)
    shift = random.normal(0.0, 0.3, 2 * campaigns_per_type)
    redeemed = random.random(count) < 1 / (1 + np.exp(-(np.array([-0.5, -2.5])[kind] + shift[campaign])))
    features = random.normal(size=(count, FEATURES)).astype(np.float32)
    rows = Campaigns(np.arange(count, dtype=np.int32), features, kind, redeemed, campaign.astype(np.str_))
    specs = assert_rates_are_kept(rows, within=0.03)
    assert specs[0].parameters["slope"] == specs[1].parameters["slope"]
    assert specs[0].parameters["intercept"] != specs[1].parameters["intercept"]


@pytest.mark.usefixtures("linear")
def test_a_type_of_one_campaign_keeps_its_rate() -> None:
    """No head is fitted without the type: its rate would be missed, and then corrected once too often."""
    random = np.random.default_rng(10)
    count = 5000
    kind = (random.random(count) < 0.2).astype(np.int64)
    campaign = np.where(kind == 1, 5, random.integers(0, 5, count))
    redeemed = random.random(count) < 1 / (1 + np.exp(-np.array([-1.0, -3.0])[kind]))
    features = random.normal(size=(count, FEATURES)).astype(np.float32)
    rows = Campaigns(np.arange(count, dtype=np.int32), features, kind, redeemed, campaign.astype(np.str_))
    assert_rates_are_kept(rows, within=0.01)


def test_one_campaign_is_calibrated_on_customers_held_out() -> None:
    rows, _ = campaigns(600, 9)
    one = dataclasses.replace(rows, campaign=np.full(600, "spring"))
    _, specs = fit_campaigns(one, TYPES, Standard.fit(rows.features), HIDDEN, seed=0)
    assert len(specs) == 2 and 0.7 < specs[0].parameters["slope"] < 1.2


def test_without_enough_redemptions_there_is_no_target() -> None:
    train, _ = campaigns(200, 3)
    never = Campaigns(train.customer, train.features, train.kind, np.zeros(200, bool), train.campaign)
    assert fit_campaigns(never, TYPES, Standard.fit(train.features), HIDDEN, seed=0) == ([], [])
    few = train.where(np.arange(200) < 10)
    assert fit_campaigns(few, TYPES, Standard.fit(train.features), HIDDEN, seed=0) == ([], [])
