"""Boosted stumps become units that say what scikit-learn's trees say, and find steps that no sum of weights makes."""

from __future__ import annotations

import numpy as np
import pytest
from shoplm.readout.targets import probabilities
from shoplm.training import stumps
from shoplm.training.campaigns import Campaigns, fit_campaigns
from shoplm.training.heads import Head, Standard
from shoplm.training.metrics import auc
from sklearn.ensemble import GradientBoostingClassifier


def values(head: Head, standard: np.ndarray) -> np.ndarray:
    return head.values(np.zeros((len(standard), 0), np.float32), standard)[:, 0]


def stepped(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers; the outcome is likely in the middle of the first alone."""
    random = np.random.default_rng(seed)
    features = random.integers(-5, 6, (count, 3)).astype(np.float32)
    chance = np.where(np.abs(features[:, 0]) <= 2, 0.6, 0.1)
    return features, random.random(count) < chance


def test_units_say_what_the_trees_say() -> None:
    features, outcome = stepped(2000, 0)
    trees = GradientBoostingClassifier(
        n_estimators=200, learning_rate=0.05, max_depth=1, min_samples_leaf=40, random_state=0
    ).fit(features, outcome)
    head = stumps.fit_stumps(features, outcome, seed=0)
    np.testing.assert_allclose(values(head, features), trees.decision_function(features), atol=1e-4)
    assert (head.weight[:, :3] == 0).all(), "steps are units, not weights of features"


def test_fine_grained_features_keep_ramps_that_are_not_steep() -> None:
    random = np.random.default_rng(1)
    features = random.normal(size=(1500, 2)).astype(np.float32)
    head = stumps.fit_stumps(features, random.random(1500) < 0.5 + 0.4 * (features[:, 1] > 0), seed=0)
    assert head.unit_weight is not None and 0 < np.abs(head.unit_weight).max() <= 50.0 + 1e-3


def test_many_rows_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    features, outcome = stepped(1500, 2)
    whole = values(stumps.fit_stumps(features, outcome, seed=0), features)
    monkeypatch.setattr(stumps, "MOST_ROWS", 1000)
    fewer = values(stumps.fit_stumps(features, outcome, seed=0), features)
    assert np.abs(fewer - whole).max() > 0
    assert auc(fewer, outcome) == pytest.approx(auc(whole, outcome), abs=0.03)


def test_rows_too_few_to_split_give_the_rate() -> None:
    features, outcome = np.zeros((50, 2), np.float32), np.arange(50) < 10
    head = stumps.fit_stumps(features, outcome, seed=0)
    np.testing.assert_allclose(values(head, features), np.log(0.2 / 0.8), atol=1e-3)


@pytest.mark.parametrize(("count", "bends"), [(4000, True), (600, False)])
def test_the_coupon_head_bends_where_there_are_rows_enough(count: int, bends: bool) -> None:
    """What no linear head sees is found, and each type keeps its rate, for a head that reads no type."""
    features, outcome = stepped(count, 3)
    kind = np.arange(count) % 2
    redeemed = outcome & ((kind == 0) | (np.random.default_rng(4).random(count) < 0.4))
    customer = np.arange(count, dtype=np.int32)
    rows = Campaigns(customer, features, kind, redeemed, (customer % 8).astype(np.str_))
    standard = Standard.fit(features)
    (head,), specs = fit_campaigns(rows, ["A", "B"], standard, 4, seed=0)
    assert (head.unit_weight is not None) == bends
    found = head.values(np.zeros((count, 4), np.float32), standard(features))
    for index, spec in enumerate(specs):
        of_type = kind == index
        chance = probabilities(spec, found)[of_type]
        assert chance.mean() == pytest.approx(redeemed[of_type].mean(), abs=0.01)
        assert (auc(chance, redeemed[of_type]) > 0.7) == bends
