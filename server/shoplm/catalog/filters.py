"""Which items a request may get: a mask over item rows, kept for the filters that come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from shoplm.request import ItemFilter

Mask = NDArray[np.bool_]
_EVERYTHING = ItemFilter()


@dataclass(frozen=True)
class ItemColumns:
    """What filters look at, one entry per item row."""

    categories: Sequence[str]
    prices: NDArray[np.float64]  # NaN where unknown: such an item passes no price bound
    in_stock: NDArray[np.bool_]

    def __post_init__(self) -> None:
        items = len(self.categories)
        if len(self.prices) != items or len(self.in_stock) != items:
            raise ValueError(f"{items} categories but {len(self.prices)} prices and {len(self.in_stock)} in_stock")


@dataclass(frozen=True)
class AllowedItems:
    """A mask and its prefix sums; both read-only."""

    mask: Mask  # [items]
    before: NDArray[np.int32]  # [items + 1]: allowed items before each row

    def any_between(self, low: NDArray[np.int32], high: NDArray[np.int32]) -> Mask:
        """Whether a row in low .. high - 1 is allowed, for arrays of ranges."""
        result: Mask = self.before[high] > self.before[low]
        return result


class ItemFilters:
    """Masks of `items` rows, the most recently used `capacity` of them kept."""

    def __init__(self, items: int, columns: ItemColumns | None = None, capacity: int = 256) -> None:
        """Without columns (a trie that has no catalogue) only the empty filter can be asked for."""
        if columns is not None and len(columns.categories) != items:
            raise ValueError(f"columns of {len(columns.categories)} items for a catalogue of {items}")
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}, expected at least 1")
        self._items = items
        self._columns = columns
        self._capacity = capacity
        self._kept: OrderedDict[ItemFilter, AllowedItems] = OrderedDict()
        self._category_index: dict[str, int] = {}
        if columns is not None:
            names, index = np.unique(np.asarray(columns.categories, dtype=np.str_), return_inverse=True)
            self._category_index = {str(name): position for position, name in enumerate(names)}
            self._categories = index.astype(np.int32)

    def allowed(self, item_filter: ItemFilter, exclude_items: Sequence[int] = ()) -> AllowedItems:
        """Items that pass the filter and are not in `exclude_items` (item rows; they are the request's own, not kept).

        Raises ValueError for a filter without columns and IndexError for an item row outside the catalogue.
        """
        kept = self._kept.get(item_filter)
        if kept is None:
            kept = _with_prefix(self._mask(item_filter))
            self._kept[item_filter] = kept
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(item_filter)
        if not exclude_items:
            return kept
        mask = kept.mask.copy()
        mask[np.asarray(exclude_items, np.int64)] = False
        return _with_prefix(mask)

    def _mask(self, item_filter: ItemFilter) -> Mask:
        mask = np.ones(self._items, np.bool_)
        if item_filter == _EVERYTHING:
            return mask
        columns = self._columns
        if columns is None:
            raise ValueError(f"{item_filter} needs item columns, which this trie does not have")
        if item_filter.include_categories:
            mask &= self._in_categories(item_filter.include_categories)
        if item_filter.exclude_categories:
            mask &= ~self._in_categories(item_filter.exclude_categories)
        if item_filter.min_price is not None:
            mask &= columns.prices >= item_filter.min_price
        if item_filter.max_price is not None:
            mask &= columns.prices <= item_filter.max_price
        if item_filter.in_stock_only:
            mask &= columns.in_stock
        return mask

    def _in_categories(self, names: Sequence[str]) -> Mask:
        chosen = np.zeros(len(self._category_index), np.bool_)
        chosen[[self._category_index[name] for name in names if name in self._category_index]] = True
        result: Mask = chosen[self._categories]
        return result


def _with_prefix(mask: Mask) -> AllowedItems:
    before = np.zeros(len(mask) + 1, np.int32)
    np.cumsum(mask, out=before[1:])
    mask.flags.writeable = False
    before.flags.writeable = False
    return AllowedItems(mask, before)
