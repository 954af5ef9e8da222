"""From raw head values to answers: calibrated probabilities, and amounts with a 90 % interval. numpy only.

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
customers lie below and 5 % above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from shoplm.bundle import HeadSpec
from shoplm.errors import BundleError
from shoplm.history import SECONDS_PER_DAY, EventKind, History

Floats = NDArray[np.float64]

PROBABILITIES = ("sigmoid", "hazard", "survival")
AMOUNTS = ("count", "zero_inflated_lognormal")
_OUTPUTS = {"sigmoid": 1, "count": 1, "zero_inflated_lognormal": 3}
_MAX_LOG_AMOUNT = 16.0  # exp of this is beyond any basket: a defect upstream cannot become an infinite answer
_MAX_DEVIATION = 3.0
_TINY = 1e-7
_MAX_COUNT = 10_000


@dataclass(frozen=True, slots=True)
class Answer:
    """One prediction. Either `probability`, or `amount` with its 90 % interval."""

    probability: float | None = None
    amount: float | None = None
    interval_low: float | None = None
    interval_high: float | None = None


def check_spec(spec: HeadSpec, values: int) -> None:
    """Raises BundleError where the target cannot be read from `values` raw head values."""
    name = f"target {spec.kind} ({spec.horizon_days} d {spec.campaign_type})".replace(" )", ")")
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


def answer(spec: HeadSpec, values: Sequence[float]) -> Answer:
    """The prediction of one customer from the head's raw values [P].

    The same as `probabilities`, `point_amounts` and `intervals` give for many, in plain floats: for one customer an
    array costs ten times the arithmetic.
    """
    chosen = [float(values[index]) for index in spec.outputs]
    parameters = spec.parameters
    if spec.transform in PROBABILITIES:
        raw = _sigmoid(chosen[0])
        if spec.transform != "sigmoid":
            survival = math.exp(-sum(_softplus(value) for value in chosen))
            raw = survival if spec.transform == "survival" else 1.0 - survival
        inside = min(max(raw, _TINY), 1.0 - _TINY)
        score = math.log(inside) - math.log1p(-inside)
        return Answer(probability=_sigmoid(parameters["slope"] * score + parameters["intercept"]))
    if spec.transform == "count":
        mean = math.exp(min(chosen[0], _MAX_LOG_AMOUNT))
    else:
        deviation = _one_deviation(chosen[2])
        mean = _sigmoid(chosen[0]) * math.exp(min(chosen[1] + deviation**2 / 2, _MAX_LOG_AMOUNT))
    level = parameters.get("level_amount")
    amount = parameters["scale"] * mean if level is None else _quantile(spec, chosen, level)
    # The mean of a skewed distribution can lie outside a central interval; the caller gets one that holds it.
    return Answer(
        amount=amount,
        interval_low=min(_quantile(spec, chosen, parameters["level_low"]), amount),
        interval_high=max(_quantile(spec, chosen, parameters["level_high"]), amount),
    )


def score_of(spec: HeadSpec, values: Sequence[float]) -> float:
    """The answer on the scale on which effects are given: log-odds of a probability, logarithm of an amount."""
    found = answer(spec, values)
    if found.probability is not None:
        inside = min(max(found.probability, _TINY), 1.0 - _TINY)
        return math.log(inside) - math.log1p(-inside)
    return math.log(max(found.amount or 0.0, _TINY))


def applicable(spec: HeadSpec, history: History) -> bool:
    """Whether the customer belongs to the target's population."""
    if spec.active_within_days <= 0:
        return True
    bought = history.time[history.kind == EventKind.PURCHASE]
    return bool(len(bought)) and float(history.as_of - bought.max()) <= spec.active_within_days * SECONDS_PER_DAY


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
        amounts = np.exp(np.minimum(chosen[:, 0], _MAX_LOG_AMOUNT))
        return amounts
    share, mean, deviation = sigmoid(chosen[:, 0]), chosen[:, 1], _deviation(chosen[:, 2])
    amounts = share * np.exp(np.minimum(mean + deviation**2 / 2, _MAX_LOG_AMOUNT))
    return amounts


