"""The shop's items: ids, titles, categories, prices. Columns in memory; polars reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from shoplm.errors import BundleError

_COLUMNS = {
    "item_id": pl.String,
    "title": pl.String,
    "category": pl.String,
    "product_type": pl.String,
    "price": pl.Float64,
    "in_stock": pl.Boolean,
    "row": pl.Int32,
    "type_index": pl.Int32,
}


class ItemFacts(NamedTuple):
    """What chat may say of an item."""

    title: str
    category: str
    price: float
    in_stock: bool = True


@dataclass(frozen=True)
class Catalog:
    """Columns of the items that have a row of their own [N], in row order, and where the rare ones map to."""

    item_ids: list[str]
    titles: list[str]
    categories: list[str]
    prices: NDArray[np.float64]  # NaN where unknown
    in_stock: NDArray[np.bool_]
    type_texts: list[str]  # what the type is, in words: its input embedding is made from this
    rare: dict[str, int]  # item_id -> product type index, for known items without a row
    rare_facts: tuple[ItemFacts, ...] = ()  # of items without a row that have a price, one for each title no row has

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def rows(self) -> dict[str, int]:
        """item_id -> row."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def category_names(self) -> list[str]:
        """Distinct categories, sorted."""
        return sorted(set(self.categories))

    def event_title(self, item: int, has_item: bool) -> str:
        """What an event of a history was about: a row's title, or in words the type that `item` then indexes."""
        return self.titles[item] if has_item else self.type_texts[item].strip()

    def text(self, row: int) -> str:
        """The words that the item's input embedding is made from."""
        return f" {self.titles[row]}, {self.categories[row]}"


def _read(path: Path, columns: Mapping[str, pl.DataType | type[pl.DataType]]) -> pl.DataFrame:
    try:
        table = pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise BundleError(f"{path}: {error}") from error
    for name, dtype in columns.items():
        if table.schema.get(name) != dtype:
            raise BundleError(f"{path}: column {name} is {table.schema.get(name)}, expected {dtype}")
    return table


def _refuse_empty(path: Path, table: pl.DataFrame, columns: Sequence[str]) -> None:
    for name in columns:
        if count := table[name].null_count():
            raise BundleError(f"{path}: column {name} is empty in {count} of {len(table)} rows")


def read_catalog(folder: Path) -> Catalog:
    """Read items.parquet and types.parquet. Raises BundleError naming file and column."""
    path = folder / "items.parquet"
    items = _read(path, _COLUMNS)
    types = _read(folder / "types.parquet", {"description": pl.String})
    _refuse_empty(path, items, ("item_id", "title", "category"))
    _refuse_empty(folder / "types.parquet", types, ("description",))
    with_row = items.filter(pl.col("row").is_not_null()).sort("row")
    if with_row["row"].to_list() != list(range(len(with_row))):
        raise BundleError(f"{path}: column row is not 0..{len(with_row) - 1}, each once")
    without = items.filter(pl.col("row").is_null() & pl.col("type_index").is_not_null())
    others = items.filter(pl.col("row").is_null() & pl.col("price").is_not_nan())
    others = others.join(with_row.drop_nulls("price"), on="title", how="anti")
    others = others.unique("title", keep="first", maintain_order=True)
    facts = others.select("title", "category", "price", pl.col("in_stock").fill_null(True))
    return Catalog(
        item_ids=with_row["item_id"].to_list(),
        titles=with_row["title"].to_list(),
        categories=with_row["category"].to_list(),
        prices=with_row["price"].fill_null(float("nan")).to_numpy().astype(np.float64),
        in_stock=with_row["in_stock"].fill_null(True).to_numpy().astype(np.bool_),
        type_texts=[f" {text}" for text in types["description"].to_list()],
        rare=dict(zip(without["item_id"].to_list(), without["type_index"].to_list(), strict=True)),
        rare_facts=tuple(ItemFacts(*row) for row in facts.iter_rows()),
    )
