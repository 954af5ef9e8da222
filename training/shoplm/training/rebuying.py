"""Fits the net that says which own items a customer buys again (`shoplm.readout.rebuy`).

Each example is a next basket. Its items are draws from a softmax over the customer's own items and one more outcome,
whatever had not been bought before, of value 0; an example counts by the root of its items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.history import SECONDS_PER_DAY
from shoplm.readout.rebuy import HISTORY_FEATURES, Rebuy, history_features
from shoplm.training.examples import Examples, ranking_examples
from shoplm.training.habits import loyalty, purchases_before
from shoplm.training.item_nets import fit_item_net
from shoplm.training.samples import HiddenTable, Task, Use
from shoplm.training.scoring import Weights
from shoplm.training.shop import Shop
from torch import Tensor

FEWEST_EXAMPLES = 500  # with fewer, nothing is fitted
MOST_EXAMPLES = 50_000  # at random
MEMBERS, UNITS = 3, 32
_LATELY_DAYS = 28.0
_USUAL_GAPS = 3.0  # how many gaps of usual length an item's mean begins with

Floats = NDArray[np.float32]


def fit_rebuy(shop: Shop, table: HiddenTable, seed: int) -> Rebuy | None:
    """Fit the net to next baskets before `tuned_at`, with the items' features as they were at the cut before each, and
    those of `tuned_at` in the result; None where there are too few. `table` may be bare."""
    examples, cuts = basket_examples(shop, table, MOST_EXAMPLES, seed), np.array(shop.timeline.train_at)
    data = _Data.of(shop, examples, cuts)
    if len(data.lengths) < FEWEST_EXAMPLES or not data.bought.any():
        return None
    net = fit_item_net(data.features, data.lengths, data.loss, members=MEMBERS, units=UNITS, seed=seed)
    return Rebuy(items=item_features(shop, shop.timeline.tuned_at), types=shop.items.row_types, **vars(net))


def basket_examples(shop: Shop, table: HiddenTable, most: int, seed: int) -> Examples:
    """Next baskets before `tuned_at` after moments since the first cut of training, at most so many, at random."""
    chosen = table.where(Task.RECOMMEND, Use.ITEM_TRAIN)
    chosen = chosen[table.moment[chosen] >= shop.timeline.train_at[0]]
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, most, replace=False))
    before, kind = shop.timeline.tuned_at, shop.items.label_kind
    return ranking_examples(table, chosen, shop.histories, kind, before=before, decay_days=1.0)


def bundled_rebuy(shop: Shop, rebuy: Rebuy | None, weights: Weights) -> Rebuy | None:
    """The net that a bundle of these weights stores: with `own` in its values and the items' features as they were at
    `test_at`; None where it does not count."""
    if rebuy is None or not weights.rebuy:
        return None
    items = item_features(shop, shop.timeline.test_at)
    return replace(rebuy, items=items, out_bias=rebuy.out_bias + weights.own / weights.rebuy)


def rebuy_tensors(rebuy: Rebuy) -> dict[str, Tensor]:
    """The tensors that a bundle stores."""
    arrays = {name: getattr(rebuy, name) for name in ("items", "types", "weight", "bias", "out")}
    named = {f"rebuy.{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return {**named, "rebuy.out_bias": torch.tensor([rebuy.out_bias])}


def item_features(shop: Shop, until: float) -> Floats:
    """ITEM_FEATURES of each row, [items, I], from the purchases before `until` (Unix seconds) alone."""
    customer, item, time = purchases_before(shop, until)
    items = len(shop.items.row_item)
    order = np.lexsort((time, item, customer))
    item, customer, time = item[order], customer[order], time[order]
    again = (item[1:] == item[:-1]) & (customer[1:] == customer[:-1])
    gaps, gap_item = (np.diff(time) / SECONDS_PER_DAY)[again], item[1:][again]
    usual = float(gaps.mean()) if len(gaps) else _LATELY_DAYS
    total, count = np.bincount(gap_item, gaps, items), np.bincount(gap_item, minlength=items)
    days = max((until - shop.timeline.start) / SECONDS_PER_DAY, _LATELY_DAYS)
    lately = np.bincount(item[time >= until - _LATELY_DAYS * SECONDS_PER_DAY], minlength=items)
    columns = (
        loyalty(customer, item, items),
        np.log(np.bincount(item, minlength=items) * _LATELY_DAYS / days + 0.5),
        np.log(lately + 0.5),
        np.log1p((total + _USUAL_GAPS * usual) / (count + _USUAL_GAPS)),
    )
    return np.stack(columns, axis=1).astype(np.float32)


@dataclass(frozen=True)
class _Data:
    """Own items of all examples, one example after another."""

    features: Floats  # [N, F]
    bought: NDArray[np.bool_]  # [N]: in the next basket
    lengths: NDArray[np.int64]  # [examples]: own items
    others: Floats  # [examples]: items of the next basket that were not bought before

    @classmethod
    def of(cls, shop: Shop, examples: Examples, cuts: NDArray[np.float64]) -> _Data:
        shops = [item_features(shop, float(cut)) for cut in cuts]
        types = shop.items.row_types
        features, bought, others = [], [], []
        last = None
        for index in range(len(examples)):
            customer, moment = int(examples.customer[index]), float(examples.moment[index])
            if customer != last:
                history, last = shop.histories[customer], customer
            rows, values = history_features(history.before(moment), types)
            if not len(rows):
                continue
            basket = examples.baskets.row(index)
            of_items = shops[int(np.searchsorted(cuts, moment, side="right")) - 1][rows]
            features.append(np.concatenate((values, of_items), axis=1))
            bought.append(np.isin(rows, basket))
            others.append(len(basket) - bought[-1].sum())
        width = len(HISTORY_FEATURES) + shops[0].shape[1]
        return cls(
            np.concatenate([np.zeros((0, width), np.float32), *features]),
            np.concatenate([np.zeros(0, np.bool_), *bought]),
            np.array([len(each) for each in bought], np.int64),
            np.array(others, np.float32),
        )

    def loss(self, values: Tensor, owner: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
        """The loss for `fit_item_net`."""
        bought = torch.from_numpy(self.bought)[rows].float()
        return _loss(values, owner, bought, torch.from_numpy(self.others)[chosen])


def _loss(values: Tensor, owner: Tensor, bought: Tensor, others: Tensor) -> Tensor:
    """Mean over the examples; `owner` [n] is the example of each value, `others` [examples]."""
    zeros = torch.zeros_like(others)
    largest = zeros.scatter_reduce(0, owner, values.detach(), "amax")  # at least 0, the other outcome's value
    total = torch.exp(-largest).index_add(0, owner, torch.exp(values - largest[owner]))
    found = zeros.index_add(0, owner, values * bought)
    items = zeros.index_add(0, owner, bought) + others
    normaliser = largest + torch.log(total)
    return ((items * normaliser - found) / items.sqrt()).mean()
