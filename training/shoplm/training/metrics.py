"""Quality of rankings and of predictions. Definitions are in the docstrings; numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from shoplm.readout.targets import logit

Floats = NDArray[np.float64]
CALIBRATION_BINS = 10
FEWEST_CUSTOMERS = 30  # for an interval: resampled, fewer look surer than they are
_NORMAL_975 = 1.959963984540054
_NEWTON_STEPS = 50
_LARGEST_CONDITION = 1e12
_ROW_BITS = 32


@dataclass(frozen=True, slots=True)
class BasketQuality:
    """Per customer [N], NaN where the customer has nothing to find."""

    recall: Floats  # found / size of the basket
    ndcg: Floats  # binary relevance, log2 discount, ideal over min(k, size)
    repeat_recall: Floats  # among the basket's items that the customer had bought before
    explore_recall: Floats  # among the others

    def means(self) -> dict[str, float]:
        """Means over the customers that have something to find."""
        named = {
            "recall": self.recall,
            "ndcg": self.ndcg,
            "repeat_recall": self.repeat_recall,
            "explore_recall": self.explore_recall,
        }
        return {name: float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for name, v in named.items()}


class Baskets:
    """What N customers bought, and had bought before: rankings are measured against them again and again."""

    def __init__(self, baskets: list[NDArray[np.int32]], owned: list[NDArray[np.int32]]) -> None:
        """`baskets` what was bought; `owned` what the customer had bought before: catalogue rows."""
        self._keys = _keys(baskets)
        self._again = np.isin(self._keys, _keys(owned))
        self._customer = self._keys >> _ROW_BITS
        self._sizes = self._per_customer(np.ones(len(self._keys), bool), len(baskets))
        self._repeated = self._per_customer(self._again, len(baskets))

    def quality(self, ranked: NDArray[np.integer]) -> BasketQuality:
        """`ranked` [N, k] rows, best first."""
        count, k = ranked.shape
        discounts = 1.0 / np.log2(np.arange(2, k + 2))
        ideal = np.concatenate([[0.0], np.cumsum(discounts)])
        chosen = _keys(list(ranked))
        hit = np.isin(chosen, self._keys).reshape(count, k)
        found = np.isin(self._keys, chosen)
        again = self._per_customer(found & self._again, count)
        others = self._per_customer(found & ~self._again, count)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: nothing to find
            return BasketQuality(
                recall=hit.sum(axis=1) / self._sizes,
                ndcg=(hit * discounts).sum(axis=1) / ideal[np.minimum(k, self._sizes)],
                repeat_recall=again / self._repeated,
                explore_recall=others / (self._sizes - self._repeated),
            )

    def _per_customer(self, counted: NDArray[np.bool_], customers: int) -> NDArray[np.intp]:
        return np.bincount(self._customer[counted], minlength=customers)


def _keys(rows: Sequence[NDArray[np.integer]]) -> NDArray[np.int64]:
    """Rows of all customers in one axis, each with its customer's index above the row's bits."""
    customer = np.repeat(np.arange(len(rows)), [len(each) for each in rows])
    return (customer << _ROW_BITS) | np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)


def bootstrap_difference(ours: Floats, theirs: Floats, *, seed: int, rounds: int = 2000) -> tuple[float, float, float]:
    """Mean paired difference and its 95 % bootstrap interval (percentiles, customers resampled)."""
    both = np.isfinite(ours) & np.isfinite(theirs)
    difference = (ours - theirs)[both]
    return _bootstrap(lambda rows: float(difference[rows].mean()), len(difference), seed, rounds)


def bootstrap_statistic(
    statistic: Callable[[Floats, NDArray[np.bool_]], float],
    ours: Floats,
    theirs: Floats,
    outcome: NDArray[np.bool_],
    *,
    seed: int,
    rounds: int = 1000,
) -> tuple[float, float, float]:
    """Difference of a statistic of probabilities, ours minus theirs on the same rows, and its 95 % bootstrap interval
    (percentiles, rows resampled; those without a value are left out)."""

    def difference(rows: NDArray[np.intp]) -> float:
        return statistic(ours[rows], outcome[rows]) - statistic(theirs[rows], outcome[rows])

    return _bootstrap(difference, len(outcome), seed, rounds)


def _bootstrap(
    difference: Callable[[NDArray[np.intp]], float], count: int, seed: int, rounds: int
) -> tuple[float, float, float]:
    """The difference of all rows, 0 to `count`, and the interval of those of rows that are drawn from them: of too few
    rows, NaN."""
    if 0 < count < FEWEST_CUSTOMERS:
        return difference(np.arange(count)), float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    found = np.array([difference(generator.integers(0, count, count)) for _ in range(rounds if count else 0)])
    if not np.isfinite(found).any():
        return float("nan"), float("nan"), float("nan")
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return difference(np.arange(count)), float(low), float(high)


def auc(probability: Floats, outcome: NDArray[np.bool_]) -> float:
    """Area under the ROC curve, ties counted half; NaN with one class only."""
    positives, negatives = int(outcome.sum()), int((~outcome).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(probability, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2.0
    return float((ranks[inverse][outcome].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def brier(probability: Floats, outcome: NDArray[np.bool_]) -> float:
    """Mean squared difference between probability and outcome."""
    return float(np.mean((probability - outcome) ** 2)) if len(outcome) else float("nan")


def top_decile_lift(probability: Floats, outcome: NDArray[np.bool_]) -> float:
    """Share of outcomes among the tenth of the customers with the highest probabilities, over the share of all; NaN
    without an outcome. Ties: the earlier customer first."""
    if not outcome.any():
        return float("nan")
    chosen = np.argsort(-probability, kind="stable")[: max(len(outcome) // 10, 1)]
    return float(outcome[chosen].mean() / outcome.mean())


def reliability(probability: Floats, outcome: NDArray[np.bool_]) -> list[tuple[int, float, float]]:
    """(customers, mean probability, observed share) in ten bins of as many customers each."""
    order = np.argsort(probability, kind="stable")
    bins = [part for part in np.array_split(order, CALIBRATION_BINS) if len(part)]
    return [(len(part), float(probability[part].mean()), float(outcome[part].mean())) for part in bins]


def calibration_error(probability: Floats, outcome: NDArray[np.bool_]) -> float:
    """Expected calibration error over ten bins of as many customers each."""
    bins = reliability(probability, outcome)
    total = sum(count for count, _, _ in bins)
    return sum(count * abs(mean - share) for count, mean, share in bins) / total if total else float("nan")


def calibration_slope(probability: Floats, outcome: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Slope of a logistic regression of the outcome on logit(p), with its 95 % interval (Wald): 1 where probabilities
    are neither too extreme (below 1) nor too timid (above 1). Cox, Biometrika 45 (1958). NaN where it has no optimum.
    """
    score = logit(probability)
    return _coefficient(np.stack([score, np.ones_like(score)], axis=1), np.zeros_like(score), outcome)


