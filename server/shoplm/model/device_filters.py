"""Item filters on the GPU: the masks that come again stay there, a request's own exclusions are taken off on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from shoplm.catalog.filters import ItemFilters
from shoplm.kernels.beam_step_types import allowed_prefix
from shoplm.model.device_io import upload
from shoplm.request import ItemFilter, Select
from torch import Tensor

_EVERYTHING = ItemFilter()


@dataclass(frozen=True, slots=True)
class _Kept:
    mask: Tensor  # bool [items]
    prefix: Tensor  # int32 [items + 1]: allowed items before each row


class DeviceFilters:
    """The most recently used `capacity` masks of one catalogue; a million items take 5 MB each."""

    def __init__(self, filters: ItemFilters, items: int, device: torch.device, capacity: int = 32) -> None:
        self._items = items
        self._device = device

        @lru_cache(capacity)  # not of a method: that would keep this object, and its masks, alive by a cycle
        def take(item_filter: ItemFilter) -> _Kept:
            allowed = filters.allowed(item_filter)
            return _Kept(*upload([allowed.mask, allowed.before], device))

        self._take = take

    def prefix(self, select: Select) -> Tensor | None:
        """int32 [items + 1], allowed items before each row; None where every item is allowed.

        Raises IndexError for an excluded row outside the catalogue, ValueError for a filter that needs columns.
        """
        if select.item_filter == _EVERYTHING and not select.exclude_items:
            return None
        kept = self._take(select.item_filter)
        if not select.exclude_items:
            return kept.prefix
        check_items(select.exclude_items, self._items)
        mask = kept.mask.clone()
        [excluded] = upload([np.array(select.exclude_items, np.int64)], self._device)
        mask.index_fill_(0, excluded, False)  # by `mask[excluded] = False` the host would wait for the GPU
        return allowed_prefix(mask[None])[0]


def check_items(rows: tuple[int, ...], items: int) -> None:
    """Raise IndexError for an item row that does not exist: on the device it would end every request, not this one."""
    if rows and not (min(rows) >= 0 and max(rows) < items):
        wrong = next(row for row in rows if not 0 <= row < items)
        raise IndexError(f"item row {wrong} is outside the catalogue of {items} items")
