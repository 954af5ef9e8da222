"""The predictions of one customer from the heads' raw values, in plain floats.

The same as `shoplm.readout.targets` gives for many in arrays, which describes the transforms: for one customer an array
costs ten times the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple, TypeAlias

from shoplm.bundle import HeadSpec
from shoplm.history import SECONDS_PER_DAY, EventKind, History

MAX_LOG_AMOUNT = 16.0  # exp of this is beyond any basket: a defect upstream cannot become an infinite answer
MAX_DEVIATION = 3.0
TINY = 1e-7
_LEAST_ODDS, _MOST_ODDS = TINY / (1.0 - TINY), (1.0 - TINY) / TINY
_MAX_COUNT = 10_000
_LEAST_LOG_ZERO = -700.0  # of the probability of 0; e^-745 is the least float
_MOST_LOGIT = 20.0  # a hazard of this logit leaves less of a chance than TINY
_NORMAL = NormalDist()
_PURCHASE = int(EventKind.PURCHASE)


class Answer(NamedTuple):
    """One prediction. Either `probability`, or `amount` with its 90 % interval where it has one."""

    probability: float | None = None
    amount: float | None = None
    interval_low: float | None = None
    interval_high: float | None = None


Reader: TypeAlias = Callable[[Sequence[float]], Answer]  # from the head's raw values [P]


def reader(spec: HeadSpec) -> Reader:
    """How a target is read, its parameters looked up once."""
    if spec.transform == "count":
        return _count_reader(spec)
    if spec.transform == "zero_inflated_lognormal":
        return _lognormal_reader(spec)
    return _probability_reader(spec)


def answer(spec: HeadSpec, values: Sequence[float]) -> Answer:
    """The prediction of one customer from the head's raw values [P]."""
    return reader(spec)(values)


def usual(spec: HeadSpec) -> Answer:
    """The prediction of a customer of whom nothing is known: the mean over all customers, and no interval."""
    if spec.transform in ("count", "zero_inflated_lognormal"):
        return Answer(amount=spec.base_rate)
    return Answer(probability=spec.base_rate)


def score_of(spec: HeadSpec, values: Sequence[float]) -> float:
    """The answer on the scale on which effects are given: log-odds of a probability, logarithm of an amount."""
    found = answer(spec, values)
    if found.probability is not None:
        inside = min(max(found.probability, TINY), 1.0 - TINY)
        return math.log(inside) - math.log1p(-inside)
    return math.log(max(found.amount or 0.0, TINY))


def seconds_since_purchase(history: History) -> float:
    """Seconds from the last purchase to `as_of`; infinite where there is none."""
    return history.as_of - last_purchase(history)


def last_purchase(history: History) -> float:
    """When the last purchase was, in Unix seconds; -infinite where there is none."""
    bought = (history.kind == _PURCHASE).nonzero()[0]
    return float(history.time[bought[-1]]) if len(bought) else -math.inf


def applies(spec: HeadSpec, since_purchase: float) -> bool:
    """Whether a customer who last bought this many seconds ago belongs to the target's population."""
    return since_purchase <= population_seconds(spec)


def population_seconds(spec: HeadSpec) -> float:
    """How long ago the customers of the target's population last bought, at most; infinite where it is everybody."""
    return spec.active_within_days * SECONDS_PER_DAY if spec.active_within_days > 0 else math.inf


def count_quantile(mean: float, dispersion: float, level: float) -> float:
    """The smallest count that is not exceeded with probability `level`: negative binomial."""
    if (normal := _far_from_zero(mean, dispersion)) is not None:
        return max(math.ceil(normal.inv_cdf(min(max(level, TINY), 1.0 - TINY)) - 0.5), 0.0)
    term, a, b = _count_terms(mean, dispersion)
    total, k = term, 0
    while total < level and k < _MAX_COUNT:
        k += 1
        term *= a + b / k
        total += term
    return float(k)


def count_cdf(mean: float, dispersion: float, count: int) -> float:
    """P(a count <= this one): negative binomial."""
    if (normal := _far_from_zero(mean, dispersion)) is not None:
        return normal.cdf(count + 0.5)
    term, a, b = _count_terms(mean, dispersion)
    total = term
    for k in range(1, min(count, _MAX_COUNT) + 1):
        term *= a + b / k
        total += term
    return min(total, 1.0)