def calibration_intercept(probability: Floats, outcome: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Intercept of the same regression with the slope held at 1, with its 95 % interval (Wald): 0 where as many come
    as were foretold. "Calibration-in-the-large", Van Calster et al., BMC Medicine 17:230 (2019)."""
    score = logit(probability)
    return _coefficient(np.ones((len(score), 1)), score, outcome)


def _coefficient(x: Floats, offset: Floats, outcome: NDArray[np.bool_]) -> tuple[float, float, float]:
    """The first coefficient of a logistic regression and its 95 % interval, by Newton's method."""
    nothing = float("nan"), float("nan"), float("nan")
    beta = np.zeros(x.shape[1])
    if outcome.all() or not outcome.any():
        return nothing
    for _ in range(_NEWTON_STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ beta + offset, -30.0, 30.0)))
        information = (x * (p * (1.0 - p))[:, None]).T @ x
        if np.linalg.cond(information) > _LARGEST_CONDITION:
            return nothing  # separable data, or one probability for all
        change = np.linalg.solve(information, x.T @ (p - outcome))
        beta = beta - change
        if np.abs(change).max() < 1e-9:
            error = _NORMAL_975 * float(np.sqrt(np.linalg.inv(information)[0, 0]))
            return float(beta[0]), float(beta[0]) - error, float(beta[0]) + error
    return nothing
