"""Fits the parameters by which raw head values become answers, on values that heads gave rows they had not seen."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray
from shoplm.bundle import HeadSpec
from shoplm.readout.targets import (
    PROBABILITIES,
    distribution,
    logit,
    probabilities,
    quantiles,
    raw_probabilities,
    unscaled_amounts,
)

_LEVEL_BOUNDS = (0.001, 0.999)
# Where most customers do nothing, 5 % of them lie below a lower end only if it is above nothing for those likeliest to
# buy, most of whom do nothing, too. An interval of nine in ten does not leave out what has a chance of one in four.
_LARGEST_LOW = 0.25
AMOUNT_LEVELS = tuple(round(0.4 + 0.02 * step, 2) for step in range(18))  # 0.4 to 0.74
_STEPS = tuple(0.5**halvings for halvings in range(20))


def calibrated(spec: HeadSpec, values: NDArray[np.float64], truth: NDArray[np.float64]) -> HeadSpec:
    """The spec with parameters fitted on `values` [N, P] and `truth` [N] of rows that the head was not fitted on."""
    if spec.transform in PROBABILITIES:
        slope, intercepts = platt(logit(raw_probabilities(spec, values)), truth, np.zeros(len(truth), np.int64), 1)
        return with_line(spec, slope, intercepts[0])
    means = unscaled_amounts(spec, values)
    scale = float(truth.sum() / max(means.sum(), 1e-9)) or 1.0
    parameters = {"scale": scale, "level_low": 0.05, "level_high": 0.95}
    if spec.transform == "count":
        # Method of moments for variance = mean + dispersion * mean^2.
        mean = scale * means
        excess = float(((truth - mean) ** 2 - mean).sum() / max(float((mean**2).sum()), 1e-9))
        parameters["dispersion"] = max(excess, 0.0)
    draft = msgspec.structs.replace(spec, parameters=parameters)
    if spec.transform == "zero_inflated_lognormal":
        # The median is what is off by the least; the fitted one is not where the true one is. Where that is nothing for
        # most customers, it tells them not apart, and the expected amount does.
        tried = [quantiles(draft, values, level) for level in AMOUNT_LEVELS]
        best = int(np.argmin([float(np.abs(amounts - truth).mean()) for amounts in tried]))
        if float(np.median(tried[best])) > 0.0:
            parameters["level_amount"] = AMOUNT_LEVELS[best]
    # y < low exactly where F(y) < level_low, and y > high exactly where F(just below y) >= level_high.
    at = distribution(draft, values, truth)
    below = np.where(truth > 0, at, 0.0)
    if spec.transform == "count":
        below = np.where(truth > 0, distribution(draft, values, truth - 1.0), 0.0)
    levels = float(np.quantile(at, 0.05)), float(np.quantile(below, 0.95))
    low, high = (float(np.clip(level, *_LEVEL_BOUNDS)) for level in levels)
    low = min(low, _LARGEST_LOW)
    return msgspec.structs.replace(spec, parameters={**parameters, "level_low": low, "level_high": max(high, low)})


def growing(
    specs: Sequence[HeadSpec], values: NDArray[np.float64], truths: Sequence[NDArray[np.float64]]
) -> list[HeadSpec]:
    """Calibrated chances that an event comes within ever longer horizons, from `values` [N, P] and one truth [N] each,
    with lines that do not cross: as they are where none of the rows sees a chance fall; else with one slope and
    intercepts that never fall."""
    chances = [probabilities(spec, values) for spec in specs]
    if all((later >= sooner).all() for sooner, later in pairwise(chances)):
        return list(specs)
    score = np.concatenate([logit(raw_probabilities(spec, values)) for spec in specs])
    outcome, horizon = np.concatenate(truths), np.repeat(np.arange(len(specs)), len(values))
    block = np.arange(len(specs))  # horizons that share an intercept
    while True:
        slope, intercepts = platt(score, outcome, block[horizon], int(block[-1]) + 1)
        if slope < 0.0:  # the score says nothing: chances are what is usual
            score = np.zeros_like(score)
            continue
        falls = [index for index, (sooner, later) in enumerate(pairwise(intercepts)) if later < sooner]
        if not falls:
            slope = slope if score.any() else 0.0
            return [with_line(spec, slope, intercepts[at]) for spec, at in zip(specs, block.tolist(), strict=True)]
        block = np.where(block > falls[0], block - 1, block)


def with_line(spec: HeadSpec, slope: float, intercept: float) -> HeadSpec:
    """The spec of a chance with the parameters of its calibration."""
    return msgspec.structs.replace(spec, parameters={"slope": slope, "intercept": intercept})


def platt(
    score: NDArray[np.float64], outcome: NDArray[np.float64], group: NDArray[np.integer], groups: int
) -> tuple[float, list[float]]:
    """A slope, and an intercept for each of the `groups` that rows belong to: `group` [N]. By maximum likelihood
    (Newton), with a faint pull to 1 and 0 for separable data and groups without rows."""
    x = np.concatenate([score[:, None], np.eye(groups)[group]], axis=1)
    prior = np.eye(1 + groups)[0]

    def loss(at: NDArray[np.float64]) -> float:
        score_at = x @ at
        fit = (np.logaddexp(0.0, score_at) - outcome * score_at).sum()
        return float(fit + 0.5 * ((at - prior) ** 2).sum())

    beta = prior.copy()
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ beta, -30, 30)))
        gradient = x.T @ (p - outcome) + (beta - prior)
        hessian = (x * (p * (1.0 - p))[:, None]).T @ x + np.eye(1 + groups)
        change = np.linalg.solve(hessian, gradient)
        # Far from the optimum a whole Newton step can overshoot without end.
        size = next((s for s in _STEPS if loss(beta - s * change) < loss(beta)), 0.0)
        beta = beta - size * change
        if np.abs(size * change).max() < 1e-9:
            break
    return float(beta[0]), beta[1:].tolist()
