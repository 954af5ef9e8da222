"""How much counting, popularity and the model say: weights tuned on a validation window, and the rankings they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.bundle import ScoreWeights
from shoplm.readout.adopt import Adopt
from shoplm.readout.rebuy import Rebuy
from shoplm.training.examples import Examples, Sparse
from shoplm.training.habits import ShopHabits
from shoplm.training.histories import Histories
from shoplm.training.metrics import BasketQuality, Baskets
from torch import Tensor

TOP = 10
DECAYS = (15.0, 30.0, 60.0, 120.0, 240.0, 480.0)  # days
REPEAT_WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 13.0, 16.0)
POPULARITY_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
MODEL_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
LOYALTY_WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0)  # in units of the weight of counting
REBUY_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
OWN_NATS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0)
GOES_WITH_WEIGHTS = (0.0, 25.0, 50.0, 100.0, 200.0, 400.0, 800.0, 1600.0, 3200.0)
ADOPT_WEIGHTS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_LEAST_KEPT = 0.998  # of the NDCG, when weights are chosen by what is found among new items
_CHUNK = 512
_KEPT_EXAMPLES = 4096  # up to which the values of all items are kept: weights are tuned on fewer, by many rankings


class Logits(Protocol):
    """The model's, of each example [N, items]: all at once, or made as they are asked for."""

    def __getitem__(self, chunk: NDArray[np.intp], /) -> Tensor:
        """[chunk, items]."""
        ...


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of a score's terms. `model` is multiplied into the output rows when the bundle is written."""

    model: float
    repeat: float
    popularity: float
    decay_days: float
    loyalty: float = 0.0
    goes_with: float = 0.0
    rebuy: float = 0.0
    own: float = 0.0  # nats for every own item, where `rebuy` counts; goes into its net when the bundle is written
    adopt: float = 0.0

    def score(self) -> ScoreWeights:
        return ScoreWeights(
            self.repeat, self.popularity, self.decay_days, self.loyalty, self.goes_with, self.rebuy, self.adopt
        )


class Window:
    """Examples of one window, with own counts at every decay, ready to be ranked with any weights."""

    def __init__(
        self,
        examples: Examples,
        histories: Histories,
        popularity: Tensor,
        habits: ShopHabits | None = None,
        rebuy: Rebuy | None = None,
        adopt: Adopt | None = None,
    ) -> None:
        """`popularity` [items]: natural logs. Without `habits`, `rebuy` or `adopt`, their weights must be 0."""
        self.examples = examples
        self.popularity = popularity
        self._histories = histories
        self._habits = habits
        self._rebuy = rebuy
        self._adopt = adopt
        self._again: Sparse | None = None
        self._first: Tensor | None = None
        self._owned: dict[float, Sparse] = {}
        self._near: tuple[float, Sparse] | None = None
        self._baskets = Baskets(examples.basket_list(), examples.owned_list())

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

    def near(self, decay_days: float) -> Sparse:
        """What goes with own items, at the decay asked for last."""
        if self._habits is None:
            raise ValueError("neighbours have a weight, but the window has no habits")
        if self._near is None or self._near[0] != decay_days:
            owned, rows, values = self.owned(decay_days), [], []
            for index in range(len(self.examples)):
                part = slice(owned.starts[index], owned.starts[index + 1])
                found, strengths = self._habits.neighbours.near(
                    owned.columns[part].astype(np.int64), owned.values[part].astype(np.float64)
                )
                rows.append(found.astype(np.int32))
                values.append(strengths)
            self._near = decay_days, Sparse.of(rows, values)
        return self._near[1]

    @property
    def tells_rebuying(self) -> bool:
        """Whether `rebuy` may have a weight."""
        return self._rebuy is not None

    def again(self) -> Sparse:
        """Values of own items, as the net gives them."""
        if self._rebuy is None:
            raise ValueError("buying again has a weight, but the window has no net")
        if self._again is None:
            rows, values = [], []
            for customer, moment in zip(self.examples.customer, self.examples.moment, strict=True):
                history = self._histories[int(customer)].before(float(moment))
                own, features = self._rebuy.features(history)
                rows.append(own)
                values.append(self._rebuy.log_odds(features))
            self._again = Sparse.of(rows, values)
        return self._again

    @property
    def tells_adopting(self) -> bool:
        """Whether `adopt` may have a weight."""
        return self._adopt is not None

    def first(self, chunk: NDArray[np.intp]) -> Tensor:
        """Values of all items, as the net of first purchases gives them, fp32 [chunk, items]; 0 for customers without
        items of their own."""
        if len(self.examples) > _KEPT_EXAMPLES:
            return self._first_of(chunk)
        if self._first is None:
            self._first = self._first_of(np.arange(len(self.examples)))
        return self._first[chunk]

    def _first_of(self, chunk: NDArray[np.intp]) -> Tensor:
        if self._adopt is None:
            raise ValueError("buying first has a weight, but the window has no net")
        values = torch.zeros(len(chunk), len(self._adopt))
        for at, index in enumerate(chunk.tolist()):
            if len(own := self.examples.owned.row(index)):
                values[at] = torch.from_numpy(self._adopt.values(own.astype(np.int64)))
        return values

    def rank(self, weights: Weights, logits: Logits | None, *, new_only: bool = False) -> NDArray[np.int64]:
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
            if weights.adopt:
                self._add_first(scores, weights, chunk)
            at, column, value = owned.select(chunk)
            scores[at, column] += weights.repeat * value
            if weights.loyalty:
                if self._habits is None:
                    raise ValueError("loyalty has a weight, but the window has no habits")
                scores[at, column] += weights.loyalty * torch.from_numpy(self._habits.loyalty)[column]
            if weights.rebuy:
                at, column, value = self.again().select(chunk)
                scores[at, column] += weights.rebuy * value + weights.own
            if weights.goes_with:
                self._add_near(scores, weights, chunk)
            if new_only:
                scores[at, column] = -torch.inf
            ranked[chunk] = top(scores, ranked.shape[1])
        return ranked

    def _add_near(self, scores: Tensor, weights: Weights, chunk: NDArray[np.intp]) -> None:
        at, column, value = self.near(weights.decay_days).select(chunk)
        scores[at, column] += weights.goes_with * value

    def _add_first(self, scores: Tensor, weights: Weights, chunk: NDArray[np.intp]) -> None:
        terms = weights.adopt * self.first(chunk)
        at, column, _ = self.examples.owned.select(chunk)
        terms[at, column] = 0.0
        scores += terms

    def explored(self, weights: Weights, logits: Logits | None) -> float:
        """Mean explore recall of lists without what was bought before; 0 where nothing new was bought."""
        if not len(self.examples):
            return 0.0
        recall = self.quality(self.rank(weights, logits, new_only=True)).explore_recall
        return float(np.nanmean(recall)) if np.isfinite(recall).any() else 0.0

    def quality(self, ranked: NDArray[np.integer]) -> BasketQuality:
        return self._baskets.quality(ranked)

    def ndcg(self, weights: Weights, logits: Logits | None) -> float:
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


