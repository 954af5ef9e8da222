"""Item filters against a plain test of each item."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoplm.catalog.filters import ItemColumns, ItemFilters
from shoplm.request import ItemFilter

CATEGORIES = ("dairy", "fruit", "bakery")
names = st.lists(st.sampled_from((*CATEGORIES, "unknown")), max_size=3).map(tuple)
prices = st.one_of(st.none(), st.floats(0, 10), st.integers(0, 100).map(lambda tenths: tenths / 10))


def columns(items: int = 60) -> ItemColumns:
    generator = np.random.default_rng(5)
    price = generator.uniform(0, 10, items).round(1)
    price[::7] = np.nan
    category = [CATEGORIES[index] for index in generator.integers(0, 3, items)]
    return ItemColumns(category, price, generator.random(items) < 0.8)


def passes(item: int, table: ItemColumns, wanted: ItemFilter) -> bool:
    category, price = table.categories[item], float(table.prices[item])
    if wanted.include_categories and category not in wanted.include_categories:
        return False
    if category in wanted.exclude_categories or (wanted.in_stock_only and not table.in_stock[item]):
        return False
    bounded = wanted.min_price is not None or wanted.max_price is not None
    if bounded and math.isnan(price):
        return False
    low = -math.inf if wanted.min_price is None else wanted.min_price
    high = math.inf if wanted.max_price is None else wanted.max_price
    return not bounded or low <= price <= high


@given(names, names, prices, prices, st.booleans(), st.lists(st.integers(0, 59), max_size=5))
def test_masks_are_what_each_item_says(
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    low: float | None,
    high: float | None,
    in_stock: bool,
    excluded: list[int],
) -> None:
    table = columns()
    wanted = ItemFilter(include, exclude, low, high, in_stock)
    filters = ItemFilters(60, table)
    expected = [passes(item, table, wanted) and item not in excluded for item in range(60)]
    allowed = filters.allowed(wanted, excluded)
    assert allowed.mask.tolist() == expected
    assert allowed.before.tolist() == [sum(expected[:item]) for item in range(61)]
    starts, ends = np.arange(0, 50, 3, dtype=np.int32), np.arange(10, 60, 3, dtype=np.int32)
    spans = [any(expected[start:end]) for start, end in zip(starts, ends, strict=True)]
    assert allowed.any_between(starts, ends).tolist() == spans


@pytest.mark.parametrize(("price", "step"), [(0.94, 0.01), (1.99, 0.01), (16_777_217.0, 1.0), (999_999_999.5, 0.5)])
def test_a_price_passes_bounds_of_its_own_and_the_next_one_does_not(price: float, step: float) -> None:
    """In fp32 16,777,217 is 16,777,216."""
    table = ItemColumns(("dairy",) * 4, np.array([price, price - step, price + step, np.nan]), np.ones(4, np.bool_))
    filters, bound = ItemFilters(4, table), price
    assert filters.allowed(ItemFilter(max_price=bound)).mask.tolist() == [True, True, False, False]
    assert filters.allowed(ItemFilter(min_price=bound)).mask.tolist() == [True, False, True, False]
    assert filters.allowed(ItemFilter(min_price=bound, max_price=bound)).mask.tolist() == [True, False, False, False]


def test_masks_are_kept_by_last_use_and_cannot_be_changed() -> None:
    filters = ItemFilters(60, columns(), capacity=2)
    first = filters.allowed(ItemFilter(in_stock_only=True))
    filters.allowed(ItemFilter(min_price=1.0))
    assert filters.allowed(ItemFilter(in_stock_only=True)) is first
    filters.allowed(ItemFilter(min_price=2.0))  # pushes out the one used longest ago
    assert filters.allowed(ItemFilter(in_stock_only=True)) is first
    with pytest.raises(ValueError, match="read-only"):
        first.mask[0] = False


def test_excluding_items_leaves_the_kept_mask_alone() -> None:
    filters = ItemFilters(4)
    assert filters.allowed(ItemFilter(), (1, 3)).mask.tolist() == [True, False, True, False]
    assert filters.allowed(ItemFilter()).mask.all()


def test_a_filter_needs_columns() -> None:
    with pytest.raises(ValueError, match="needs item columns"):
        ItemFilters(4).allowed(ItemFilter(in_stock_only=True))
    with pytest.raises(ValueError, match="columns of 60 items for a catalogue of 4"):
        ItemFilters(4, columns())