def intervals(spec: HeadSpec, values: Floats) -> tuple[Floats, Floats]:
    """Lower and upper ends [N] of the 90 % intervals."""
    levels = spec.parameters["level_low"], spec.parameters["level_high"]
    low, high = (quantiles(spec, values, level) for level in levels)
    return low, high


def quantiles(spec: HeadSpec, values: Floats, level: float) -> Floats:
    """The smallest amount that is not exceeded with probability `level`: [N]."""
    chosen = values[:, list(spec.outputs)].tolist()
    return np.array([_quantile(spec, row, level) for row in chosen], np.float64)


def distribution(spec: HeadSpec, values: Floats, amounts: Floats) -> Floats:
    """P(amount <= observed) under the fitted distribution, [N]: what the levels of the interval are chosen from."""
    chosen = values[:, list(spec.outputs)]
    if spec.transform == "count":
        means = spec.parameters["scale"] * np.exp(np.minimum(chosen[:, 0], _MAX_LOG_AMOUNT))
        dispersion = spec.parameters["dispersion"]
        return np.array(
            [_count_cdf(mean, dispersion, int(count)) for mean, count in zip(means, amounts, strict=True)], np.float64
        )
    share = sigmoid(chosen[:, 0])
    standard = (np.log(np.maximum(amounts, _TINY)) - chosen[:, 1]) / _deviation(chosen[:, 2])
    normal = NormalDist()
    inside = np.array([normal.cdf(float(value)) for value in standard], np.float64)
    return 1.0 - share + np.where(amounts > 0, share * inside, 0.0)


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    result: Floats = np.exp(-np.logaddexp(0.0, -values))
    return result


def logit(probability: Floats) -> Floats:
    """log(p / (1 - p)), p kept away from 0 and 1."""
    inside = np.clip(probability, _TINY, 1.0 - _TINY)
    result: Floats = np.log(inside) - np.log1p(-inside)
    return result


def _deviation(raw: Floats) -> Floats:
    return np.minimum(np.exp(np.clip(raw, -_MAX_DEVIATION, _MAX_DEVIATION)), _MAX_DEVIATION)


def _one_deviation(raw: float) -> float:
    return min(math.exp(min(max(raw, -_MAX_DEVIATION), _MAX_DEVIATION)), _MAX_DEVIATION)


def _softplus(value: float) -> float:
    """log(1 + exp(x)), without overflow."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def _sigmoid(value: float) -> float:
    return math.exp(-_softplus(-value))


def _quantile(spec: HeadSpec, chosen: Sequence[float], level: float) -> float:
    """The smallest amount that is not exceeded with probability `level`, from the head's own outputs."""
    if spec.transform == "count":
        mean = spec.parameters["scale"] * math.exp(min(chosen[0], _MAX_LOG_AMOUNT))
        return _count_quantile(mean, spec.parameters["dispersion"], level)
    share = _sigmoid(chosen[0])
    # Given a purchase, the level that is left after the customers who spend nothing.
    inside = (level - (1.0 - share)) / max(share, _TINY)
    if inside <= 0:
        return 0.0
    return math.exp(min(chosen[1] + _one_deviation(chosen[2]) * _normal_quantile(inside), _MAX_LOG_AMOUNT))


def _normal_quantile(level: float) -> float:
    return NormalDist().inv_cdf(min(max(level, _TINY), 1.0 - _TINY))


def _count_terms(mean: float, dispersion: float) -> tuple[float, float, float]:
    """P(0), and a, b of the recurrence P(k) = P(k - 1) * (a + b / k): Poisson where dispersion is 0."""
    mean = max(mean, _TINY)
    if dispersion <= 0:
        return math.exp(-mean), 0.0, mean
    size = 1.0 / dispersion
    ratio = mean / (mean + size)
    return float((size / (mean + size)) ** size), ratio, (size - 1.0) * ratio


def _count_cdf(mean: float, dispersion: float, count: int) -> float:
    term, a, b = _count_terms(mean, dispersion)
    total = term
    for k in range(1, min(count, _MAX_COUNT) + 1):
        term *= a + b / k
        total += term
    return min(total, 1.0)


def _count_quantile(mean: float, dispersion: float, level: float) -> float:
    term, a, b = _count_terms(mean, dispersion)
    total, k = term, 0
    while total < level and k < _MAX_COUNT:
        k += 1
        term *= a + b / k
        total += term
    return float(k)
