"""TIFU-KNN: next baskets from the customer's own frequencies and those of customers who buy alike.

Hu, He, Gao and Zhang, "Modeling personalized item frequency information for next-basket recommendation"
(arXiv:2006.00556). A customer's n baskets, oldest first, are split into m groups of n // m baskets, the newest n % m of
them one larger; with fewer than m baskets each is a group. The customer's vector over items is

    u = 1 / groups * sum over baskets i of  r_b ^ (n - 1 - i) * r_g ^ (m - 1 - group(i)) / size(group(i)) * v_i

with v_i the basket's multi-hot vector, r_b decaying from basket to basket and r_g from group to group, both as in the
code that the paper's numbers come from (in its text, r_b starts anew in every group). Scores are
alpha * u + (1 - alpha) * mean of the k nearest customers' vectors, Euclidean distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from shoplm.training.histories import Histories
from shoplm.training.scoring import TOP, Window, chunks, top

_CHUNK = 256  # customers whose scores over all items are in memory at once


@dataclass(frozen=True, slots=True)
class TifuSettings:
    """Defaults are the paper's for Ta-Feng, a grocer like most shops that this is compared on."""

    neighbours: int = 300
    groups: int = 7
    within_decay: float = 0.9
    group_decay: float = 0.7
    own_share: float = 0.7  # alpha


GRIDS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("own_share", (0.3, 0.5, 0.7, 0.9, 1.0)),
    ("within_decay", (0.8, 0.95, 0.98, 1.0)),
    ("group_decay", (0.5, 0.9, 1.0)),
    ("groups", (3, 15)),
    ("neighbours", (100, 900)),
)


class Purchases:
    """Baskets of N customers, each as it was known at a moment."""

    def __init__(
        self, histories: Histories, customers: NDArray[np.integer], moments: NDArray[np.floating], items: int
    ) -> None:
        """`items` is the number of catalogue rows; purchases of other items are left out."""
        self.customers = np.asarray(customers)
        pairs: list[NDArray[np.int64]] = []
        counts = []
        last, history = None, None
        for customer, moment in zip(self.customers.tolist(), moments.tolist(), strict=True):
            if history is None or customer != last:
                last, history = customer, histories[customer]
            known = history.before(moment)
            bought = known.own
            baskets, index = np.unique(known.basket[bought], return_inverse=True)
            pairs.append(np.unique(np.stack([known.item[bought], index]).astype(np.int64), axis=1))
            counts.append(len(baskets))
        self._row = np.repeat(np.arange(len(pairs)), [pair.shape[1] for pair in pairs])
        self._item, self._basket = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
        self._baskets = np.array(counts, np.int64)
        self._items = items

    def __len__(self) -> int:
        return len(self.customers)

    def vectors(self, settings: TifuSettings) -> sparse.csr_matrix:
        """[N, items] fp32."""
        weights = basket_weights(self._baskets[self._row], self._basket, settings).astype(np.float32)
        return sparse.csr_matrix((weights, (self._row, self._item)), shape=(len(self), self._items))


def basket_weights(baskets: NDArray[np.int64], index: NDArray[np.int64], settings: TifuSettings) -> NDArray[np.float64]:
    """The weight of basket `index` (0 is the oldest) of a customer with so many `baskets`: [E]."""
    groups = settings.groups
    size, larger = np.maximum(baskets // groups, 1), baskets % groups
    small = (groups - larger) * size  # baskets in the groups of the smaller size
    few = baskets < groups
    in_small = few | (index < small)
    group = np.where(in_small, index // size, (groups - larger) + (index - small) // (size + 1))
    own_size = np.where(in_small, size, size + 1)
    decay = settings.within_decay ** (baskets - 1 - index) * settings.group_decay ** (groups - 1 - group)
    result: NDArray[np.float64] = decay / own_size / np.minimum(baskets, groups)
    return result


def tifu_ranking(queries: Purchases, pool: Purchases, settings: TifuSettings) -> NDArray[np.int64]:
    """[N, 10] best rows for the `queries`; neighbours are the other customers of the `pool`."""
    own, others = queries.vectors(settings), pool.vectors(settings)
    k = min(TOP, own.shape[1])
    ranked = np.zeros((len(queries), k), np.int64)
    norms = np.asarray(others.multiply(others).sum(axis=1)).ravel()
    for chunk in chunks(len(queries), _CHUNK):
        scores = settings.own_share * own[chunk].toarray()
        if settings.own_share < 1.0:
            # The query's own norm is the same for all of its neighbours.
            distance = norms[None] - 2.0 * (own[chunk] @ others.T).toarray()
            distance[queries.customers[chunk][:, None] == pool.customers[None]] = np.inf
            scores += (1.0 - settings.own_share) * _neighbour_mean(distance, others, settings.neighbours)
        ranked[chunk] = top(torch.from_numpy(scores), k)
    return ranked


def _neighbour_mean(distance: NDArray[np.floating], others: sparse.csr_matrix, k: int) -> NDArray[np.float32]:
    """[N, items]: means over the `k` nearest of the pool, all that are finite where it has fewer."""
    k = min(k, distance.shape[1])
    nearest = np.argpartition(distance, k - 1, axis=1)[:, :k] if k else np.zeros((len(distance), 0), np.int64)
    finite = np.isfinite(np.take_along_axis(distance, nearest, axis=1))
    row, column = np.repeat(np.arange(len(distance)), k)[finite.ravel()], nearest.ravel()[finite.ravel()]
    share = (1.0 / np.maximum(finite.sum(axis=1), 1))[row].astype(np.float32)
    chosen = sparse.csr_matrix((share, (row, column)), shape=distance.shape)
    result: NDArray[np.float32] = (chosen @ others).toarray()
    return result


def tuned_tifu(
    window: Window, queries: Purchases, pool: Purchases, grids: Sequence[tuple[str, Sequence[float]]] = GRIDS
) -> TifuSettings:
    """Settings with the best NDCG on a validation window (`queries` are its examples, in its order): one pass of
    coordinate ascent from the paper's."""
    best = TifuSettings()
    best_quality = _ndcg(window, queries, pool, best)
    for name, grid in grids:
        for value in grid:
            candidate = replace(best, **{name: value})  # type: ignore[arg-type]
            quality = _ndcg(window, queries, pool, candidate)
            if quality > best_quality:
                best, best_quality = candidate, quality
    return best


def _ndcg(window: Window, queries: Purchases, pool: Purchases, settings: TifuSettings) -> float:
    if not len(queries):
        return 0.0
    return window.quality(tifu_ranking(queries, pool, settings)).means()["ndcg"]
