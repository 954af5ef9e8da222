"""Selection with codes of one token: one masked top-k after the prompt, with the exact terms of each score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shoplm.catalog.filters import ItemColumns, ItemFilters
from shoplm.catalog.trie import Trie
from shoplm.readout.habits import HabitTable, Neighbours
from shoplm.readout.ranking import best
from shoplm.readout.select import SelectJob, Selector
from shoplm.readout.table import SelectTable
from shoplm.request import ItemFilter, Select, SelectOutput

ITEMS, HIDDEN = 400, 24
_ENTRIES = 6  # neighbours of each item
HABITS = HabitTable(
    1.5,
    0.8,
    20.0,
    np.random.default_rng(5).normal(0, 1, ITEMS).astype(np.float32),
    Neighbours(
        np.arange(0, ITEMS * _ENTRIES + 1, _ENTRIES),
        np.random.default_rng(6).integers(0, ITEMS, ITEMS * _ENTRIES).astype(np.int32),
        np.random.default_rng(7).uniform(0, 1, ITEMS * _ENTRIES).astype(np.float32),
    ),
)
HABIT_ROWS = tuple(sorted({int(row) for row in HABITS.neighbours.items[3 * _ENTRIES : 4 * _ENTRIES]}))  # type: ignore[union-attr]


def make_table(depth: int = 1, *, flat: bool = False) -> SelectTable:
    """`flat`: all output rows are alike, so that all items tie."""
    generator = np.random.default_rng(3)
    if depth == 1:
        codes = np.arange(ITEMS, dtype=np.int32)[:, None]
        sizes: tuple[int, ...] = (ITEMS,)
    else:
        sizes = (10,) * depth
        numbers = np.sort(generator.choice(10**depth, ITEMS, replace=False))
        codes = np.stack(np.unravel_index(numbers, sizes), axis=1).astype(np.int32)
    seed = torch.Generator().manual_seed(1)
    columns = ItemColumns(
        [("dairy", "fruit")[item % 2] for item in range(ITEMS)],
        generator.uniform(0, 9, ITEMS),
        np.ones(ITEMS, np.bool_),
    )
    return SelectTable(
        trie=Trie.from_codes(codes, sizes),
        output_rows=tuple(torch.randn(size, HIDDEN, generator=seed) * (not flat) for size in sizes),
        output_bias=tuple(torch.randn(size, generator=seed) * (not flat) for size in sizes),
        token_starts=tuple(500 + 100 * level for level in range(depth)),
        popularity=(generator.normal(-3, 1, ITEMS) * (not flat)).astype(np.float32),
        habits=HabitTable(1.5) if flat else HABITS,
        popularity_weight=0.4,
        filters=ItemFilters(ITEMS, columns),
    )


def run(
    table: SelectTable, selects: list[Select]
) -> tuple[list[SelectOutput], np.ndarray[tuple[int, int], np.dtype[np.float64]]]:
    """Outputs, and log p of all items per selection by plain fp64 arithmetic."""
    hidden = torch.randn(len(selects) + 2, HIDDEN, generator=torch.Generator().manual_seed(2))
    jobs = [SelectJob(slot, select, 0, slot + 1, 1) for slot, select in enumerate(selects)]
    outputs = [output for output in Selector(table).step(hidden, jobs) if output is not None]
    logits = hidden[1:-1].double() @ table.output_rows[0].double().T + table.output_bias[0].double()
    return outputs, torch.log_softmax(logits, -1).numpy()


SELECTS = [
    Select(count=10, beam_width=1),
    Select(count=7, beam_width=1, own_items=(3, 17, 399), own_counts=(4.0, 0.3, 12.0)),
    Select(count=500, beam_width=1, item_filter=ItemFilter(include_categories=("fruit",), max_price=5.0)),
    Select(count=5, beam_width=1, exclude_items=tuple(range(0, 400, 3)), own_items=(3, 4), own_counts=(90.0, 90.0)),
    Select(count=9, beam_width=1, candidates=(9, 8, 200, 8, 301), own_items=(200,), own_counts=(1.0,)),
    # What goes with 3 is among them, by filter and by name.
    Select(count=4, beam_width=1, candidates=(9, *HABIT_ROWS), own_items=(3,), own_counts=(2.0,)),
    Select(count=2, beam_width=1, candidates=(9, 8, 200), item_filter=ItemFilter(exclude_categories=("fruit",))),
    Select(count=3, beam_width=1, item_filter=ItemFilter(min_price=99.0)),
]


def expected_scores(
    table: SelectTable, select: Select, log_p: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> dict[int, float]:
    """Score of each item that may be returned."""
    counts = dict(zip(select.own_items, select.own_counts, strict=True))
    mask = table.filters.allowed(select.item_filter, select.exclude_items).mask
    items = range(ITEMS) if select.candidates is None else set(select.candidates)
    return {
        item: log_p[item] + sum(expected_habits(item, counts)) + 0.4 * float(table.popularity[item])
        for item in items
        if mask[item]
    }


def expected_habits(item: int, counts: dict[int, float]) -> tuple[float, float]:
    """The repeat and the goes-with term, by plain arithmetic."""
    loyalty, neighbours = HABITS.loyalty, HABITS.neighbours
    assert loyalty is not None and neighbours is not None
    if item in counts:
        return 1.5 * np.log1p(counts[item]) + 0.8 * float(loyalty[item]), 0.0
    parts = 0.0
    for own, count in counts.items():
        for at in range(own * _ENTRIES, (own + 1) * _ENTRIES):
            parts += np.log1p(count) * float(neighbours.strengths[at]) * (neighbours.items[at] == item)
    return 0.0, 20.0 * parts / max(sum(map(np.log1p, counts.values())), 1e-9)


def test_items_and_terms_are_those_of_a_plain_ranking() -> None:
    table = make_table()
    outputs, log_p = run(table, SELECTS)
    for select, output, row in zip(SELECTS, outputs, log_p, strict=True):
        scores = expected_scores(table, select, row)
        order = sorted(scores, key=lambda item: (-scores[item], item))[: select.count]
        assert list(output.items) == order
        np.testing.assert_allclose(output.scores, [scores[item] for item in order], atol=1e-4)
        np.testing.assert_allclose(output.model, row[order], atol=1e-4)
        counts = dict(zip(select.own_items, select.own_counts, strict=True))
        terms = np.array([expected_habits(item, counts) for item in order]).reshape(-1, 2)
        np.testing.assert_allclose(output.repeat, terms[:, 0], rtol=1e-5)
        np.testing.assert_allclose(output.goes_with, terms[:, 1], rtol=1e-5)
        parts = np.array([output.model, output.repeat, output.popularity, output.goes_with])
        np.testing.assert_array_equal(output.scores, parts.sum(axis=0) if len(order) else [])


def test_a_selection_does_not_depend_on_the_others() -> None:
    table = make_table()
    together, _ = run(table, SELECTS)
    hidden = torch.randn(len(SELECTS) + 2, HIDDEN, generator=torch.Generator().manual_seed(2))
    for index, select in enumerate(SELECTS):
        (alone,) = Selector(table).step(hidden, [SelectJob(0, select, 0, index + 1, 1)])
        assert alone is not None and alone.items == together[index].items
        np.testing.assert_allclose(alone.scores, together[index].scores, atol=1e-5)


def test_equal_scores_are_ordered_by_item_row() -> None:
    select = Select(count=6, beam_width=1, exclude_items=(0, 2), own_items=(77,), own_counts=(1.0,))
    (output,), _ = run(make_table(flat=True), [select])
    assert output.items == (77, 1, 3, 4, 5, 6)
    (ranked,), _ = run(make_table(flat=True), [Select(count=3, beam_width=1, candidates=(9, 2, 5, 300))])
    assert ranked.items == (2, 5, 9)


def test_best_takes_the_first_of_equal_scores_at_the_cut() -> None:
    scores = np.array([1, 3, 2, 2, -np.inf, 2, 3, np.nan], np.float32)
    assert best(scores, 4).tolist() == [1, 6, 2, 3]
    assert best(scores, 99).tolist() == [1, 6, 2, 3, 5, 0]
    assert best(scores, 0).tolist() == []
    assert best(np.full(3, -np.inf, np.float32), 2).tolist() == []


def test_lanes_are_beams_and_forced_items() -> None:
    flat, deep = Selector(make_table()), Selector(make_table(3))
    own = Select(5, 8, own_items=tuple(range(20)), own_counts=tuple(float(n) for n in range(20)))
    assert (flat.lanes(own), deep.lanes(own)) == (0, 8 + 16 + 16)
    few = HABITS.of((1, 2), (1.0, 1.0)).near_items
    assert deep.lanes(Select(5, 8, own_items=(1, 2), own_counts=(1.0, 1.0))) == 10 + len(few)
    assert deep.lanes(Select(5, 8, candidates=(4, 4, 9), own_items=(1,), own_counts=(1.0,))) == 2
    forced = deep.table.forced_items(own).tolist()
    habits = HABITS.of(own.own_items, own.own_counts)
    likeliest = sorted(range(20), key=lambda item: -habits.repeat_of(np.array([item]))[0])[:16]
    assert forced == sorted(forced) and set(likeliest) <= set(forced)  # those of the largest repeat terms
    weakest = min(habits.near_of(np.array([row for row in forced if row >= 20])))
    assert np.sort(habits.near)[-16] == weakest  # and of the largest goes-with terms


def test_a_search_cannot_start_in_the_middle() -> None:
    with pytest.raises(ValueError, match="state slot 3 has no search"):
        Selector(make_table(3)).lineage(3)
    with pytest.raises(ValueError, match="no search to go on with"):
        Selector(make_table(3)).step(torch.zeros(2, HIDDEN), [SelectJob(3, Select(5, 2), 1, 0, 2)])


def test_tables_that_do_not_fit_are_refused() -> None:
    table = make_table(3)
    with pytest.raises(ValueError, match="level 1: 9 output rows and 10 biases for 10 codes"):
        SelectTable(
            table.trie,
            (table.output_rows[0], table.output_rows[1][:9], table.output_rows[2]),
            table.output_bias,
            table.token_starts,
            table.popularity,
            1.0,
            1.0,
            table.filters,
        )