def lognormal_quantile(share: float, mean: float, deviation: float, level: float) -> float:
    """The smallest amount that is not exceeded with probability `level`: 0 with probability 1 - share, else exp of a
    normal."""
    # Given a purchase, the level that is left after the customers who spend nothing.
    inside = (level - (1.0 - share)) / max(share, TINY)
    if inside <= 0:
        return 0.0
    return math.exp(min(mean + deviation * _NORMAL.inv_cdf(min(max(inside, TINY), 1.0 - TINY)), MAX_LOG_AMOUNT))


def one_sigmoid(value: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1.0 / (1.0 + math.exp(-value)) if value > -700.0 else 0.0


def one_deviation(raw: float) -> float:
    """The deviation of the log amount from a head's raw value."""
    return min(math.exp(min(max(raw, -MAX_DEVIATION), MAX_DEVIATION)), MAX_DEVIATION)


def _probability_reader(spec: HeadSpec) -> Reader:
    outputs = spec.outputs
    slope, intercept = spec.parameters["slope"], spec.parameters["intercept"]
    if spec.transform == "survival":
        slope = -slope  # of the odds that the event comes
    exp, log = math.exp, math.log

    def read(values: Sequence[float]) -> Answer:
        # A sigmoid is a hazard of one step. 1 / (1 - s(a)) is 1 + exp(a), and p / (1 - p) is 1 / (1 - p) - 1.
        inverse = 1.0
        for index in outputs:
            logit = values[index]
            inverse *= 1.0 + exp(logit if logit < _MOST_LOGIT else _MOST_LOGIT)
        odds = min(max(inverse - 1.0, _LEAST_ODDS), _MOST_ODDS)
        return Answer(one_sigmoid(slope * log(odds) + intercept))

    return read


def _count_reader(spec: HeadSpec) -> Reader:
    parameters, (output,) = spec.parameters, spec.outputs
    scale, dispersion = parameters["scale"], parameters["dispersion"]
    level_low, level_high = parameters["level_low"], parameters["level_high"]
    level = parameters.get("level_amount")

    def read(values: Sequence[float]) -> Answer:
        mean = scale * math.exp(min(values[output], MAX_LOG_AMOUNT))
        amount = mean if level is None else count_quantile(mean, dispersion, level)
        low = count_quantile(mean, dispersion, level_low)
        return _amount(amount, low, count_quantile(mean, dispersion, level_high))

    return read


def _lognormal_reader(spec: HeadSpec) -> Reader:
    parameters, (first, second, third) = spec.parameters, spec.outputs
    scale = parameters["scale"]
    level_low, level_high = parameters["level_low"], parameters["level_high"]
    level = parameters.get("level_amount")

    def read(values: Sequence[float]) -> Answer:
        share, mean, deviation = one_sigmoid(values[first]), values[second], one_deviation(values[third])
        if level is None:
            amount = scale * share * math.exp(min(mean + deviation**2 / 2, MAX_LOG_AMOUNT))
        else:
            amount = lognormal_quantile(share, mean, deviation, level)
        low = lognormal_quantile(share, mean, deviation, level_low)
        return _amount(amount, low, lognormal_quantile(share, mean, deviation, level_high))

    return read


def _amount(amount: float, low: float, high: float) -> Answer:
    # The mean of a skewed distribution can lie outside a central interval; the caller gets one that holds it.
    return Answer(None, amount, min(low, amount), max(high, amount))


def _far_from_zero(mean: float, dispersion: float) -> NormalDist | None:
    """The normal distribution of the same moments where the probability of 0 is too small for a float."""
    log_zero = -mean if dispersion <= 0 else -math.log1p(dispersion * mean) / dispersion
    if log_zero > _LEAST_LOG_ZERO:
        return None
    return NormalDist(mean, math.sqrt(mean + max(dispersion, 0.0) * mean * mean))


def _count_terms(mean: float, dispersion: float) -> tuple[float, float, float]:
    """P(0), and a, b of the recurrence P(k) = P(k - 1) * (a + b / k): Poisson where dispersion is 0."""
    mean = max(mean, TINY)
    if dispersion <= 0:
        return math.exp(-mean), 0.0, mean
    size = 1.0 / dispersion
    ratio = mean / (mean + size)
    return float((size / (mean + size)) ** size), ratio, (size - 1.0) * ratio
