"""The terms of an item's score beside the model's, and picking the best with ties by item row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from shoplm.history import History
from shoplm.request import Select, SelectOutput

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class OwnItems:
    """Items the customer bought, ascending and each once, and their repeat terms."""

    items: Integers
    terms: Floats  # repeat_weight * log(1 + decayed count)

    @staticmethod
    def of(select: Select, repeat_weight: float) -> OwnItems:
        """Counts of an item that is listed twice are added."""
        items, index = np.unique(np.asarray(select.own_items, np.int64), return_inverse=True)
        counts = np.bincount(index, weights=np.asarray(select.own_counts, np.float64), minlength=len(items))
        return OwnItems.counted(items, counts, repeat_weight)

    @staticmethod
    def counted(items: NDArray[np.integer], counts: NDArray[np.number], repeat_weight: float) -> OwnItems:
        """From items, ascending and each once, and their decayed counts."""
        return OwnItems(items.astype(np.int64), (repeat_weight * np.log1p(counts)).astype(np.float32))

    def terms_of(self, items: Integers) -> Floats:
        """The repeat term of each of `items`, 0 for those never bought."""
        terms = np.zeros(len(items), np.float32)
        if len(self.items):
            at = np.minimum(np.searchsorted(self.items, items), len(self.items) - 1)
            bought = self.items[at] == items
            terms[bought] = self.terms[at[bought]]
        return terms


def repeat_terms(history: History, rows: Sequence[int], decay_days: float, repeat_weight: float) -> Floats:
    """The repeat term of each of these items for a customer with this history."""
    return OwnItems.counted(*history.own_counts(decay_days), repeat_weight).terms_of(np.asarray(rows, np.int64))


def best(scores: Floats, count: int) -> Integers:
    """Indices of the `count` largest finite scores, best first, equal ones by index; fewer where there are fewer."""
    finite = np.flatnonzero(np.isfinite(scores))
    if len(finite) > count > 0:
        threshold = np.partition(scores[finite], len(finite) - count)[len(finite) - count]
        finite = finite[scores[finite] >= threshold]
    result: Integers = finite[np.argsort(-scores[finite], kind="stable")[:count]]
    return result


def output_of(items: Integers, model: Floats, repeat: Floats, popularity: Floats) -> SelectOutput:
    """The chosen items with their terms; a score is exactly the sum of the terms, in double precision."""
    scores = model.astype(np.float64) + repeat + popularity
    order = np.lexsort((items, -scores))
    return SelectOutput(
        items=tuple(items[order].tolist()),
        scores=tuple(scores[order].tolist()),
        model=tuple(model[order].tolist()),
        repeat=tuple(repeat[order].tolist()),
        popularity=tuple(popularity[order].tolist()),
    )
