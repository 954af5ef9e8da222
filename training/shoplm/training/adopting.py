"""Fits the net that says which items a customer buys for the first time (`shoplm.readout.adopt`).

Each example is a next basket. Its new items are draws from a softmax over all items that the customer has not bought
yet; an example counts once, whatever its size, as in the recall that lists of new items are measured by. A logistic
loss on the share of new items in the basket gives the values their level beside the own items'. The softmax is over a
sample, each item weighted by how seldom it is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from shoplm.history import SECONDS_PER_DAY
from shoplm.readout.adopt import ITEM_FEATURES, OWN_FEATURES, Adopt, adopt_arrays, from_steps, in_steps, own_features
from shoplm.training.examples import Examples
from shoplm.training.habits import PastPurchases, item_factors, loyalty, purchases_before
from shoplm.training.item_nets import fit_item_net
from shoplm.training.rebuying import basket_examples
from shoplm.training.samples import HiddenTable
from shoplm.training.shop import Shop
from torch import Tensor
from torch.nn import functional

FEWEST_EXAMPLES = 500  # with fewer, nothing is fitted
MOST_EXAMPLES = 10_000  # at random
MEMBERS, UNITS = 2, 24
SAMPLED = 200  # items per example
CUSTOMERS = 20_000  # at most, for what was bought first lately
_LATELY_DAYS = 28.0
_RIDGE = 10.0
_LATELY_SCALE = 32.0  # or a fit takes their strengths, which hardly vary, for a constant
_SHARES = (0.4, 0.3, 0.3)  # of the sample: by first purchases lately, by purchases, all alike

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ShopTables:
    """The shop's part of the features, as it was at a moment."""

    items: Floats  # [items, I]
    factors: Floats  # [items, R]
    lately: Floats  # [items, R]


def fit_adopt(shop: Shop, table: HiddenTable, seed: int) -> Adopt | None:
    """Fit the net to next baskets before `tuned_at`, with the shop's tables as they were at the cut before each, and
    those of `tuned_at` in the result; None where there are too few. `table` may be bare."""
    examples = basket_examples(shop, table, MOST_EXAMPLES, seed)
    if len(examples) < FEWEST_EXAMPLES:
        return None
    data = _Data.of(shop, examples, seed)
    if len(data.lengths) < FEWEST_EXAMPLES or not data.bought.any():
        return None
    net = fit_item_net(data.features, data.lengths, data.loss, members=MEMBERS, units=UNITS, seed=seed)
    return Adopt(types=shop.items.row_types, **vars(shop_tables(shop, shop.timeline.tuned_at, seed)), **vars(net))


def bundled_adopt(shop: Shop, adopt: Adopt | None, weight: float, seed: int) -> Adopt | None:
    """The net that a bundle stores: with the shop's tables as they were at `test_at`; None where its weight is 0."""
    if adopt is None or not weight:
        return None
    return replace(adopt, **vars(shop_tables(shop, shop.timeline.test_at, seed)))


def adopt_tensors(adopt: Adopt) -> dict[str, Tensor]:
    """The tensors that a bundle stores."""
    return {name: torch.from_numpy(array) for name, array in adopt_arrays(adopt).items()}


def shop_tables(shop: Shop, until: float, seed: int) -> ShopTables:
    """The shop's tables, from the purchases before `until` (Unix seconds) alone."""
    bought, items = purchases_before(shop, until), len(shop.items.row_item)
    chosen, found = item_factors(bought.customer, bought.item, items, seed)
    factors = np.zeros((items, found.shape[1]), np.float32)
    factors[chosen] = _stored(found)
    first = _first(bought, items)
    lately = _stored(_drawn_lately(bought, first, factors, until, seed))
    return ShopTables(_item_features(shop, bought, first, until), factors, lately)


def _first(bought: PastPurchases, items: int) -> NDArray[np.bool_]:
    """[P]: the customer's first purchase of the item."""
    order = np.lexsort((bought.time, bought.item, bought.customer))
    key = (bought.customer * items + bought.item)[order]
    first = np.zeros(len(key), np.bool_)
    first[order] = np.concatenate(([True], key[1:] != key[:-1]))[: len(key)]
    return first


