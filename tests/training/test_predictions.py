"""Behaviour heads are calibrated on customers that they were not fitted on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from shoplm.readout.targets import point_amounts, probabilities
from shoplm.training import feature_nets, predictions
from shoplm.training import heads as heads_module
from shoplm.training.calibration import calibrated, growing
from shoplm.training.heads import Standard
from shoplm.training.predictions import Observed, draft, fit_behaviour

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
        return feature_nets.fit_net_and_states(*arguments, **options)  # type: ignore[arg-type]

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


def with_states(train: Observed, seed: int, *, strength: float) -> Observed:
    """The number of visits depends on a customer's state, `strength` times."""
    random = np.random.default_rng(seed)
    means = np.exp(strength * train.hidden[:, 0].astype(np.float64) - 0.5)
    return dataclasses.replace(train, visits=random.poisson(means).astype(np.float64))


def test_a_head_that_reads_states_is_calibrated_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of exp is above exp of the mean: at the mean state, every number of purchases would look too low."""
    train = with_states(observed(600, 3, 7, strength=0.5), 8, strength=1.2)
    monkeypatch.setattr(predictions, "NET_ROWS", len(train))
    standard = Standard.fit(train.features)
    heads, specs, scales = fit_behaviour(train, train, HORIZONS, standard, 0)
    assert scales["purchase_count"] > 0.0
    count = next(spec for spec in specs if spec.kind == "purchase_count")
    assert count.parameters["scale"] == pytest.approx(1.0, abs=0.1)
    values = np.concatenate([head.values(train.hidden, standard(train.features)) for head in heads], axis=1)
    assert point_amounts(count, values).mean() == pytest.approx(train.visits.mean(), rel=0.1)


def test_a_head_that_reads_no_states_is_calibrated_on_all_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the states are: nothing of them is left in heads and calibration."""
    train, dense = observed(300, 2, 9, strength=0.8), observed(300, 6, 10, strength=0.8)
    monkeypatch.setattr(predictions, "NET_ROWS", len(dense))
    monkeypatch.setattr(heads_module, "HIDDEN_SCALES", (0.0,))
    standard = Standard.fit(dense.features)
    bare = dataclasses.replace(dense, hidden=np.zeros((len(dense), 0), np.float32))
    found = fit_behaviour(train, bare, HORIZONS, standard, 0)
    other = fit_behaviour(dataclasses.replace(train, hidden=3.0 + train.hidden), bare, HORIZONS, standard, 0)
    assert found[1:] == other[1:] and set(found[2].values()) == {0.0}
    for mine, theirs in zip(found[0], other[0], strict=True):
        np.testing.assert_array_equal(mine.weight, theirs.weight)
        np.testing.assert_array_equal(mine.bias, theirs.bias)
    rates = {spec.horizon_days: spec.base_rate for spec in found[1] if spec.kind == "purchase"}
    assert rates == {days: float((dense.delay_days < days).mean()) for days in HORIZONS}


def test_chances_of_a_purchase_grow_with_the_horizon() -> None:
    """Of hazards that are too bold for the first step alone, lines of their own would cross."""
    random = np.random.default_rng(11)
    score = random.normal(0.0, 1.5, 4000)
    true = np.stack([-1.5 + 0.3 * score, np.full(4000, -3.0), np.full(4000, -3.0)], axis=1)
    hazards = 1.0 / (1.0 + np.exp(-true))
    came = (random.random((4000, 3)) < hazards).cumsum(axis=1) > 0
    values = np.stack([-1.5 + score, *(-2.5 - 1.5 * score[None]).repeat(2, 0)], axis=1)
    drafts = [draft("purchase", "hazard", tuple(range(index + 1)), days) for index, days in enumerate(HORIZONS)]
    truths = [came[:, index].astype(np.float64) for index in range(3)]
    own = [calibrated(spec, values, truth) for spec, truth in zip(drafts, truths, strict=True)]
    chances = [probabilities(spec, values) for spec in own]
    assert (chances[0] > chances[1]).any()
    grown = growing(own, values, truths)
    fresh = np.random.default_rng(12).normal(0.0, 6.0, (4000, 3))
    chances = [probabilities(spec, fresh) for spec in grown]
    assert (chances[0] <= chances[1]).all() and (chances[1] <= chances[2]).all()
    for spec, truth in zip(grown, truths, strict=True):
        assert probabilities(spec, values).mean() == pytest.approx(truth.mean(), abs=0.01), spec.label


def test_lines_that_do_not_cross_stay_as_they_are() -> None:
    random = np.random.default_rng(13)
    values = random.normal(-1.0, 0.5, (4000, 3))
    came = (random.random((4000, 3)) < 1.0 / (1.0 + np.exp(-values))).cumsum(axis=1) > 0
    drafts = [draft("purchase", "hazard", tuple(range(index + 1)), days) for index, days in enumerate(HORIZONS)]
    truths = [came[:, index].astype(np.float64) for index in range(3)]
    own = [calibrated(spec, values, truth) for spec, truth in zip(drafts, truths, strict=True)]
    assert growing(own, values, truths) == own
    assert len({spec.parameters["slope"] for spec in own}) == 3


def test_scores_that_say_nothing_leave_the_usual_chances() -> None:
    values = np.random.default_rng(14).normal(-1.0, 1.0, (2000, 2))
    drafts = [draft("purchase", "hazard", tuple(range(index + 1)), days) for index, days in enumerate((7, 14))]
    first = (values[:, 0] < -1.5).astype(np.float64)
    truths = [first, np.maximum(first, (values[:, 1] < -1.5).astype(np.float64))]
    own = [calibrated(spec, values, truth) for spec, truth in zip(drafts, truths, strict=True)]
    grown = growing(own, values, truths)
    chances = [probabilities(spec, values) for spec in grown]
    assert (chances[0] <= chances[1]).all()