def tune(window: Window, logits: Logits | None, start: Weights, *, habits: bool = False) -> Weights:
    """Weights that maximise NDCG on the window, by coordinate ascent over the grids from `start`.

    With `logits` None only counting and popularity are tuned, with `habits` loyalty and buying again, too. Never worse
    on the window than `start`.
    """
    best, best_quality = start, window.ndcg(start, logits)
    while len(window.examples):
        before = best
        for name, grid in _grids(best, logits is not None, habits, habits and window.tells_rebuying):
            for value in grid:
                candidate = replace(best, **{name: value})
                quality = window.ndcg(candidate, logits)
                if quality > best_quality + 1e-9:
                    best, best_quality = candidate, quality
        if best == before:
            return best
    return best


def tune_new(window: Window, logits: Logits | None, found: Weights) -> Weights:
    """`found` with the weight of neighbours, or of the net of first purchases, that finds most among new items and
    keeps what is found among all.

    What the customer has not bought yet takes few of ten places: the whole list hardly tells which weight suits it.
    """
    least = _LEAST_KEPT * window.ndcg(found, logits)
    candidates = [found, *(replace(found, goes_with=value) for value in GOES_WITH_WEIGHTS[1:])]
    if window.tells_adopting:
        candidates += [replace(found, adopt=value) for value in ADOPT_WEIGHTS]
    recall = np.array([window.explored(candidate, logits) for candidate in candidates])
    best_first = (candidates[at] for at in np.argsort(-recall.round(9), kind="stable"))
    return next((each for each in best_first if window.ndcg(each, logits) >= least), found)


def _grids(
    weights: Weights, with_model: bool, with_habits: bool, with_rebuy: bool
) -> Sequence[tuple[str, Sequence[float]]]:
    grids: list[tuple[str, Sequence[float]]] = [("decay_days", DECAYS)]
    if with_habits:
        grids.append(("loyalty", [weights.repeat * value for value in LOYALTY_WEIGHTS]))
    if with_rebuy:
        grids += [("rebuy", REBUY_WEIGHTS), ("own", OWN_NATS)]
    if with_model:
        return [("repeat", REPEAT_WEIGHTS), ("popularity", POPULARITY_WEIGHTS), ("model", MODEL_WEIGHTS), *grids]
    # Only the ratio matters without a model: the weight of counting stays.
    return [("popularity", [weights.repeat * value for value in POPULARITY_WEIGHTS]), *grids]
