"""What is read of a bundle's items."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from shoplm.catalog.items import ItemFacts, read_catalog


def test_of_items_without_a_row_chat_is_told_what_no_row_says(tmp_path: Path) -> None:
    items = [  # title, price, row
        ("Bread", 2.0, 0),
        ("Tea", None, 1),
        ("Irons, national brand", None, None),
        ("Irons, national brand", 9.99, None),
        ("Irons, national brand", 7.99, None),
        ("Bread", 9.0, None),
        ("Tea", 3.0, None),
        ("Salt", float("nan"), None),
    ]
    pl.DataFrame(
        {
            "item_id": [str(number) for number in range(len(items))],
            "title": [title for title, _, _ in items],
            "category": ["Goods"] * len(items),
            "product_type": ["GOODS"] * len(items),
            "price": [price for _, price, _ in items],
            "in_stock": [True] * len(items),
            "row": pl.Series([row for _, _, row in items], dtype=pl.Int32),
            "type_index": pl.Series([None if row is not None else 0 for _, _, row in items], dtype=pl.Int32),
        }
    ).write_parquet(tmp_path / "items.parquet")
    pl.DataFrame({"description": ["goods"]}).write_parquet(tmp_path / "types.parquet")
    catalog = read_catalog(tmp_path)
    assert catalog.titles == ["Bread", "Tea"]
    assert catalog.rare_facts == (ItemFacts("Irons, national brand", "Goods", 9.99), ItemFacts("Tea", "Goods", 3.0))
