"""From raw head values to answers for many customers: calibrated probabilities, and amounts with a 90 % interval.

`HeadSpec.transform` names how the values `outputs` of a customer are read (s is the logistic function):

- `sigmoid` (a):            p = s(a)
- `hazard` (a1 … ak):       p = 1 - prod(1 - s(ai)): the event comes within k steps, ai being the logit of its coming in
                            step i when it has not come before (discrete-time hazard, Singer and Willett 1993)
- `survival` (a1 … ak):     p = prod(1 - s(ai)): it does not
- `count` (a):              negative binomial with mean exp(a) and `dispersion`: variance = mean + dispersion * mean^2
- `zero_inflated_lognormal` (a, m, d): 0 with probability 1 - s(a), else exp of a normal with mean m and deviation
                            exp(d)  (Wang, Liu and Miao, arXiv:1912.07753)

Probabilities are then calibrated (Platt scaling): s(slope * logit(p) + intercept). Expected amounts are multiplied by
`scale`. Where `level_amount` is given, the amount is that quantile and not the mean: the one that is off by the least
on a later window than the fit's, which for skewed spend is far from the mean. An interval runs from quantile
`level_low` to `level_high` of the fitted distribution; the levels are chosen on the same window so that 5 % of the
customers lie below and 5 % above it, the lower one at most a quarter: it leaves out no likelier amount.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from shoplm.bundle import HeadSpec
from shoplm.errors import BundleError
from shoplm.readout.answers import (
    MAX_DEVIATION,
    MAX_LOG_AMOUNT,
    TINY,
    count_cdf,
    count_quantile,
    lognormal_quantile,
    one_deviation,
    one_sigmoid,
)

Floats = NDArray[np.float64]

KINDS = ("purchase", "purchase_count", "spend", "churn", "coupon_redemption")
PROBABILITIES = ("sigmoid", "hazard", "survival")
AMOUNTS = ("count", "zero_inflated_lognormal")
_OUTPUTS = {"sigmoid": 1, "count": 1, "zero_inflated_lognormal": 3}


def check_spec(spec: HeadSpec, values: int) -> None:
    """Raises BundleError where the target cannot be read from `values` raw head values."""
    name = f"target {spec.kind} ({spec.horizon_days} d {spec.campaign_type})".replace(" )", ")")
    if spec.kind not in KINDS:
        raise BundleError(f"{name}: unknown kind {spec.kind!r}; this server reads {KINDS}")
    if spec.transform not in (*PROBABILITIES, *AMOUNTS):
        raise BundleError(f"{name}: unknown transform {spec.transform!r}; this server reads {PROBABILITIES + AMOUNTS}")
    expected = _OUTPUTS.get(spec.transform)
    if not spec.outputs or (expected is not None and len(spec.outputs) != expected):
        raise BundleError(f"{name}: transform {spec.transform} takes {expected or 'some'} outputs, not {spec.outputs}")
    if any(not 0 <= index < values for index in spec.outputs):
        raise BundleError(f"{name}: outputs {spec.outputs} of a head with {values} values")
    needed = {"slope", "intercept"} if spec.transform in PROBABILITIES else {"scale", "level_low", "level_high"}
    missing = (needed | ({"dispersion"} if spec.transform == "count" else set())) - set(spec.parameters)
    if missing:
        raise BundleError(f"{name}: parameters lack {', '.join(sorted(missing))}")


def raw_probabilities(spec: HeadSpec, values: Floats) -> Floats:
    """Before calibration: [N] from raw values [N, P]."""
    logits = values[:, list(spec.outputs)]
    if spec.transform == "sigmoid":
        return sigmoid(logits[:, 0])
    # log(1 - s(a)) = -softplus(a)
    survival: Floats = np.exp(-np.logaddexp(0.0, logits).sum(axis=1))
    return survival if spec.transform == "survival" else 1.0 - survival


def probabilities(spec: HeadSpec, values: Floats) -> Floats:
    """Calibrated: [N] from raw values [N, P]."""
    score = logit(raw_probabilities(spec, values))
    return sigmoid(spec.parameters["slope"] * score + spec.parameters["intercept"])


def point_amounts(spec: HeadSpec, values: Floats) -> Floats:
    """[N] from raw values [N, P]: the expected amount, or the quantile `level_amount`."""
    level = spec.parameters.get("level_amount")
    return (
        spec.parameters["scale"] * unscaled_amounts(spec, values) if level is None else quantiles(spec, values, level)
    )


def unscaled_amounts(spec: HeadSpec, values: Floats) -> Floats:
    """The mean of the fitted distribution: [N]."""
    chosen = values[:, list(spec.outputs)]
    amounts: Floats
    if spec.transform == "count":
        amounts = np.exp(np.minimum(chosen[:, 0], MAX_LOG_AMOUNT))
        return amounts
    share, mean, deviation = sigmoid(chosen[:, 0]), chosen[:, 1], _deviation(chosen[:, 2])
    amounts = share * np.exp(np.minimum(mean + deviation**2 / 2, MAX_LOG_AMOUNT))
    return amounts


def intervals(spec: HeadSpec, values: Floats) -> tuple[Floats, Floats]:
    """Lower and upper ends [N] of the 90 % intervals."""
    levels = spec.parameters["level_low"], spec.parameters["level_high"]
    low, high = (quantiles(spec, values, level) for level in levels)
    return low, high


def quantiles(spec: HeadSpec, values: Floats, level: float) -> Floats:
    """The smallest amount that is not exceeded with probability `level`: [N]."""
    chosen = values[:, list(spec.outputs)].tolist()
    if spec.transform == "count":
        scale, dispersion = spec.parameters["scale"], spec.parameters["dispersion"]
        means = [scale * math.exp(min(row[0], MAX_LOG_AMOUNT)) for row in chosen]
        return np.array([count_quantile(mean, dispersion, level) for mean in means], np.float64)
    fitted = [(one_sigmoid(row[0]), row[1], one_deviation(row[2])) for row in chosen]
    return np.array([lognormal_quantile(*each, level) for each in fitted], np.float64)


def distribution(spec: HeadSpec, values: Floats, amounts: Floats) -> Floats:
    """P(amount <= observed) under the fitted distribution, [N]: what the levels of the interval are chosen from."""
    chosen = values[:, list(spec.outputs)]
    if spec.transform == "count":
        means = spec.parameters["scale"] * np.exp(np.minimum(chosen[:, 0], MAX_LOG_AMOUNT))
        dispersion = spec.parameters["dispersion"]
        return np.array(
            [count_cdf(mean, dispersion, int(count)) for mean, count in zip(means, amounts, strict=True)], np.float64
        )
    share = sigmoid(chosen[:, 0])
    standard = (np.log(np.maximum(amounts, TINY)) - chosen[:, 1]) / _deviation(chosen[:, 2])
    normal = NormalDist()
    inside = np.array([normal.cdf(float(value)) for value in standard], np.float64)
    return 1.0 - share + np.where(amounts > 0, share * inside, 0.0)


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    result: Floats = np.exp(-np.logaddexp(0.0, -values))
    return result


def logit(probability: Floats) -> Floats:
    """log(p / (1 - p)), p kept away from 0 and 1."""
    inside = np.clip(probability, TINY, 1.0 - TINY)
    result: Floats = np.log(inside) - np.log1p(-inside)
    return result


def _deviation(raw: Floats) -> Floats:
    return np.minimum(np.exp(np.clip(raw, -MAX_DEVIATION, MAX_DEVIATION)), MAX_DEVIATION)
