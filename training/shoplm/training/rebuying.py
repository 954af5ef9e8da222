"""Fits the net that says which own items a customer buys again (`shoplm.readout.rebuy`).

Each example is a next basket. Its items are draws from a softmax over the customer's own items and one more outcome,
whatever had not been bought before, of value 0; an example counts by the root of its items. Several nets are fitted
from different starts and averaged, which is one net of all their units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from shoplm.history import SECONDS_PER_DAY, EventKind
from shoplm.readout.rebuy import HISTORY_FEATURES, Rebuy, history_features
from shoplm.training.examples import Examples, ranking_examples
from shoplm.training.habits import loyalty
from shoplm.training.samples import HiddenTable, Task, Use
from shoplm.training.scoring import Weights
from shoplm.training.shop import Shop
from torch import Tensor

FEWEST_EXAMPLES = 500  # with fewer, nothing is fitted
MOST_EXAMPLES = 50_000  # at random
MEMBERS, UNITS = 3, 32
_EPOCHS, _BATCH = 4, 64
_LEARNING_RATE, _DECAY = 1e-2, 1e-4
_LATELY_DAYS = 28.0
_USUAL_GAPS = 3.0  # how many gaps of usual length an item's mean begins with
_LEAST_DEVIATION = 1e-3  # of a feature that is to be told from a constant

Floats = NDArray[np.float32]


def fit_rebuy(shop: Shop, table: HiddenTable, seed: int) -> Rebuy | None:
    """From next baskets before `tuned_at`, with the items' features as they were at the cut before each, and those of
    `tuned_at` in the result; None where there are too few. `table` may be bare."""
    cuts = np.array(shop.timeline.train_at)
    chosen = table.where(Task.RECOMMEND, Use.ITEM_TRAIN)
    chosen = chosen[table.moment[chosen] >= cuts[0]]
    if len(chosen) > MOST_EXAMPLES:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, MOST_EXAMPLES, replace=False))
    before = shop.timeline.tuned_at
    kind = shop.items.label_kind
    examples = ranking_examples(table, chosen, shop.histories, kind, before=before, decay_days=1.0)
    data = _Data.of(shop, examples, cuts)
    if len(data.lengths) < FEWEST_EXAMPLES or not data.bought.any():
        return None
    mean, scale = data.features.mean(axis=0), data.features.std(axis=0)
    # A constant says nothing, and may say anything of an item unlike those of the training.
    inverse = np.where(scale > _LEAST_DEVIATION, 1.0 / np.maximum(scale, _LEAST_DEVIATION), 0.0).astype(np.float32)
    inputs = torch.from_numpy((data.features - mean) * inverse)
    nets = [_fit(inputs, data, seed * MEMBERS + member) for member in range(MEMBERS)]
    weight = np.concatenate([net.first.T for net in nets]) * inverse
    bias = np.concatenate([net.shift for net in nets]) - weight @ mean
    out = np.concatenate([net.second for net in nets]) / MEMBERS
    return Rebuy(
        items=item_features(shop, before),
        types=shop.items.row_types,
        weight=weight.astype(np.float32),
        bias=bias.astype(np.float32),
        out=out.astype(np.float32),
        out_bias=float(np.mean([net.bias for net in nets], dtype=np.float32)),
    )


def bundled_rebuy(shop: Shop, rebuy: Rebuy | None, weights: Weights) -> Rebuy | None:
    """As a bundle of these weights keeps it: with `own` in its values and the items' features as they were at
    `test_at`; None where it does not count."""
    if rebuy is None or not weights.rebuy:
        return None
    items = item_features(shop, shop.timeline.test_at)
    return replace(rebuy, items=items, out_bias=rebuy.out_bias + weights.own / weights.rebuy)


def rebuy_tensors(rebuy: Rebuy) -> dict[str, Tensor]:
    """As a bundle keeps them."""
    arrays = {name: getattr(rebuy, name) for name in ("items", "types", "weight", "bias", "out")}
    named = {f"rebuy.{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return {**named, "rebuy.out_bias": torch.tensor([rebuy.out_bias])}


def item_features(shop: Shop, until: float) -> Floats:
    """ITEM_FEATURES of each row, [items, I], from the purchases before `until` (Unix seconds) alone."""
    known = (pl.col("time") < until) & (pl.col("kind") == int(EventKind.PURCHASE))
    bought = shop.log.events.filter(known).select("customer", "time", "item")
    visits = bought.filter(pl.Series(shop.items.has_row[bought["item"].to_numpy()])).unique(maintain_order=True)
    item, customer = shop.items.index[visits["item"].to_numpy()].astype(np.int64), visits["customer"].to_numpy()
    time, items = visits["time"].to_numpy(), len(shop.items.row_item)
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


@dataclass(frozen=True)
class _Net:
    first: Floats  # [F, U]
    shift: Floats  # [U]
    second: Floats  # [U]
    bias: float


def _fit(inputs: Tensor, data: _Data, seed: int) -> _Net:
    """One net, for standardised features [N, F]."""
    generator = torch.Generator().manual_seed(seed)
    width = inputs.shape[1]
    first = torch.randn(width, UNITS, generator=generator) / width**0.5
    second = 0.1 * torch.randn(UNITS, generator=generator)
    shift, bias = torch.zeros(UNITS), torch.zeros(1)
    parameters = [first, second, shift, bias]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_DECAY)
    examples = len(data.lengths)
    steps = _EPOCHS * -(-examples // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=max(steps, 2))
    starts = np.concatenate([[0], np.cumsum(data.lengths)])
    bought, others = torch.from_numpy(data.bought.astype(np.float32)), torch.from_numpy(data.others)
    for _ in range(_EPOCHS):
        order = torch.randperm(examples, generator=generator).numpy()
        for at in range(0, examples, _BATCH):
            chosen = order[at : at + _BATCH]
            rows = torch.from_numpy(np.concatenate([np.arange(starts[one], starts[one + 1]) for one in chosen]))
            owner = torch.from_numpy(np.repeat(np.arange(len(chosen)), data.lengths[chosen]))
            values = torch.relu(inputs[rows] @ first + shift) @ second + bias
            loss = _loss(values, owner, bought[rows], others[torch.from_numpy(chosen)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return _Net(first.numpy(), shift.numpy(), second.numpy(), float(bias))


def _loss(values: Tensor, owner: Tensor, bought: Tensor, others: Tensor) -> Tensor:
    """Mean over the examples; `owner` [n] is the example of each value, `others` [examples]."""
    zeros = torch.zeros_like(others)
    largest = zeros.scatter_reduce(0, owner, values.detach(), "amax")  # at least 0, the other outcome's value
    total = torch.exp(-largest).index_add(0, owner, torch.exp(values - largest[owner]))
    found = zeros.index_add(0, owner, values * bought)
    items = zeros.index_add(0, owner, bought) + others
    normaliser = largest + torch.log(total)
    return ((items * normaliser - found) / items.sqrt()).mean()
