"""What a customer's own purchases say about each item: bought again, or goes with what was bought.

Both come from the customer's own items j with decayed counts c_j and are exact reasons of a score:

    repeat(i)    = repeat_weight * log(1 + c_i) + loyalty_weight * loyalty_i + own_i     for own items, else 0
    goes_with(i) = goes_with_weight * sum_j s_ji log(1 + c_j) / sum_j log(1 + c_j)       for other items, else 0

`loyalty_i` says how readily the shop's customers buy the item again, and `s_ji` how much of an item's customers the
neighbour i draws (`Neighbours`). `own_i` comes with the item: what the whole history says of it
(`shoplm.readout.rebuy`). What the customer buys already is scored by itself alone. Where the shop has a net of what is
bought for the first time (`shoplm.readout.adopt`), its weighted value is the goes-with term instead. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from shoplm.bundle import ScoreWeights, ShopManifest
from shoplm.readout.adopt import Adopt, adopt_of
from shoplm.readout.ranking import best
from shoplm.readout.rebuy import OwnItems
from shoplm.readout.tensors import Read, opened, whole

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Rows = Sequence[int] | NDArray[np.integer]
Counts = Sequence[float] | NDArray[np.floating]

_DENSE_SHARE = 16  # items of the shop per neighbour to add, up to which sums over all items are made


@dataclass(frozen=True)
class Neighbours:
    """Each item's neighbours and how strong they are, as compressed rows."""

    starts: Integers  # [items + 1]
    items: NDArray[np.int32]  # [E] item rows
    strengths: Floats  # [E], finite, not negative

    def __post_init__(self) -> None:
        count = len(self.starts) - 1
        if count < 0 or self.starts[0] != 0 or self.starts[-1] != len(self.items) or (np.diff(self.starts) < 0).any():
            raise ValueError(f"neighbours: starts do not divide {len(self.items)} entries into rows")
        if self.items.shape != self.strengths.shape:
            raise ValueError(f"neighbours: {len(self.items)} items but {len(self.strengths)} strengths")
        if len(self.items) and not 0 <= int(self.items.min()) <= int(self.items.max()) < count:
            raise ValueError(f"neighbours: items run from {self.items.min()} to {self.items.max()}, there are {count}")

    @classmethod
    def none(cls, items: int) -> Neighbours:
        """No item has a neighbour."""
        return cls(np.zeros(items + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def entries(self, rows: Integers) -> tuple[Integers, Integers]:
        """(position in `rows`, index into `items`) of all entries of these rows."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        position = np.repeat(np.arange(len(rows)), lengths)
        offset = np.arange(len(position)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return position, np.repeat(self.starts[rows], lengths) + offset

    def near(self, own: Integers, amounts: NDArray[np.floating]) -> tuple[Integers, Floats]:
        """Items that go with `own` (ascending, each once) weighted by `amounts`, ascending and without `own`, and the
        weighted means of the strengths."""
        total = float(amounts.sum())
        if total <= 0.0 or not len(self.items):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        position, at = self.entries(own)
        weights = self.strengths[at] * (amounts / total)[position]
        if len(self) <= _DENSE_SHARE * len(at):  # adding up in place beats sorting
            sums = np.bincount(self.items[at], weights=weights, minlength=len(self))
            items = np.flatnonzero(sums)
            sums = sums[items]
        else:
            items, index = np.unique(self.items[at], return_inverse=True)
            sums = np.bincount(index, weights=weights, minlength=len(items))
        new = ~np.isin(items, own, assume_unique=True)
        return items[new].astype(np.int64), sums[new].astype(np.float32)

    def sources(self, item: int, own: Integers, amounts: NDArray[np.floating], count: int) -> Integers:
        """At most `count` of the `own` items that `item` goes with, those that add most to its term first."""
        position, at = self.entries(own)
        hit = self.items[at] == item
        found, parts = position[hit], (self.strengths[at] * amounts[position])[hit]
        order = np.lexsort((found, -parts))[:count]
        result: Integers = own[found[order][parts[order] > 0]]
        return result


@dataclass(frozen=True)
class Habits:
    """One customer's terms. Item rows are ascending and each once; no item is in both."""

    items: Integers  # own items
    repeat: Floats  # aligned with `items`
    near_items: Integers  # items that go with them
    near: Floats  # aligned with `near_items`

    def repeat_of(self, items: Integers) -> Floats:
        """The repeat term of each of `items`, 0 for those never bought."""
        return _looked_up(items, self.items, self.repeat)

    def near_of(self, items: Integers) -> Floats:
        """The goes-with term of each of `items`, 0 where nothing that was bought goes with it."""
        return _looked_up(items, self.near_items, self.near)

    def add_to(self, scores: Floats) -> None:
        """Add both terms to `scores` [items] in place."""
        scores[self.items] += self.repeat
        scores[self.near_items] += self.near

    @property
    def flat(self) -> tuple[Integers, Floats]:
        """All items with a term, each once, and the terms."""
        return np.concatenate((self.items, self.near_items)), np.concatenate((self.repeat, self.near))

    def strongest_repeat(self, count: int) -> Integers:
        """At most `count` own items of the largest repeat terms."""
        return self.items[best(self.repeat, count)]

    def strongest_near(self, count: int) -> Integers:
        """At most `count` items of the largest goes-with terms."""
        return self.near_items[best(self.near, count)]


def _looked_up(wanted: Integers, items: Integers, values: Floats) -> Floats:
    terms = np.zeros(len(wanted), np.float32)
    if len(items):
        at = np.minimum(np.searchsorted(items, wanted), len(items) - 1)
        hit = items[at] == wanted
        terms[hit] = values[at[hit]]
    return terms


@dataclass(frozen=True)
class HabitTable:
    """What a shop's habits are scored with. A weight of 0 leaves its term out."""

    repeat_weight: float
    loyalty_weight: float = 0.0
    goes_with_weight: float = 0.0
    loyalty: Floats | None = None  # [items], natural log
    neighbours: Neighbours | None = None
    adopt_weight: float = 0.0
    adopt: Adopt | None = None

    def __post_init__(self) -> None:
        if self.loyalty is None and self.loyalty_weight:
            raise ValueError(f"loyalty_weight is {self.loyalty_weight}, but no loyalty is there")
        if self.neighbours is None and self.goes_with_weight:
            raise ValueError(f"goes_with_weight is {self.goes_with_weight}, but no neighbours are there")
        if self.adopt is None and self.adopt_weight:
            raise ValueError(f"adopt_weight is {self.adopt_weight}, but no adopt tensors are there")
        if self.adopt_weight and self.goes_with_weight:
            raise ValueError("adopt_weight and goes_with_weight are both given: a new item has one goes-with term")

    def check(self, items: int) -> None:
        """Raises ValueError where a table is not of so many items."""
        if self.loyalty is not None and self.loyalty.shape != (items,):
            raise ValueError(f"loyalty has shape {self.loyalty.shape}, expected ({items},)")
        if self.neighbours is not None and len(self.neighbours) != items:
            raise ValueError(f"neighbours are of {len(self.neighbours)} items, expected {items}")
        if self.adopt is not None and len(self.adopt) != items:
            raise ValueError(f"adopt.items is of {len(self.adopt)} items, expected {items}")

    def of(self, items: Rows, counts: Counts, terms: Counts = (), *, only: Integers | None = None) -> Habits:
        """The terms of a customer who owns `items`, by their decayed `counts`, with the items' own `terms` added (none
        where there are none); counts and terms of an item that is listed twice are added. Of other items, those that
        are among `only` (ascending, each once) where given."""
        own, amounts = _amounts(items, counts)
        repeat = self.repeat_weight * amounts
        if self.loyalty is not None:
            repeat = repeat + self.loyalty_weight * self.loyalty[own]
        if len(terms):
            at = np.searchsorted(own, np.asarray(items, np.int64))
            repeat = repeat + np.bincount(at, weights=np.asarray(terms, np.float64), minlength=len(own))
        near_items, near = self._new(own, amounts, only)
        return Habits(own, repeat.astype(np.float32), near_items, near.astype(np.float32))

    def _new(self, own: Integers, amounts: NDArray[np.float64], only: Integers | None) -> tuple[Integers, Floats]:
        """Items that are not `own`, ascending, and their terms."""
        if self.adopt is not None and self.adopt_weight and len(own):
            items = np.setdiff1d(np.arange(len(self.adopt)) if only is None else only, own, assume_unique=True)
            values = self.adopt.values(own)[items] if only is None else self.adopt.values(own, items)
            return items, self.adopt_weight * values
        if self.neighbours is not None and self.goes_with_weight:
            items, strengths = self.neighbours.near(own, amounts)
            return items, self.goes_with_weight * strengths
        return np.zeros(0, np.int64), np.zeros(0, np.float32)

    def beside(self, own: OwnItems, rows: Sequence[int]) -> Floats:
        """Both terms of each of these items for a customer who owns `own`, added."""
        wanted = np.asarray(rows, np.int64)
        habits = self.of(*own, only=np.unique(wanted))
        return habits.repeat_of(wanted) + habits.near_of(wanted)

    def sources(self, item: int, items: Rows, counts: Counts, count: int) -> list[int]:
        """At most `count` of the owned `items` that `item` goes with most, the strongest first."""
        if self.adopt is not None and self.adopt_weight and len(items):
            drawing: list[int] = self.adopt.sources(item, np.unique(np.asarray(items, np.int64)), count).tolist()
            return drawing
        if self.neighbours is None or not self.goes_with_weight:
            return []
        found: list[int] = self.neighbours.sources(item, *_amounts(items, counts), count).tolist()
        return found


def habit_table(score: ScoreWeights, read: Read) -> HabitTable:
    """Read a bundle's table. Raises ValueError where the tensors do not fit together or with the weights."""
    loyalty = read("loyalty")
    neighbours = None
    if found := whole(read, "neighbours", ("starts", "items", "strengths")):
        starts, items, strengths = found.values()
        neighbours = Neighbours(starts.astype(np.int64), items.astype(np.int32), strengths.astype(np.float32))
    return HabitTable(
        score.repeat_weight,
        score.loyalty_weight,
        score.goes_with_weight,
        None if loyalty is None else loyalty.astype(np.float32),
        neighbours,
        score.adopt_weight,
        adopt_of(read),
    )


def load_habits(bundle: Path, manifest: ShopManifest) -> HabitTable:
    """Load the table from a bundle's folder. Raises BundleError."""
    with opened(bundle) as (read, items):
        table = habit_table(manifest.score, read)
        table.check(items)
    return table


def _amounts(items: Rows, counts: Counts) -> tuple[Integers, NDArray[np.float64]]:
    """Own items, ascending and each once, and log(1 + count) of each."""
    own, index = np.unique(np.asarray(items, np.int64), return_inverse=True)
    return own, np.log1p(np.bincount(index, weights=np.asarray(counts, np.float64), minlength=len(own)))
