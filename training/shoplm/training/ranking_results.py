"""Measures recommendations beside baselines: who wins, for whom, with what kind of items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.training import baselines
from shoplm.training.examples import Examples
from shoplm.training.metrics import BasketQuality, bootstrap_difference
from shoplm.training.model import Model
from shoplm.training.ranker import OutputRows
from shoplm.training.report import (
    BASKETS,
    COUNT,
    OURS,
    POPULARITY,
    TIFU,
    Breakdown,
    Difference,
    Exploration,
    RankingResult,
    RankingRow,
    known,
)
from shoplm.training.samples import HiddenTable
from shoplm.training.scoring import Logits, Weights, Window
from shoplm.training.shop import Shop
from shoplm.training.tifu_knn import Purchases, TifuSettings, tifu_ranking, tuned_tifu

TIFU_POOL = 5000  # customers among whom neighbours are looked for
_VISITS = (5, 20, 50)  # upper bounds of the groups of customers
_ITEM_SHARES = (0.01, 0.1, 0.5, 1.0)  # of the items, most often bought first


@dataclass(frozen=True)
class Rivals:
    """The baselines, tuned on the validation window."""

    count: Weights
    tifu: TifuSettings
    pool: Purchases  # of the customers who may be neighbours, as known when the test begins


def tuned_rivals(shop: Shop, window: Window, seed: int) -> Rivals:
    """`window` holds next baskets between `tuned_at` and `test_at`."""
    everyone = np.arange(len(shop.histories), dtype=np.int32)
    pool = np.sort(np.random.default_rng(seed).permutation(everyone)[:TIFU_POOL])
    count = baselines.tuned_count_weights(window)
    queries = _purchases(shop, window.examples)
    tifu = tuned_tifu(window, queries, _pool(shop, pool, shop.timeline.tuned_at))
    return Rivals(count, tifu, _pool(shop, pool, shop.timeline.test_at))


def measure_ranking(
    name: str,
    shop: Shop,
    table: HiddenTable,
    examples: Examples,
    model: Model,
    rivals: Rivals,
    seed: int,
) -> RankingResult:
    """One split; `examples` index `table`."""
    popularity, weights = model.popularity, model.weights
    window = Window(examples, shop.histories, popularity, model.habits, model.rebuy, model.adopt)
    logits = _ModelLogits(model.rows, table.hidden[examples.sample])
    ranked = {
        POPULARITY: baselines.popularity_ranking(window),
        "group, then personal frequency": baselines.frequency_ranking(examples, shop.histories, popularity),
        COUNT: window.rank(rivals.count, None),
        TIFU: tifu_ranking(_purchases(shop, examples), rivals.pool, rivals.tifu),
        "language model alone": window.rank(Weights(1.0, 0.0, 0.0, weights.decay_days), logits),
        OURS: window.rank(weights, logits),
    }
    quality = {key: window.quality(found) for key, found in ranked.items()}
    ours = quality[OURS]
    return RankingResult(
        split=name,
        customers=len(examples),
        rows=tuple(_row(key, found) for key, found in quality.items()),
        recall_over_count=difference(ours.recall, quality[COUNT].recall, seed),
        ndcg_over_count=difference(ours.ndcg, quality[COUNT].ndcg, seed),
        recall_over_tifu=difference(ours.recall, quality[TIFU].recall, seed),
        ndcg_over_tifu=difference(ours.ndcg, quality[TIFU].ndcg, seed),
        exploration=_exploration(window, weights, logits, seed),
        by_visits=_by_visits(shop, examples, {key: quality[key] for key in (POPULARITY, COUNT, OURS)}),
        by_popularity=_by_popularity(
            window, {key: ranked[key] for key in (POPULARITY, COUNT, OURS)}, len(shop.items.row_item)
        ),
    )


@dataclass(frozen=True)
class _ModelLogits:
    """Made as they are asked for: of all customers and items of a large shop they would take gigabytes."""

    rows: OutputRows
    hidden: NDArray[np.float32]  # [N, H]

    def __getitem__(self, chunk: NDArray[np.intp], /) -> torch.Tensor:
        return self.rows.logits(torch.from_numpy(self.hidden[chunk]))


def difference(ours: NDArray[np.float64], theirs: NDArray[np.float64], seed: int) -> Difference:
    """Paired, over the customers that both have a value for."""
    return Difference(*map(known, bootstrap_difference(ours, theirs, seed=seed)))


def _row(name: str, quality: BasketQuality) -> RankingRow:
    means = quality.means()
    return RankingRow(
        name, means["recall"], means["ndcg"], known(means["repeat_recall"]), known(means["explore_recall"])
    )


def _exploration(window: Window, weights: Weights, logits: Logits, seed: int) -> Exploration | None:
    lists = {
        POPULARITY: window.rank(Weights(0.0, 0.0, 1.0, 1.0), None, new_only=True),
        OURS: window.rank(weights, logits, new_only=True),
    }
    recall = {name: window.quality(ranked).explore_recall for name, ranked in lists.items()}
    measured = np.isfinite(recall[OURS])
    if not measured.any():
        return None
    return Exploration(
        customers=int(measured.sum()),
        recall={name: float(values[measured].mean()) for name, values in recall.items()},
        over_popularity=difference(recall[OURS], recall[POPULARITY], seed),
    )


def _by_visits(shop: Shop, examples: Examples, quality: dict[str, BasketQuality]) -> tuple[Breakdown, ...]:
    moments = zip(examples.customer.tolist(), examples.moment.tolist(), strict=True)
    visits = np.array([len(np.unique(shop.histories[c].before(m).basket)) for c, m in moments])
    groups = []
    for low, high in zip((0, *_VISITS), (*_VISITS, None), strict=True):
        inside = (visits > low) & (visits <= high if high is not None else True)
        if inside.any():
            values = {name: float(found.recall[inside].mean()) for name, found in quality.items()}
            groups.append(Breakdown(f"{low + 1} to {high}" if high else f"over {low}", int(inside.sum()), values))
    return tuple(groups)


def _by_popularity(window: Window, ranked: dict[str, NDArray[np.int64]], items: int) -> tuple[Breakdown, ...]:
    """Rows are numbered by how often they were bought, so a row's number is its rank."""
    shown = {name: found.ravel() for name, found in ranked.items()} | {BASKETS: window.examples.baskets.columns}
    groups, first, before = [], 0, 0.0
    for share in _ITEM_SHARES:
        end = max(round(share * items), first + 1) if share < 1.0 else items
        if end > first:
            values = {name: float(((rows >= first) & (rows < end)).mean()) for name, rows in shown.items()}
            groups.append(Breakdown(f"{before:.0%} to {share:.0%}", end - first, values))
        first, before = end, share
    return tuple(groups)


def _purchases(shop: Shop, examples: Examples) -> Purchases:
    return Purchases(shop.histories, examples.customer, examples.moment, len(shop.items.row_item))


def _pool(shop: Shop, customers: NDArray[np.int32], moment: float) -> Purchases:
    return Purchases(shop.histories, customers, np.full(len(customers), moment), len(shop.items.row_item))
