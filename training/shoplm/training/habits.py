"""What a shop's customers do with its items: buy them again, and buy them together.

Loyalty of item i, from n_i purchases (visits that it was bought in) by d_i customers: n_i - d_i of them were repeats,

    loyalty_i = log((n_i - d_i + 1) / (d_i + 3)), less its mean over all purchases,

the log-odds that a purchase comes again, drawn to those of a repeat in four where little is known. An item that nobody
bought has 0.

Neighbours, by ridge regression of what a customer buys on what the customer buys (EASE without its diagonal, Steck,
arXiv:1905.03375). With X [customers, items] binary, each row divided by the root of its length, and X = U diag(s) V',

    S = V diag(s^2 / (s^2 + 1)) V',

of which the largest entries of each row, off the diagonal, are kept. V is found by randomised projection and has a
fixed rank, so the cost is bounded: items^2 x rank multiplications in blocks of rows, and memory for what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy import sparse
from shoplm.bundle import ScoreWeights
from shoplm.readout.habits import Neighbours, habit_table
from shoplm.training.shop import Shop
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

CUSTOMERS = 20_000  # at most, at random
NEIGHBOURS = 50  # of an item
_RANK = 128
_RIDGE = 1.0
_LEAST_CUSTOMERS = 5  # an item that fewer bought has no neighbours and is none
_BLOCK = 256  # rows of S in memory at once


@dataclass(frozen=True)
class ShopHabits:
    """What the shop's customers did with its items, up to a moment."""

    loyalty: NDArray[np.float32]  # [items]
    neighbours: Neighbours

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a bundle stores."""
        return {
            "loyalty": torch.from_numpy(self.loyalty),
            "neighbours.starts": torch.from_numpy(self.neighbours.starts.astype(np.int32)),
            "neighbours.items": torch.from_numpy(self.neighbours.items),
            "neighbours.strengths": torch.from_numpy(self.neighbours.strengths).half(),
        }


class PastPurchases(NamedTuple):
    """Who bought which row when, once per visit: [P] each."""

    customer: NDArray[np.int64]
    item: NDArray[np.int64]
    time: NDArray[np.float64]


def purchases_before(shop: Shop, until: float) -> PastPurchases:
    """Purchases of items with a row, before `until` (Unix seconds), in the log's order."""
    known = (pl.col("time") < until) & (pl.col("kind") == int(shop.items.label_kind))
    bought = shop.log.events.filter(known).select("customer", "time", "item")
    visits = bought.filter(pl.Series(shop.items.has_row[bought["item"].to_numpy()])).unique(maintain_order=True)
    customer, item = visits["customer"].to_numpy(), shop.items.index[visits["item"].to_numpy()]
    return PastPurchases(customer.astype(np.int64), item.astype(np.int64), visits["time"].to_numpy())


def shop_habits(shop: Shop, until: float, seed: int) -> ShopHabits:
    """The habits in the purchases before `until` (Unix seconds) alone."""
    customer, item, _ = purchases_before(shop, until)
    count = len(shop.items.row_item)
    return ShopHabits(loyalty(customer, item, count), neighbours(customer, item, count, seed))


def bundled_habits(shop: Shop, goes_with: float, seed: int) -> ShopHabits:
    """The habits that a bundle stores: up to `test_at`, without neighbours where these have no weight."""
    found = shop_habits(shop, shop.timeline.test_at, seed)
    return found if goes_with else replace(found, neighbours=Neighbours.none(len(found.loyalty)))


def read_habits(score: ScoreWeights, tensors: Mapping[str, Tensor]) -> ShopHabits:
    """The habits of a bundle. One of format 1 has none: its weights of them are 0."""
    items = len(tensors["popularity"])
    table = habit_table(score, lambda name: tensors[name].numpy() if name in tensors else None)
    table.check(items)
    nothing = np.zeros(items, np.float32)
    return ShopHabits(nothing if table.loyalty is None else table.loyalty, table.neighbours or Neighbours.none(items))


def loyalty(customer: NDArray[np.integer], item: NDArray[np.integer], items: int) -> NDArray[np.float32]:
    """Loyalty of each item [items], from purchases: who bought what, once per visit."""
    purchases = np.bincount(item, minlength=items)
    pairs = np.unique(np.stack([customer, item]), axis=1)
    customers = np.bincount(pairs[1], minlength=items)
    odds = np.log((purchases - customers + 1.0) / (customers + 3.0))
    centred = odds - (odds * purchases).sum() / max(int(purchases.sum()), 1)
    return np.where(purchases > 0, centred, 0.0).astype(np.float32)


def neighbours(customer: NDArray[np.integer], item: NDArray[np.integer], items: int, seed: int) -> Neighbours:
    """Neighbours of all items, from who bought what; repetitions count once."""
    chosen, found = item_factors(customer, item, items, seed)
    return _largest(found, chosen, items) if len(chosen) > 1 else Neighbours.none(items)


def item_factors(
    customer: NDArray[np.integer], item: NDArray[np.integer], items: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The items that enough customers bought, and V sqrt(s^2 / (s^2 + 1)) of each: S is its product with itself."""
    pairs = np.unique(np.stack([customer, item]).astype(np.int64), axis=1)
    people = np.unique(pairs[0])
    if len(people) > CUSTOMERS:
        people = np.sort(np.random.default_rng(seed).choice(people, CUSTOMERS, replace=False))
    pairs = pairs[:, np.isin(pairs[0], people)]
    chosen = np.flatnonzero(np.bincount(pairs[1], minlength=items) >= _LEAST_CUSTOMERS)
    pairs = pairs[:, np.isin(pairs[1], chosen)]
    if len(chosen) < 2:
        return chosen[:0], np.zeros((0, 1), np.float32)
    lengths = np.bincount(pairs[0])
    values = (1.0 / np.sqrt(lengths[pairs[0]])).astype(np.float32)
    at = np.searchsorted(people, pairs[0]), np.searchsorted(chosen, pairs[1])
    table = sparse.csr_matrix((values, at), shape=(len(people), len(chosen)))
    rank = min(_RANK, *table.shape)
    _, singular, basis = randomized_svd(table, rank, random_state=seed)
    return chosen, (basis.T * np.sqrt(singular**2 / (singular**2 + _RIDGE))).astype(np.float32)


def _largest(factors: NDArray[np.float32], chosen: NDArray[np.int64], items: int) -> Neighbours:
    """The largest positive entries off the diagonal of factors x factors', for the `chosen` items."""
    count = len(chosen)
    kept = min(NEIGHBOURS, count - 1)
    lengths = np.zeros(items, np.int64)
    columns: list[NDArray[np.int32]] = []
    strengths: list[NDArray[np.float32]] = []
    for start in range(0, count, _BLOCK):
        block = factors[start : start + _BLOCK] @ factors.T
        rows = np.arange(len(block))
        block[rows, start + rows] = -np.inf
        found = np.argpartition(-block, kept - 1, axis=1)[:, :kept]
        found.sort(axis=1)
        value = np.take_along_axis(block, found, axis=1)
        positive = value > 0.0
        lengths[chosen[start : start + len(block)]] = positive.sum(axis=1)
        columns.append(chosen[found[positive]].astype(np.int32))
        # As the bundle keeps them.
        strengths.append(value[positive].astype(np.float16).astype(np.float32))
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return Neighbours(starts, np.concatenate(columns), np.concatenate(strengths))
