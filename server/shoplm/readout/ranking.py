"""Picking the best with ties by item row, and the chosen items with the terms of their scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from shoplm.request import SelectOutput

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


def best(scores: Floats, count: int) -> Integers:
    """Indices of the `count` largest finite scores, best first, equal ones by index; fewer where there are fewer."""
    finite = np.flatnonzero(np.isfinite(scores))
    if len(finite) > count > 0:
        threshold = np.partition(scores[finite], len(finite) - count)[len(finite) - count]
        finite = finite[scores[finite] >= threshold]
    result: Integers = finite[np.argsort(-scores[finite], kind="stable")[:count]]
    return result


def output_of(items: Integers, model: Floats, repeat: Floats, popularity: Floats, goes_with: Floats) -> SelectOutput:
    """The chosen items with their terms; a score is exactly the sum of the terms, in double precision."""
    scores = model.astype(np.float64) + repeat + popularity + goes_with
    order = np.lexsort((items, -scores))
    return SelectOutput(
        items=tuple(items[order].tolist()),
        scores=tuple(scores[order].tolist()),
        model=tuple(model[order].tolist()),
        repeat=tuple(repeat[order].tolist()),
        popularity=tuple(popularity[order].tolist()),
        goes_with=tuple(goes_with[order].tolist()),
    )
