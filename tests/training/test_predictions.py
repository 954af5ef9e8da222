"""Behaviour heads are calibrated on customers that they were not fitted on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from shoplm.readout.targets import probabilities
from shoplm.training import heads as heads_module
from shoplm.training import nets, predictions
from shoplm.training.heads import Standard
from shoplm.training.predictions import Observed, fit_behaviour

HORIZONS = (7, 14, 30)
FEATURES, HIDDEN = 4, 30


def observed(customers: int, per_customer: int, seed: int, *, strength: float) -> Observed:
    """The delay depends on the first feature, `strength` times; the hidden states are a customer's own noise."""
    random = np.random.default_rng(seed)
    customer = np.repeat(np.arange(customers, dtype=np.int32), per_customer)
    features = random.normal(size=(len(customer), FEATURES)).astype(np.float32)
    delay = random.exponential(20.0 * np.exp(-strength * features[:, 0]))
    return Observed(
        customer=customer,
        moment=np.tile(np.arange(per_customer, dtype=np.float64), customers),
        hidden=np.repeat(random.normal(size=(customers, HIDDEN)), per_customer, axis=0).astype(np.float32),
        features=features,
        delay_days=np.where(delay < 30.0, delay, np.inf),
        visits=(delay < 30.0).astype(np.float64),
        spend=np.where(delay < 30.0, 10.0, 0.0),
        since_purchase_days=np.zeros(len(customer)),
    )


def test_chances_mean_what_they_say_for_new_customers() -> None:
    train, fresh = observed(1500, 3, 0, strength=1.0), observed(1500, 1, 1, strength=1.0)
    standard = Standard.fit(train.features)
    heads, specs, scales = fit_behaviour(train, train, HORIZONS, standard, 0)
    assert scales.keys() == {"purchase", "purchase_count", "spend"}
    assert [spec.kind for spec in specs][:4] == ["purchase", "purchase", "purchase", "churn"]
    values = np.concatenate([head.values(fresh.hidden, standard(fresh.features)) for head in heads], axis=1)
    for spec in specs[:4]:
        true = 1.0 - np.exp(-spec.horizon_days / (20.0 * np.exp(-fresh.features[:, 0].astype(np.float64))))
        true = 1.0 - true if spec.kind == "churn" else true
        assert np.abs(probabilities(spec, values) - true).mean() < 0.04, spec.label


def test_folds_calibrate_the_kind_of_head_that_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough rows for nets all together, too few without a fold."""
    train = observed(200, 3, 4, strength=1.0)
    monkeypatch.setattr(predictions, "NET_ROWS", len(train))
    fitted: list[int] = []

    def counting(*arguments: object, **options: object) -> object:
        fitted.append(len(arguments[0]))  # type: ignore[arg-type]
        return nets.fit_net_and_states(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(predictions, "fit_net_and_states", counting)
    heads, _, _ = fit_behaviour(train, train, HORIZONS, Standard.fit(train.features), 0)
    assert all(head.unit_weight is not None for head in heads)
    assert len(fitted) == 3 * (1 + predictions.FOLDS) and sum(size < len(train) for size in fitted) == 12


def test_states_that_know_the_answers_of_earlier_moments_are_not_trusted() -> None:
    """As an adapter's do, which was trained on them: at the newest moment they say nothing."""
    train = observed(600, 4, 5, strength=0.5)
    newest = train.moment == train.moment.max()
    known = np.where(np.isfinite(train.delay_days), train.delay_days, 40.0) / 40.0
    shuffled = np.random.default_rng(6).permutation(known)
    read = []
    for state in (np.where(newest, shuffled, known), known):
        leaking = dataclasses.replace(train, hidden=state[:, None].astype(np.float32))
        heads, _, _ = fit_behaviour(leaking, leaking, HORIZONS, Standard.fit(train.features), 0)
        read.append(float(np.abs(heads[0].weight[:, 0]).max()))
    assert read[0] < 0.3 * read[1]


def test_a_fit_that_is_too_close_is_damped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a penalty, a few customers' own noise explains them: the slope comes from customers left out."""
    monkeypatch.setattr(heads_module, "PENALTIES", (1e-7,))
    monkeypatch.setattr(heads_module, "HIDDEN_SCALES", (1.0,))
    train = observed(80, 3, 2, strength=0.5)
    _, specs, _ = fit_behaviour(train, train, HORIZONS, Standard.fit(train.features), 0)
    assert all(spec.parameters["slope"] < 0.6 for spec in specs[:3])


def test_too_few_customers_have_no_targets() -> None:
    few = observed(29, 5, 3, strength=1.0)
    assert fit_behaviour(few, few, HORIZONS, Standard.fit(few.features), 0) == ([], [], {})
    nobody = few.where(np.zeros(len(few), bool))
    assert fit_behaviour(nobody, nobody, HORIZONS, Standard.fit(few.features), 0) == ([], [], {})
