"""What the items of a trie are scored with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from shoplm.catalog.filters import ItemFilters
from shoplm.catalog.trie import Trie
from shoplm.readout.habits import Habits, HabitTable
from shoplm.readout.ranking import best, output_of
from shoplm.request import NEAR_LANES, OWN_LANES, Select, SelectOutput
from torch import Tensor


@dataclass(frozen=True)
class SelectTable:
    """A trie, the output rows of its codes, and the terms of its items."""

    trie: Trie
    output_rows: tuple[Tensor, ...]  # per level, fp32 [codes, H]
    output_bias: tuple[Tensor, ...]  # per level, fp32 [codes]
    token_starts: tuple[int, ...]  # per level: token id of code 0
    popularity: NDArray[np.float32]  # [items], natural log
    habits: HabitTable
    popularity_weight: float
    filters: ItemFilters
    own_lanes: int = OWN_LANES
    near_lanes: int = NEAR_LANES

    def __post_init__(self) -> None:
        if not len(self.output_rows) == len(self.output_bias) == len(self.token_starts) == self.trie.depth:
            raise ValueError(f"output rows, biases and token starts are not one per level of depth {self.trie.depth}")
        for level, (rows, bias) in enumerate(zip(self.output_rows, self.output_bias, strict=True)):
            size = self.trie.level_sizes[level]
            if len(rows) != size or bias.shape != (size,):
                raise ValueError(f"level {level}: {len(rows)} output rows and {len(bias)} biases for {size} codes")
        if self.popularity.shape != (self.trie.items,):
            raise ValueError(f"popularity has shape {self.popularity.shape}, expected ({self.trie.items},)")
        self.habits.check(self.trie.items)

    @cached_property
    def popularity_terms(self) -> NDArray[np.float32]:
        """[items]: popularity_weight * log popularity."""
        return (self.popularity * self.popularity_weight).astype(np.float32)

    def habits_of(self, select: Select) -> Habits:
        """The terms that come from what the customer bought."""
        return self.habits.of(select.own_items, select.own_counts, select.own_terms)

    def best(self, items: NDArray[np.int64], model: NDArray[np.float32], habits: Habits, count: int) -> SelectOutput:
        """The `count` best of `items` (ascending, each once) by the whole score, of which `model` is one term."""
        repeat, near, popularity = habits.repeat_of(items), habits.near_of(items), self.popularity_terms[items]
        chosen = best(model + repeat + popularity + near, count)
        return output_of(items[chosen], model[chosen], repeat[chosen], popularity[chosen], near[chosen])

    def width(self, select: Select) -> int:
        """Beams of a search; candidates need none."""
        return 0 if select.candidates is not None else select.beam_width

    def forced_items(self, select: Select, habits: Habits | None = None) -> NDArray[np.int64]:
        """Items whose codes are followed whatever the beams do, ascending and each once. `habits` are the selection's,
        where they are known already."""
        if select.candidates is not None:
            return np.unique(np.asarray(select.candidates, np.int64))
        # Neither a repeat nor a neighbour may be lost before its term is added. The two have no item in common.
        habits = habits or self.habits_of(select)
        forced = (habits.strongest_repeat(self.own_lanes), habits.strongest_near(self.near_lanes))
        return np.sort(np.concatenate(forced))