def _item_features(shop: Shop, bought: PastPurchases, first: NDArray[np.bool_], until: float) -> Floats:
    """ITEM_FEATURES of each row: [items, I]."""
    customer, item, time = bought
    items, types = len(shop.items.row_item), shop.items.row_types
    age = (until - time) / SECONDS_PER_DAY
    per_month = _LATELY_DAYS / max((until - shop.timeline.start) / SECONDS_PER_DAY, _LATELY_DAYS)

    def log_count(days: float, among: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        kept = age <= days if among is None else (age <= days) & among
        counted: NDArray[np.float64] = np.log(np.bincount(item[kept], minlength=items) + 0.5)
        return counted

    buyers, started = (
        np.bincount(item[first], minlength=items),
        np.bincount(item[first & (age <= 28.0)], minlength=items),
    )
    known = np.zeros(items)
    np.maximum.at(known, item, age)
    columns = (
        np.log(np.bincount(item, minlength=items) * per_month + 0.5),
        log_count(28.0),
        log_count(7.0),
        np.log(buyers * per_month + 0.5),
        *(log_count(days, first) for days in (28.0, 14.0, 7.0)),
        loyalty(customer, item, items),
        np.log1p(known),
        np.log(np.bincount(types, buyers) * per_month + 0.5)[types],
        np.log(np.bincount(types, started) + 0.5)[types],
    )
    return np.stack(columns, axis=1).astype(np.float32)


def _drawn_lately(bought: PastPurchases, first: NDArray[np.bool_], factors: Floats, until: float, seed: int) -> Floats:
    """[items, R], by ridge regression of what customers bought for the first time lately, each one's items divided by
    the root of their number, on the factors of what they had bought before."""
    since = until - _LATELY_DAYS * SECONDS_PER_DAY
    items, old = len(factors), bought.time < since
    people = np.unique(bought.customer[old])
    if len(people) > CUSTOMERS:
        people = np.sort(np.random.default_rng(seed).choice(people, CUSTOMERS, replace=False))
    before = _shares(bought, first & old, people, items) @ factors
    started = _shares(bought, first & ~old, people, items)
    gram = before.T @ before + _RIDGE * np.eye(factors.shape[1], dtype=np.float32)
    found: Floats = (np.linalg.solve(gram, (started.T @ before).T) * _LATELY_SCALE).T.astype(np.float32)
    return found


def _shares(
    bought: PastPurchases, chosen: NDArray[np.bool_], people: NDArray[np.int64], items: int
) -> sparse.csr_matrix:
    """[people, items]: of the `chosen` purchases, each customer's divided by the root of their number."""
    chosen = chosen & np.isin(bought.customer, people)
    row, item = np.searchsorted(people, bought.customer[chosen]), bought.item[chosen]
    count = np.bincount(row, minlength=len(people))
    return sparse.csr_matrix(((count[row] ** -0.5).astype(np.float32), (row, item)), shape=(len(people), items))


def _stored(values: Floats) -> Floats:
    """The values, rounded as a bundle stores them."""
    return from_steps(*in_steps(values))


@dataclass(frozen=True)
class _Data:
    """The new items of the next basket and a sample of the others, one example after another."""

    features: Floats  # [N, O + I]
    bought: NDArray[np.bool_]  # [N]: in the next basket
    counted: Floats  # [N]: log of how many items each stands for
    lengths: NDArray[np.int64]  # [examples]
    again: Floats  # [examples]: items of the next basket that were bought before

    @classmethod
    def of(cls, shop: Shop, examples: Examples, seed: int) -> _Data:
        random, types = np.random.default_rng(seed), shop.items.row_types
        features = [np.zeros((0, len(OWN_FEATURES) + len(ITEM_FEATURES)), np.float32)]
        bought, counted, again = [np.zeros(0, np.bool_)], [np.zeros(0, np.float32)], []
        cuts = shop.timeline.train_at
        cut_of = np.searchsorted(cuts, examples.moment, side="right") - 1
        lengths = []
        for cut, until in enumerate(cuts):
            tables = shop_tables(shop, until, seed)
            chance = _chances(tables.items)
            cumulated = np.cumsum(chance)
            for index in np.flatnonzero(cut_of == cut).tolist():
                own, basket = examples.owned.row(index).astype(np.int64), examples.baskets.row(index)
                if not len(own):
                    continue
                new = np.setdiff1d(basket, own).astype(np.int64)
                drawn = np.minimum(np.searchsorted(cumulated, random.random(SAMPLED)), len(chance) - 1)
                drawn = drawn[~np.isin(drawn, np.concatenate((own, new)))]
                rows = np.concatenate((new, drawn))
                if not len(rows):
                    continue
                found = own_features(tables.factors, tables.lately, types, own, rows)
                features.append(np.concatenate((found, tables.items[rows]), axis=1))
                bought.append(np.arange(len(rows)) < len(new))
                counted.append(np.where(bought[-1], 0.0, -np.log(SAMPLED * chance[rows])).astype(np.float32))
                again.append(len(basket) - len(new))
                lengths.append(len(rows))
        return cls(
            np.concatenate(features),
            np.concatenate(bought),
            np.concatenate(counted),
            np.array(lengths, np.int64),
            np.array(again, np.float32),
        )

    def loss(self, values: Tensor, owner: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
        """The loss for `fit_item_net`."""
        bought, counted = torch.from_numpy(self.bought)[rows].float(), torch.from_numpy(self.counted)[rows]
        return _loss(values, owner, bought, counted, torch.from_numpy(self.again)[chosen])


def _chances(items: Floats) -> NDArray[np.float64]:
    """[items]: of being drawn, by what the items' features say."""
    lately, purchases = (ITEM_FEATURES.index(name) for name in ("log_first_purchases_28d", "log_purchases"))
    parts = np.exp(items[:, lately]), np.exp(items[:, purchases]), np.ones(len(items))
    result: NDArray[np.float64] = np.sum(
        [share * part / part.sum(dtype=np.float64) for share, part in zip(_SHARES, parts, strict=True)], axis=0
    )
    return result


def _loss(values: Tensor, owner: Tensor, bought: Tensor, counted: Tensor, again: Tensor) -> Tensor:
    """Mean over the examples; `owner` [n] is the example of each value, `again` [examples]."""
    zeros = torch.zeros_like(again)
    weighed = values + counted
    largest = (zeros - torch.inf).scatter_reduce(0, owner, weighed.detach(), "amax")
    normaliser = largest + torch.log(zeros.index_add(0, owner, torch.exp(weighed - largest[owner])))
    new = zeros.index_add(0, owner, bought)
    which = (new * normaliser - zeros.index_add(0, owner, values * bought)) / new.clamp(min=1.0)
    whether = functional.softplus(normaliser) - normaliser * new / (new + again)
    return (which + whether).mean()
