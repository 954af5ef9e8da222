"""Which items get a token of their own, and the tables that a bundle stores about items and product types."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from shoplm.history import EventKind
from shoplm.training.log import ShopLog
from shoplm.vocabulary import ShopVocabulary

# How often an item must have been bought for a token of its own: the largest that still covers enough of the log.
MINIMUM_COUNTS = (10, 5, 3, 2, 1)
COVERED_SHARE = 0.85
LABELS = (EventKind.PURCHASE, EventKind.CART, EventKind.VIEW)  # what is recommended: the first kind that there is
MAX_ITEMS = 100_000


@dataclass(frozen=True)
class ShopItems:
    """Items and product types, numbered. `item` counts the log's items, `row` the catalogue's."""

    index: NDArray[np.int32]  # [items] catalogue row where has_row, else product type
    has_row: NDArray[np.bool_]  # [items]
    row_item: NDArray[np.int32]  # [rows] the item of each row; most often bought first
    row_counts: NDArray[np.int64]  # [rows] events of the label kind before the end of training
    row_prices: NDArray[np.float32]  # [rows] NaN unknown
    table: pl.DataFrame  # items.parquet
    types: pl.DataFrame  # types.parquet
    label_kind: EventKind  # what is recommended: what customers buy; without purchases, put into carts or look at
    minimum_count: int
    covered_share: float  # of the label events, how many concern an item with a row

    def vocabulary(self, text_size: int) -> ShopVocabulary:
        return ShopVocabulary(text_size, (len(self.row_item),), len(self.types))

    @property
    def row_types(self) -> NDArray[np.int32]:
        """[rows]: the product type of each."""
        types: NDArray[np.int32] = self.table["type_index"].to_numpy()[self.row_item].astype(np.int32)
        return types


def choose_items(log: ShopLog, until: float) -> ShopItems:
    """Number the items by the events before `until` (Unix seconds) alone."""
    past = log.events.filter(pl.col("time") < until)
    present = set(past["kind"].unique().to_list())
    label_kind = next((kind for kind in LABELS if int(kind) in present), EventKind.PURCHASE)
    labels = past.filter(pl.col("kind") == int(label_kind))["item"].to_numpy()
    counts = np.bincount(labels, minlength=len(log.item_ids))
    minimum, covered = _minimum_count(counts)
    # Most often bought first: ties of scores go to the lower row. Item ids are sorted, so this is the same every time.
    order = np.lexsort((np.arange(len(counts)), -counts))
    row_item = order[counts[order] >= max(minimum, 1)][:MAX_ITEMS].astype(np.int32)
    types = log.items.group_by("product_type").len().sort("product_type")["product_type"].to_list()
    type_index = pl.DataFrame({"product_type": types, "type_index": pl.Series(range(len(types)), dtype=pl.Int32)})
    row_of = np.full(len(log.item_ids), len(row_item), np.int64)
    row_of[row_item] = np.arange(len(row_item))
    has_row = row_of < len(row_item)
    rows = pl.Series("row", row_of, dtype=pl.Int32).set(pl.Series(~has_row), None)
    table = log.items.with_columns(rows).join(type_index, on="product_type", maintain_order="left")
    prices = table["price"].fill_null(float("nan")).to_numpy()
    return ShopItems(
        index=np.where(has_row, row_of, table["type_index"].to_numpy()).astype(np.int32),
        has_row=has_row,
        row_item=row_item,
        row_counts=counts[row_item].astype(np.int64),
        row_prices=prices[row_item].astype(np.float32),
        table=table,
        types=pl.DataFrame({"title": types, "description": types}),
        label_kind=label_kind,
        minimum_count=minimum,
        covered_share=covered,
    )


def _minimum_count(counts: NDArray[np.int64]) -> tuple[int, float]:
    total = max(int(counts.sum()), 1)
    for minimum in MINIMUM_COUNTS:
        covered = float(counts[counts >= minimum].sum()) / total
        if covered >= COVERED_SHARE:
            break
    return minimum, covered
