"""Raw head values become probabilities and amounts as their formulas say."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from shoplm.bundle import HeadSpec
from shoplm.errors import BundleError
from shoplm.history import SECONDS_PER_DAY, History, build_history
from shoplm.readout import targets
from shoplm.readout.answers import answer, applies, count_cdf, count_quantile, seconds_since_purchase, usual

PLAIN = {"slope": 1.0, "intercept": 0.0}
COUNT = HeadSpec(
    "purchase_count",
    "count",
    (0,),
    3.0,
    30,
    parameters={"scale": 1.0, "dispersion": 0.5, "level_low": 0.05, "level_high": 0.95},
)
SPEND = HeadSpec(
    "spend",
    "zero_inflated_lognormal",
    (0, 1, 2),
    50.0,
    30,
    parameters={"scale": 1.0, "level_low": 0.05, "level_high": 0.95},
)


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def test_hazards_add_up_and_survival_is_the_rest() -> None:
    values = (logit(0.5), logit(0.2), logit(0.25))
    expected = 1 - 0.5 * 0.8 * 0.75
    hazard = HeadSpec("purchase", "hazard", (0, 1, 2), 0.5, 30, parameters=PLAIN)
    survival = HeadSpec("churn", "survival", (0, 1, 2), 0.5, 30, parameters=PLAIN)
    assert answer(hazard, values).probability == pytest.approx(expected, abs=1e-6)
    assert answer(survival, values).probability == pytest.approx(1 - expected, abs=1e-6)
    short = msgspec.structs.replace(hazard, outputs=(0,))
    assert answer(short, values).probability == pytest.approx(0.5, abs=1e-6)


def test_calibration_is_a_line_in_log_odds() -> None:
    spec = HeadSpec("coupon_redemption", "sigmoid", (1,), 0.1, parameters={"slope": 2.0, "intercept": -1.0})
    assert answer(spec, (9.0, 0.75)).probability == pytest.approx(1 / (1 + np.exp(-0.5)))


@settings(max_examples=100)
@given(st.lists(st.floats(-80, 80), min_size=3, max_size=3))
def test_longer_horizons_are_never_less_likely_and_nothing_leaves_zero_to_one(values: list[float]) -> None:
    spec = HeadSpec("purchase", "hazard", (0,), 0.5, 7, parameters=PLAIN)
    chances = [
        answer(msgspec.structs.replace(spec, outputs=tuple(range(n))), tuple(values)).probability for n in (1, 2, 3)
    ]
    assert all(chance is not None and 0 <= chance <= 1 for chance in chances)
    assert chances == sorted(chances)  # type: ignore[type-var]


@pytest.mark.parametrize("dispersion", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("mean", [0.05, 1.0, 7.5, 60.0])
def test_counts_follow_scipys_negative_binomial(mean: float, dispersion: float) -> None:
    spec = msgspec.structs.replace(COUNT, parameters={**COUNT.parameters, "dispersion": dispersion})
    reference = stats.nbinom(1 / dispersion, 1 / (1 + dispersion * mean)) if dispersion else stats.poisson(mean)
    values = np.array([[np.log(mean)]])
    for level in (0.02, 0.05, 0.5, 0.95, 0.99):
        assert targets.quantiles(spec, values, level)[0] == max(reference.ppf(level), 0)
    for count in (0, 1, 5, 40):
        found = targets.distribution(spec, values, np.array([float(count)]))[0]
        assert found == pytest.approx(reference.cdf(count), abs=1e-9)


@pytest.mark.parametrize(("mean", "dispersion"), [(750.0, 0.0), (3000.0, 0.0), (2000.0, 0.001), (40_000.0, 1e-5)])
def test_counts_whose_chance_of_zero_no_float_holds_follow_scipys(mean: float, dispersion: float) -> None:
    reference = stats.nbinom(1 / dispersion, 1 / (1 + dispersion * mean)) if dispersion else stats.poisson(mean)
    for level in (0.02, 0.5, 0.98):
        found = count_quantile(mean, dispersion, level)
        assert found == pytest.approx(reference.ppf(level), rel=0.003)
        assert count_cdf(mean, dispersion, int(found)) == pytest.approx(reference.cdf(found), abs=0.01)


def test_spend_follows_a_lognormal_behind_a_share_of_zeros() -> None:
    share, mean, deviation = 0.8, 3.0, 0.7
    values = np.array([[logit(share), mean, np.log(deviation)]])
    reference = stats.lognorm(deviation, scale=np.exp(mean))
    assert targets.point_amounts(SPEND, values)[0] == pytest.approx(share * reference.mean())
    assert targets.quantiles(SPEND, values, 0.15)[0] == 0.0
    assert targets.quantiles(SPEND, values, 0.6)[0] == pytest.approx(reference.ppf((0.6 - 0.2) / 0.8), rel=1e-6)
    at = targets.distribution(SPEND, np.repeat(values, 2, axis=0), np.array([0.0, 25.0]))
    np.testing.assert_allclose(at, [0.2, 0.2 + 0.8 * reference.cdf(25.0)], rtol=1e-6)


@settings(max_examples=200)
@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), st.sampled_from([COUNT, SPEND]))
def test_amounts_are_finite_and_inside_their_interval(values: list[float], spec: HeadSpec) -> None:
    bounded = (min(values[0], 5.0), *values[1:]) if spec is COUNT else tuple(values)  # exp(5): a short recurrence
    found = answer(spec, bounded)
    assert found.probability is None
    assert found.amount is not None and found.interval_low is not None and found.interval_high is not None
    assert 0 <= found.interval_low <= found.amount <= found.interval_high < np.inf


def test_the_scale_multiplies_the_amount() -> None:
    doubled = msgspec.structs.replace(SPEND, parameters={**SPEND.parameters, "scale": 2.0})
    values = (1.0, 2.0, 0.0)
    one, two = answer(SPEND, values).amount, answer(doubled, values).amount
    assert one is not None and two == pytest.approx(2 * one)


def test_what_is_usual_is_the_base_rate_as_the_target_is_answered() -> None:
    for transform, outputs in (("hazard", (0,)), ("survival", (0,)), ("sigmoid", (0,))):
        found = usual(HeadSpec("purchase", transform, outputs, base_rate=0.7))
        assert found == (0.7, None, None, None)
    for transform, outputs in (("count", (0,)), ("zero_inflated_lognormal", (0, 1, 2))):
        assert usual(HeadSpec("spend", transform, outputs, base_rate=42.5)) == (None, 42.5, None, None)


def test_a_target_applies_to_its_population_only() -> None:
    spec = HeadSpec("churn", "survival", (0,), 0.1, 30, parameters=PLAIN, active_within_days=60.0)

    def bought(days_ago: float | None) -> bool:
        count = 0 if days_ago is None else 1
        history = build_history(
            np.zeros(count, np.int32),
            np.ones(count, bool),
            np.zeros(count, np.int8),
            np.full(count, 1000 * SECONDS_PER_DAY - (days_ago or 0) * SECONDS_PER_DAY),
            np.ones(count, np.float32),
            np.ones(count, np.float32),
            ["x"] * count,
            as_of=1000 * SECONDS_PER_DAY,
        )
        return applies(spec, seconds_since_purchase(history))

    assert bought(60.0)
    assert not bought(60.1)
    assert not bought(None)
    assert applies(msgspec.structs.replace(spec, active_within_days=0.0), seconds_since_purchase(build_empty()))


def build_empty() -> History:
    none = np.zeros(0)
    return build_history(
        none.astype(np.int32), none.astype(bool), none.astype(np.int8), none, none, none, [], as_of=0.0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "luck"}, "unknown kind 'luck'"),
        ({"transform": "softmax"}, "unknown transform 'softmax'"),
        ({"outputs": (0, 5)}, "outputs \\(0, 5\\) of a head with 3 values"),
        ({"outputs": ()}, "takes some outputs"),
        ({"parameters": {"slope": 1.0}}, "parameters lack intercept"),
        ({"transform": "sigmoid", "outputs": (0, 1)}, "takes 1 outputs"),
        ({"transform": "count", "outputs": (0,)}, "parameters lack dispersion, level_high, level_low, scale"),
    ],
)
def test_targets_that_cannot_be_read_are_refused(change: dict[str, object], message: str) -> None:
    good = HeadSpec("purchase", "hazard", (0, 1), 0.5, 7, parameters=PLAIN)
    targets.check_spec(good, 3)
    with pytest.raises(BundleError, match=message):
        targets.check_spec(msgspec.structs.replace(good, **change), 3)


@pytest.mark.parametrize("transform", ["sigmoid", "hazard", "survival", "count", "zero_inflated_lognormal"])
def test_one_customer_gets_what_many_do(transform: str) -> None:
    parameters = {
        "slope": 0.8,
        "intercept": -0.3,
        "scale": 1.2,
        "level_low": 0.05,
        "level_high": 0.95,
        "dispersion": 0.4,
    }
    outputs = {"sigmoid": (1,), "count": (0,), "zero_inflated_lognormal": (2, 0, 1)}.get(transform, (0, 1, 2))
    spec = HeadSpec("spend", transform, outputs, base_rate=0.5, horizon_days=30, parameters=parameters)
    values = np.concatenate([np.random.default_rng(3).normal(0, 2, (50, 3)), [[-80.0] * 3, [80.0] * 3, [0.0] * 3]])
    answers = [answer(spec, row) for row in values.tolist()]
    if transform in targets.PROBABILITIES:
        assert [each.probability for each in answers] == pytest.approx(
            targets.probabilities(spec, values).tolist(), rel=1e-9
        )
        return
    amounts, (low, high) = targets.point_amounts(spec, values), targets.intervals(spec, values)
    assert [each.amount for each in answers] == pytest.approx(amounts.tolist(), rel=1e-9)
    assert [each.interval_low for each in answers] == pytest.approx(np.minimum(low, amounts).tolist(), rel=1e-9)
    assert [each.interval_high for each in answers] == pytest.approx(np.maximum(high, amounts).tolist(), rel=1e-9)
