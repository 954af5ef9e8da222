"""What a shop would build in an afternoon: the baselines that the card compares with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.bundle import HeadSpec
from shoplm.history import SECONDS_PER_DAY
from shoplm.training.examples import Examples
from shoplm.training.histories import Histories
from shoplm.training.labels import behaviour
from shoplm.training.predictions import Observed
from shoplm.training.scoring import TOP, Weights, Window, tune
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor


def popularity_ranking(window: Window) -> NDArray[np.int64]:
    """The same most-bought items for everyone: [N, k]."""
    return window.rank(Weights(0.0, 0.0, 1.0, 1.0), None)


def frequency_ranking(examples: Examples, histories: Histories, popularity: torch.Tensor) -> NDArray[np.int64]:
    """Group, then personal frequency: what the customer bought in most baskets, ties and the rest by popularity.

    The strong baseline of next-basket work (Li et al., arXiv:2109.14233).
    """
    by_popularity = np.lexsort((np.arange(len(popularity)), -popularity.numpy()))
    rank_of = np.empty(len(by_popularity), np.int64)
    rank_of[by_popularity] = np.arange(len(by_popularity))
    k = min(TOP, len(by_popularity))
    ranked = np.zeros((len(examples), k), np.int64)
    for index, (customer, moment) in enumerate(zip(examples.customer, examples.moment, strict=True)):
        known = histories[int(customer)].before(float(moment))
        bought = known.own
        pairs = np.unique(np.stack([known.item[bought], known.basket[bought]], axis=1), axis=0)
        rows, baskets = np.unique(pairs[:, 0], return_counts=True)
        own = rows[np.lexsort((rank_of[rows], -baskets))][:k]
        rest = by_popularity[: 2 * k][~np.isin(by_popularity[: 2 * k], own)][: k - len(own)]
        ranked[index] = np.concatenate([own, rest])
    return ranked


def tuned_count_weights(window: Window) -> Weights:
    """Decayed count plus popularity, both tuned on the validation window: the gate that a model has to pass."""
    return tune(window, None, Weights(model=0.0, repeat=1.0, popularity=0.05, decay_days=120.0))


def boosted_probability(
    features: NDArray[np.float32], outcome: NDArray[np.bool_], test: NDArray[np.float32], seed: int
) -> NDArray[np.float64]:
    """Gradient boosting on recency, frequency, money and the other dense features: [N] of `test` [N, F]."""
    if outcome.all() or not outcome.any():
        return np.full(len(test), float(outcome.mean()))
    model = HistGradientBoostingClassifier(
        learning_rate=0.05, max_iter=150, max_leaf_nodes=15, min_samples_leaf=40, random_state=seed
    )
    result: NDArray[np.float64] = model.fit(features, outcome).predict_proba(test)[:, 1]
    return result


def boosted_amount(
    features: NDArray[np.float32], amounts: NDArray[np.float64], test: NDArray[np.float32], seed: int
) -> NDArray[np.float64]:
    """Gradient boosting for the mean of counts or amounts (Poisson deviance): [N]."""
    if not amounts.any():
        return np.zeros(len(test))
    model = HistGradientBoostingRegressor(
        loss="poisson", learning_rate=0.05, max_iter=150, max_leaf_nodes=15, min_samples_leaf=40, random_state=seed
    )
    result: NDArray[np.float64] = model.fit(features, amounts).predict(test)
    return result


def own_mean(
    rows: Observed, histories: Histories, item_prices: NDArray[np.float32], spec: HeadSpec
) -> NDArray[np.float64]:
    """Each customer's mean visits or spend per horizon since the first event, which counts as one horizon ago at the
    least: [N]."""
    means = np.zeros(len(rows))
    for index, (customer, moment) in enumerate(zip(rows.customer.tolist(), rows.moment.tolist(), strict=True)):
        known = histories[customer].before(moment)
        first = float(known.time[0])
        days = max((moment - first) / SECONDS_PER_DAY, float(spec.horizon_days))
        past = behaviour(known, first, int(np.ceil(days)) + 1, item_prices)
        total = past.visits if spec.kind == "purchase_count" else past.spend
        means[index] = total * spec.horizon_days / days
    return means
