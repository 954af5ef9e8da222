"""How much counting, popularity and the model say: weights tuned on a validation window, and the rankings they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.bundle import ScoreWeights
from shoplm.training.examples import Examples, Sparse
from shoplm.training.histories import Histories
from shoplm.training.metrics import BasketQuality, basket_quality
from torch import Tensor

TOP = 10
DECAYS = (15.0, 30.0, 60.0, 120.0, 240.0, 480.0)  # days
REPEAT_WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 13.0, 16.0)
POPULARITY_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
MODEL_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the three terms. `model` is multiplied into the output rows when the bundle is written."""

    model: float
    repeat: float
    popularity: float
    decay_days: float

    def score(self) -> ScoreWeights:
        return ScoreWeights(self.repeat, self.popularity, self.decay_days)


class Window:
    """Examples of one window, with own counts at every decay, ready to be ranked with any weights."""

    def __init__(self, examples: Examples, histories: Histories, popularity: Tensor) -> None:
        """`popularity` [items]: natural logs."""
        self.examples = examples
        self.popularity = popularity
        self._histories = histories
        self._owned: dict[float, Sparse] = {}
        self._baskets = examples.basket_list()
        self._known = examples.owned_list()

    def owned(self, decay_days: float) -> Sparse:
        """log(1 + decayed count) of own items at a decay."""
        if decay_days not in self._owned:
            rows, values = [], []
            for customer, moment in zip(self.examples.customer, self.examples.moment, strict=True):
                found, counts = self._histories[int(customer)].before(float(moment)).own_counts(decay_days)
                rows.append(found)
                values.append(np.log1p(counts))
            self._owned[decay_days] = Sparse.of(rows, values)
        return self._owned[decay_days]

    def rank(self, weights: Weights, logits: Tensor | None, *, new_only: bool = False) -> NDArray[np.int64]:
        """[N, k] best rows; ties go to the lower row, as in serving. `logits` [N, items] are the model's. `new_only`
        leaves out what the customer has bought before."""
        count, items = len(self.examples), len(self.popularity)
        ranked = np.zeros((count, min(TOP, items)), np.int64)
        owned = self.owned(weights.decay_days)
        for chunk in chunks(count, _CHUNK):
            if logits is None or weights.model == 0.0:
                scores = torch.zeros(len(chunk), items)
            else:
                scores = weights.model * logits[chunk]
            scores += weights.popularity * self.popularity
            at, column, value = owned.select(chunk)
            scores[at, column] += weights.repeat * value
            if new_only:
                scores[at, column] = -torch.inf
            ranked[chunk] = top(scores, ranked.shape[1])
        return ranked

    def quality(self, ranked: NDArray[np.integer]) -> BasketQuality:
        return basket_quality(ranked, self._baskets, self._known)

    def ndcg(self, weights: Weights, logits: Tensor | None) -> float:
        """Mean NDCG over the examples; 0 where there are none."""
        if not len(self.examples):
            return 0.0
        return self.quality(self.rank(weights, logits)).means()["ndcg"]


def top(scores: Tensor, k: int) -> NDArray[np.int64]:
    """Best k columns per row, ties to the lower column."""
    values, found = torch.topk(scores, k, dim=1)
    order = np.lexsort((found.numpy(), -values.numpy()), axis=1)
    ranked: NDArray[np.int64] = np.take_along_axis(found.numpy(), order, axis=1)
    # Where more columns share the last value than there is room for, topk takes any of them.
    tied = (scores >= values[:, -1:]).sum(dim=1) > k
    for row in torch.nonzero(tied)[:, 0].tolist():
        ranked[row] = np.argsort(-scores[row].numpy(), kind="stable")[:k]
    return ranked


def chunks(count: int, size: int) -> Iterator[NDArray[np.intp]]:
    """0 to `count`, at most `size` at once."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def tune(window: Window, logits: Tensor | None, start: Weights) -> Weights:
    """Weights that maximise NDCG on the window, by coordinate ascent over the grids from `start`.

    With `logits` None only counting and popularity are tuned. Never worse on the window than `start`.
    """
    best, best_quality = start, window.ndcg(start, logits)
    while len(window.examples):
        before = best
        for name, grid in _grids(best, logits is not None):
            for value in grid:
                candidate = replace(best, **{name: value})
                quality = window.ndcg(candidate, logits)
                if quality > best_quality + 1e-9:
                    best, best_quality = candidate, quality
        if best == before:
            return best
    return best


def _grids(weights: Weights, with_model: bool) -> Sequence[tuple[str, Sequence[float]]]:
    grids: list[tuple[str, Sequence[float]]] = [("decay_days", DECAYS)]
    if with_model:
        return [("repeat", REPEAT_WEIGHTS), ("popularity", POPULARITY_WEIGHTS), ("model", MODEL_WEIGHTS), *grids]
    # Only the ratio matters without a model: the weight of counting stays.
    return [("popularity", [weights.repeat * value for value in POPULARITY_WEIGHTS]), *grids]
