"""Selection without a history: popularity alone, whatever the depth of the codes, beside selections of the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shoplm.catalog.filters import ItemColumns, ItemFilters
from shoplm.catalog.trie import Trie
from shoplm.readout.habits import HabitTable
from shoplm.readout.select import SelectJob, Selector
from shoplm.readout.table import SelectTable
from shoplm.request import ItemFilter, Select, SelectOutput

ITEMS, HIDDEN = 30, 8
POPULARITY = -np.abs(np.arange(ITEMS) - 20.0).astype(np.float32)  # 20 is the most popular; 19 and 21 tie, ...


def selector(depth: int, popularity_weight: float = 0.5) -> Selector:
    sizes = (ITEMS,) if depth == 1 else (4,) * depth
    codes = np.stack(np.unravel_index(np.arange(ITEMS), sizes), axis=1).astype(np.int32)
    generator = torch.Generator().manual_seed(1)
    columns = ItemColumns(["even", "odd"] * (ITEMS // 2), np.ones(ITEMS), np.ones(ITEMS, np.bool_))
    table = SelectTable(
        trie=Trie.from_codes(codes, sizes),
        output_rows=tuple(torch.randn(size, HIDDEN, generator=generator) for size in sizes),
        output_bias=tuple(torch.zeros(size) for size in sizes),
        token_starts=tuple(100 * level for level in range(depth)),
        popularity=POPULARITY,
        habits=HabitTable(2.0),
        popularity_weight=popularity_weight,
        filters=ItemFilters(ITEMS, columns),
    )
    return Selector(table)


def selected(depth: int, select: Select, popularity_weight: float = 0.5) -> SelectOutput:
    (output,) = selector(depth, popularity_weight).step(torch.ones(1, HIDDEN), [SelectJob(0, select, 0, 0, 1)])
    assert output is not None
    return output


@pytest.mark.parametrize("depth", [1, 3])
def test_the_most_popular_come_first_and_ties_by_row(depth: int) -> None:
    output = selected(depth, Select(count=4, beam_width=2, popularity_only=True))
    assert output.items == (20, 19, 21, 18)
    assert output.scores == output.popularity == (0.0, -0.5, -0.5, -1.0)
    assert output.model == output.repeat == (0.0,) * 4


def test_popularity_counts_also_where_it_has_no_weight_beside_the_model() -> None:
    output = selected(1, Select(count=4, beam_width=2, popularity_only=True), popularity_weight=0.0)
    assert output.items == (20, 19, 21, 18)
    assert output.scores == output.popularity == (0.0, -1.0, -1.0, -2.0)


@pytest.mark.parametrize("depth", [1, 3])
def test_filters_exclusions_and_candidates_hold(depth: int) -> None:
    even = ItemFilter(include_categories=("even",))
    output = selected(depth, Select(3, 2, item_filter=even, exclude_items=(20,), popularity_only=True))
    assert output.items == (18, 22, 16)
    output = selected(depth, Select(5, 0, candidates=(3, 29, 3, 10), popularity_only=True))
    assert output.items == (29, 10, 3)


def test_it_does_not_disturb_selections_of_the_model() -> None:
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    by_model = [Select(count=5, beam_width=1, own_items=(row,), own_counts=(1.0,)) for row in (3, 4)]
    popular = Select(count=5, beam_width=1, popularity_only=True)
    jobs = [SelectJob(0, by_model[0], 0, 0, 1), SelectJob(1, popular, 0, 1, 1), SelectJob(2, by_model[1], 0, 2, 1)]
    together = selector(1).step(hidden, jobs)
    assert together[1] == selected(1, popular)
    for row in (0, 2):
        (alone,) = selector(1).step(hidden, [jobs[row]])
        beside = together[row]
        assert alone is not None and beside is not None
        assert beside.items == alone.items
        assert beside.scores == pytest.approx(alone.scores, abs=1e-5)
