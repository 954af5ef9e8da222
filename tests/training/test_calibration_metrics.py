"""Slope, intercept and lift of probabilities, on data where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from shoplm.training.metrics import calibration_intercept, calibration_slope, top_decile_lift
from sklearn.linear_model import LogisticRegression


def drawn(count: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(4)
    logits = random.normal(-0.5, 1.5, count)
    outcome = random.random(count) < 1.0 / (1.0 + np.exp(-logits))
    return logits, 1.0 / (1.0 + np.exp(-logits)), outcome


def test_true_probabilities_have_slope_one_and_intercept_zero() -> None:
    _, probability, outcome = drawn()
    slope, low, high = calibration_slope(probability, outcome)
    assert low < 1.0 < high and high - low < 0.12 and low < slope < high
    middle, low, high = calibration_intercept(probability, outcome)
    assert low < 0.0 < high and high - low < 0.12 and low < middle < high


def test_the_slope_is_that_of_a_logistic_regression() -> None:
    logits, _, outcome = drawn(2000)
    off = 1.0 / (1.0 + np.exp(-(1.7 * logits + 0.4)))
    slope = calibration_slope(off, outcome)[0]
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit((1.7 * logits + 0.4)[:, None], outcome)
    assert slope == pytest.approx(float(reference.coef_[0, 0]), rel=1e-4)


def test_extreme_probabilities_have_a_slope_below_one_and_high_ones_an_intercept_below_zero() -> None:
    logits, _, outcome = drawn()
    assert calibration_slope(1.0 / (1.0 + np.exp(-2.0 * logits)), outcome)[2] < 0.6
    middle = calibration_intercept(1.0 / (1.0 + np.exp(-(logits + 1.0))), outcome)
    assert middle[1] < -1.0 < middle[2]


def test_the_interval_covers_what_it_says() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        logits = random.normal(0.0, 1.0, 400)
        outcome = random.random(400) < 1.0 / (1.0 + np.exp(-logits))
        _, low, high = calibration_slope(1.0 / (1.0 + np.exp(-logits)), outcome)
        held += low <= 1.0 <= high
    assert 0.92 <= held / 300 <= 0.98


def test_what_has_no_optimum_is_not_a_number() -> None:
    probability = np.array([0.1, 0.2, 0.8, 0.9])
    assert np.isnan(calibration_slope(probability, probability > 0.5)).all()
    assert np.isnan(calibration_slope(probability, np.ones(4, bool))).all()
    assert np.isnan(calibration_slope(np.full(4, 0.5), np.array([True, False, True, False]))).all()


def test_lift_of_the_top_tenth() -> None:
    probability = np.linspace(1.0, 0.0, 100)
    outcome = np.zeros(100, bool)
    outcome[[0, 1, 2, 3, 4, 50, 60, 70, 80, 90]] = True
    assert top_decile_lift(probability, outcome) == pytest.approx(0.5 / 0.1)
    assert np.isnan(top_decile_lift(probability, np.zeros(100, bool)))
