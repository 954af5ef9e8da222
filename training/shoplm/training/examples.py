"""Ranking examples: who, when, what was bought next, and what had been bought before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.history import EventKind
from shoplm.training.histories import Histories
from shoplm.training.labels import next_basket
from shoplm.training.samples import HiddenTable
from torch import Tensor


@dataclass(frozen=True)
class Sparse:
    """Rows of (columns, values), as one flat list per side."""

    starts: NDArray[np.int64]  # [N + 1]
    columns: NDArray[np.int32]
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> NDArray[np.int32]:
        """Columns of one row."""
        return self.columns[self.starts[index] : self.starts[index + 1]]

    def first(self, count: int) -> Sparse:
        """The first `count` rows."""
        starts = self.starts[: count + 1]
        return Sparse(starts, self.columns[: starts[-1]], self.values[: starts[-1]])

    def select(self, rows: NDArray[np.integer]) -> tuple[Tensor, Tensor, Tensor]:
        """(position in `rows`, column, value) of all entries of these rows: int64, int64, fp32."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        position = np.repeat(np.arange(len(rows)), lengths)
        offset = np.arange(len(position)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        at = np.repeat(self.starts[rows], lengths) + offset
        return (
            torch.from_numpy(position),
            torch.from_numpy(self.columns[at].astype(np.int64)),
            torch.from_numpy(self.values[at]),
        )

    @classmethod
    def of(cls, columns: Sequence[NDArray[np.int32]], values: Sequence[NDArray[np.float32]] | None = None) -> Sparse:
        lengths = [len(row) for row in columns]
        flat = np.concatenate([np.zeros(0, np.int32), *columns])
        numbers = np.ones(len(flat)) if values is None else np.concatenate([np.zeros(0), *values])
        return cls(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), flat, numbers.astype(np.float32))


@dataclass(frozen=True)
class Examples:
    """N ranking examples."""

    sample: NDArray[np.intp]  # [N] index into the hidden table; empty for baselines that read no hidden state
    customer: NDArray[np.int32]
    moment: NDArray[np.float64]
    label_time: NDArray[np.float64]
    baskets: Sparse  # catalogue rows of the next basket
    owned: Sparse  # purchased rows before the moment; values: log(1 + decayed count)

    def __len__(self) -> int:
        return len(self.customer)

    def first(self, count: int) -> Examples:
        """The first `count` of them."""
        return Examples(
            self.sample[:count],
            self.customer[:count],
            self.moment[:count],
            self.label_time[:count],
            self.baskets.first(count),
            self.owned.first(count),
        )

    def basket_list(self) -> list[NDArray[np.int32]]:
        return [self.baskets.row(index) for index in range(len(self))]

    def owned_list(self) -> list[NDArray[np.int32]]:
        return [self.owned.row(index) for index in range(len(self))]


def ranking_examples(
    table: HiddenTable,
    chosen: NDArray[np.intp],
    histories: Histories,
    kind: EventKind,
    *,
    before: float,
    decay_days: float,
) -> Examples:
    """Examples of the `chosen` samples whose next basket lies before `before` and holds an item with a row."""
    kept: list[int] = []
    times: list[float] = []
    baskets: list[NDArray[np.int32]] = []
    owned: list[NDArray[np.int32]] = []
    counts: list[NDArray[np.float32]] = []
    order = chosen[np.argsort(table.customer[chosen], kind="stable")]
    last = None
    for index in order.tolist():
        customer, moment = int(table.customer[index]), float(table.moment[index])
        if customer != last:
            history, last = histories[customer], customer
        label = next_basket(history, moment, kind, before)
        if label is None or not len(label.rows):
            continue
        rows, decayed = history.before(moment).own_counts(decay_days)
        kept.append(index)
        times.append(label.time)
        baskets.append(label.rows)
        owned.append(rows)
        counts.append(np.log1p(decayed))
    at = np.array(kept, np.intp)
    return Examples(
        at, table.customer[at], table.moment[at], np.array(times), Sparse.of(baskets), Sparse.of(owned, counts)
    )
