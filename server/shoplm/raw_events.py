"""A customer's events as they came, in a call or in a file, before they are sorted into a `History`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from shoplm.catalog.items import Catalog
from shoplm.history import EventKind, History, build_history


@dataclass(frozen=True)
class RawEvents:
    """Events of one customer whose items are known, in the order given. Arrays of one length [E]."""

    item: NDArray[np.int32]
    has_item: NDArray[np.bool_]
    kind: NDArray[np.int8]
    time: NDArray[np.float64]  # Unix seconds
    quantity: NDArray[np.float32]
    price: NDArray[np.float64]  # NaN where unknown
    basket: list[str]

    def __len__(self) -> int:
        return len(self.item)

    def select(self, rows: NDArray[np.int64]) -> RawEvents:
        """These events, in this order."""
        return RawEvents(
            item=self.item[rows],
            has_item=self.has_item[rows],
            kind=self.kind[rows],
            time=self.time[rows],
            quantity=self.quantity[rows],
            price=self.price[rows],
            basket=[self.basket[row] for row in rows.tolist()],
        )

    def history(self, as_of: float, attributes: Mapping[str, str], counted: EventKind) -> History:
        """Sorted and grouped into baskets. All events are at or before `as_of`."""
        return build_history(
            item=self.item,
            has_item=self.has_item,
            kind=self.kind,
            time=self.time,
            quantity=self.quantity,
            price=self.price,
            basket_key=self.basket,
            as_of=as_of,
            attributes=tuple(attributes.items()),
            counted=counted,
        )


def resolve_items(
    item_ids: list[str], catalog: Catalog
) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_]]:
    """(item, has_item, known): the item's row, or the product type that stands for a rare item."""
    rows, rare = catalog.rows, catalog.rare
    row = np.asarray([rows.get(item_id, -1) for item_id in item_ids], np.int32)
    kind = np.asarray([rare.get(item_id, -1) for item_id in item_ids], np.int32)
    has_item = row >= 0
    return np.where(has_item, row, kind), has_item, has_item | (kind >= 0)
