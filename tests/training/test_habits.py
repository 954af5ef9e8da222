"""Loyalty and neighbours against their formulas, and shops that have little of either."""

from __future__ import annotations

import numpy as np
import pytest
from shoplm.training import habits


def test_loyalty_is_the_log_odds_of_a_repeat() -> None:
    customer, item = np.array([0, 0, 0, 1, 1, 2]), np.array([2, 2, 2, 2, 0, 0])
    odds = {0: np.log((2 - 2 + 1) / (2 + 3)), 2: np.log((4 - 2 + 1) / (2 + 3))}
    mean = (2 * odds[0] + 4 * odds[2]) / 6
    np.testing.assert_allclose(habits.loyalty(customer, item, 4), [odds[0] - mean, 0, odds[2] - mean, 0], rtol=1e-6)


def test_neighbours_are_the_largest_entries_of_the_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(habits, "NEIGHBOURS", 4)
    monkeypatch.setattr(habits, "_BLOCK", 3)
    random = np.random.default_rng(2)
    bought = random.random((60, 9)) < 0.4
    bought[:, 7] = False  # nobody
    bought[:, 8] = np.arange(60) < 4  # too few
    customer, item = np.nonzero(bought)
    twice = random.integers(0, len(item), 50)  # repetitions count once
    found = habits.neighbours(np.append(customer, customer[twice]), np.append(item, item[twice]), 9, 0)
    x = bought[:, :7][bought[:, :7].any(axis=1)].astype(float)
    x /= np.sqrt(x.sum(axis=1, keepdims=True))
    expected = np.linalg.solve(x.T @ x + np.eye(7), x.T @ x)
    np.fill_diagonal(expected, -np.inf)
    for row in range(7):
        part = slice(found.starts[row], found.starts[row + 1])
        best = [each for each in np.argsort(-expected[row])[:4] if expected[row, each] > 0]
        assert sorted(best) == found.items[part].tolist()
        np.testing.assert_allclose(found.strengths[part], expected[row, found.items[part]], rtol=2e-3, atol=1e-5)
    assert found.starts[7] == found.starts[9] == len(found.items)


def test_a_shop_without_purchases_has_no_habits() -> None:
    nobody = np.zeros(0, np.int64)
    assert habits.loyalty(nobody, nobody, 3).tolist() == [0, 0, 0]
    assert len(habits.neighbours(nobody, nobody, 3, 0).items) == 0
    one = np.zeros(20, np.int64)
    assert len(habits.neighbours(one, one, 1, 0).items) == 0


def test_more_customers_than_are_read_are_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(habits, "CUSTOMERS", 30)
    random = np.random.default_rng(3)
    customer, item = np.repeat(np.arange(90), 4), random.integers(0, 6, 360)
    one, two = (habits.neighbours(customer, item, 6, seed) for seed in (0, 1))
    assert len(one.items) and not np.array_equal(one.strengths, two.strengths)
