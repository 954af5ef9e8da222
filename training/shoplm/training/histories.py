"""Customers' histories from the log, as the server would have seen them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from shoplm.history import History, build_history
from shoplm.training.catalogue import ShopItems
from shoplm.training.log import ShopLog


class Histories:
    """One History per customer, with all events of the log; use its `before` for what was known at a moment.

    A visit that goes on across one of `cuts` (Unix seconds) becomes two, so that `before(cut)` never sees the events
    that came after the cut. At other moments `Histories.before` leaves them out, and the visit is one.
    """

    def __init__(self, log: ShopLog, items: ShopItems, cuts: Sequence[float]) -> None:
        self._log = log
        self._items = items
        events = log.events.with_columns(_split_visits(cuts))
        item = events["item"].to_numpy()
        self._columns = {
            "item": items.index[item],
            "has_item": items.has_row[item],
            "kind": events["kind"].to_numpy(),
            "time": events["time"].to_numpy(),
            "quantity": events["quantity"].to_numpy(),
            "price": events["price"].to_numpy(),
        }
        self._baskets = events["basket"].to_numpy().astype(str)
        customers = events["customer"].to_numpy()
        self._starts = np.searchsorted(customers, np.arange(len(log.customer_ids) + 1))

    def __len__(self) -> int:
        return len(self._log.customer_ids)

    def __getitem__(self, customer: int) -> History:
        if not 0 <= customer < len(self):
            raise IndexError(customer)
        return self._built(customer, slice(self._starts[customer], self._starts[customer + 1]), None)

    def before(self, customer: int, history: History, moment: float) -> History:
        """What was known of a customer, whose `history` is given, at any moment: nothing of what a visit that had
        begun went on with."""
        start, end = self._starts[customer], self._starts[customer + 1]
        rows = start + np.flatnonzero(self._columns["time"][start:end] < moment)
        if len(rows) == int((history.time < moment).sum()):
            return history.before(moment)
        return self._built(customer, rows, moment)

    def _built(self, customer: int, rows: slice | NDArray[np.intp], as_of: float | None) -> History:
        """The history of some of the customer's events; `as_of` None: just after them."""
        columns = {name: values[rows] for name, values in self._columns.items()}
        return build_history(
            **columns,
            basket_key=self._baskets[rows],
            as_of=float(columns["time"].max()) + 1.0 if as_of is None else as_of,
            attributes=self._log.attributes.get(self._log.customer_ids[customer], ()),
            counted=self._items.label_kind,
        )

    def __iter__(self) -> Iterator[History]:
        return (self[customer] for customer in range(len(self)))


def _split_visits(cuts: Sequence[float]) -> pl.Expr:
    """The visit's id, with a number behind it where the visit lies on both sides of a cut."""
    part = pl.sum_horizontal(pl.lit(0, pl.Int32), *((pl.col("time") >= cut).cast(pl.Int32) for cut in cuts))
    key = ["customer", "basket"]
    straddles = (part.max().over(key) > part.min().over(key)) & (pl.col("basket") != "")
    return pl.when(straddles).then(pl.concat_str("basket", pl.lit("/"), part)).otherwise("basket").alias("basket")
