"""Quality of rankings and of predictions. Definitions are in the docstrings; numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CALIBRATION_BINS = 10


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


def basket_quality(
    ranked: NDArray[np.integer], baskets: list[NDArray[np.int32]], owned: list[NDArray[np.int32]]
) -> BasketQuality:
    """`ranked` [N, k] rows, best first; `baskets` what was bought; `owned` what the customer had bought before."""
    count, k = ranked.shape
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])
    values = np.full((4, count), np.nan)
    for index in range(count):
        basket = baskets[index]
        if not len(basket):
            continue
        hit = np.isin(ranked[index], basket)
        again = np.isin(basket, owned[index])
        found = np.isin(basket, ranked[index])
        values[0, index] = hit.sum() / len(basket)
        values[1, index] = (hit * discounts).sum() / ideal[min(k, len(basket))]
        if again.any():
            values[2, index] = found[again].mean()
        if not again.all():
            values[3, index] = found[~again].mean()
    return BasketQuality(*values)


def bootstrap_difference(ours: Floats, theirs: Floats, *, seed: int, rounds: int = 2000) -> tuple[float, float, float]:
    """Mean paired difference and its 95 % bootstrap interval (percentiles, customers resampled)."""
    both = np.isfinite(ours) & np.isfinite(theirs)
    difference = (ours - theirs)[both]
    if not len(difference):
        return float("nan"), float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    means = np.array(
        [difference[generator.integers(0, len(difference), len(difference))].mean() for _ in range(rounds)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


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
