"""Metrics against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from shoplm.training.metrics import Baskets, auc, bootstrap_difference, brier, calibration_error, reliability
from shoplm.training.report import Difference, known
from sklearn.metrics import brier_score_loss, ndcg_score, roc_auc_score


def rows(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_recall_and_ndcg_by_hand() -> None:
    ranked = np.array([[4, 1, 7], [0, 1, 2]])
    quality = Baskets([rows(1, 9), rows(5)], [rows(1), rows()]).quality(ranked)
    np.testing.assert_allclose(quality.recall, [0.5, 0.0])
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(quality.ndcg, [(1 / np.log2(3)) / ideal, 0.0])
    np.testing.assert_allclose(quality.repeat_recall, [1.0, np.nan])
    np.testing.assert_allclose(quality.explore_recall, [0.0, 0.0])
    assert quality.means()["recall"] == 0.25


def test_ndcg_equals_scikit_learn() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        scores = random.permutation(30).astype(float)
        basket = random.choice(30, random.integers(1, 15), replace=False).astype(np.int32)
        relevance = np.isin(np.arange(30), basket).astype(float)
        ranked = np.argsort(-scores)[None, :10]
        found = Baskets([basket], [rows()]).quality(ranked).ndcg[0]
        assert found == pytest.approx(ndcg_score(relevance[None], scores[None], k=10))


def test_a_customer_with_nothing_to_find_does_not_count() -> None:
    quality = Baskets([rows(), rows(1)], [rows(), rows(1)]).quality(np.array([[1], [1]]))
    assert np.isnan(quality.recall[0])
    assert quality.means() == {
        "recall": 1.0,
        "ndcg": 1.0,
        "repeat_recall": 1.0,
        "explore_recall": pytest.approx(np.nan, nan_ok=True),
    }


def test_auc_and_brier_equal_scikit_learn_ties_included() -> None:
    random = np.random.default_rng(1)
    probability = np.round(random.random(500), 1)
    outcome = random.random(500) < probability
    assert auc(probability, outcome) == pytest.approx(roc_auc_score(outcome, probability))
    assert brier(probability, outcome) == pytest.approx(brier_score_loss(outcome, probability))
    assert np.isnan(auc(probability, np.ones(500, bool)))


def test_calibration_error_is_the_gap_between_said_and_seen() -> None:
    outcome = np.tile([True, False], 50)
    assert calibration_error(np.full(100, 0.5), outcome) == pytest.approx(0.0)
    assert calibration_error(np.full(100, 0.8), outcome) == pytest.approx(0.3)
    assert sum(count for count, _, _ in reliability(np.full(100, 0.8), outcome)) == 100


def test_the_bootstrap_interval_holds_the_difference() -> None:
    random = np.random.default_rng(2)
    theirs = random.random(400)
    mean, low, high = bootstrap_difference(theirs + 0.1 + 0.01 * random.normal(size=400), theirs, seed=0)
    assert low < 0.1 < high and low > 0.09
    assert mean == pytest.approx(0.1, abs=0.002)
    assert bootstrap_difference(theirs, theirs, seed=0) == (0.0, 0.0, 0.0)


def test_of_a_few_customers_nothing_is_claimed() -> None:
    theirs = np.random.default_rng(3).random(29)
    mean, low, high = bootstrap_difference(theirs + 0.1, theirs, seed=0)
    assert mean == pytest.approx(0.1) and np.isnan([low, high]).all()
    assert Difference(known(mean), known(low), known(high)).verdict == "of too few customers to compare with"
    more = np.random.default_rng(3).random(30)
    assert Difference(*map(known, bootstrap_difference(more + 0.1, more, seed=0))).verdict == "above"
    assert Difference(None, None, None).verdict == "not measured against"
