"""Numbers, flags, categories and ids of a shop's log, as spreadsheets and other programs write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from log_files import HEADER, found, read
from shoplm.history import EventKind
from shoplm.training.log import read_log
from shoplm.training.problems import LogError
from tiny_log import NOW


@pytest.mark.parametrize(
    ("text", "flag"), [("1.0", True), (" Y ", True), ("TRUE", True), ("0.0", False), ("n", False), ("False ", False)]
)
def test_flags_are_read_in_all_spellings(tmp_path: Path, text: str, flag: bool) -> None:
    (tmp_path / "campaigns.csv").write_text(
        f"customer_id,campaign_id,campaign_type,start,end,redeemed\na,1,A,2021-03-01,2021-03-09,{text}\n"
    )
    log = read(
        tmp_path,
        f"{HEADER}\na,x,2021-03-01\na,x,2021-03-02\n",
        f"item_id,in_stock\nx,{text}\n",
        campaigns=tmp_path / "campaigns.csv",
    )
    assert log.campaigns["redeemed"].to_list() == log.items["in_stock"].to_list() == [flag]


def test_odd_numbers_are_repaired_and_said(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        f"{HEADER},quantity,price\n"
        "a,x,2021-03-01,0,1.5\n"
        "a,y,2021-03-02,-2,-1\n"
        "a,z,2021-03-03,nan,\n"
        "a,z,2021-03-03,nan,\n"
        "a,w,2021-02-03,1e30,inf\n",
    )
    rows = log.events.with_columns(pl.col("item").map_elements(lambda n: log.item_ids[n], return_dtype=pl.String))
    by_item = {row["item"]: row for row in rows.iter_rows(named=True)}
    assert len(log.events) == 4
    assert by_item["y"]["kind"] == EventKind.RETURN
    assert by_item["y"]["quantity"] == 2.0
    assert by_item["x"]["quantity"] == by_item["z"]["quantity"] == by_item["w"]["quantity"] == 1.0
    assert [bool(np.isnan(by_item[item]["price"])) for item in "xyzw"] == [False, True, True, True]
    assert found(log)["quantity", "negative"][0] == 1
    assert found(log)["-", "equal to another row in every column"] == (1, "kept once")
    assert found(log)["time", "not in order of time"][1] == "sorted"
    assert log.events["time"].is_sorted()


def test_what_spreadsheets_write_is_read_or_named(tmp_path: Path) -> None:
    log = read(tmp_path, "customer_id;item_id;time;price;quantity\na;x;2021-03-01;1,50;2\na;y;2021-03-02;3;1\n")
    assert log.events["price"].to_list() == [1.5, 3.0]
    assert found(log)["-", "semicolons between the columns"] == (2, "read so")
    log = read(tmp_path, "customer_id;item_id;time;price\na;x;2021-03-01;1.234,5\na;y;2021-03-02;1.000\n")
    assert log.events["price"].to_list() == [1234.5, 1000.0]
    (tmp_path / "marked.csv").write_text(f"{HEADER}\na,x,2021-03-01\na,y,2021-03-02\n", "utf-8-sig")
    assert read_log(tmp_path / "marked.csv", now=NOW).customer_ids == ["a"]
    (tmp_path / "wide.csv").write_text(f"{HEADER}\na,x,2021-03-01\n", "utf-16")
    with pytest.raises(LogError, match="it is UTF-16; save it as UTF-8"):
        read_log(tmp_path / "wide.csv", now=NOW)


@pytest.mark.parametrize(
    ("cells", "numbers", "said"),
    [
        (("1,234.56", "12.50"), (1234.56, 12.5), None),
        (("1,234.56", "1,234"), (1234.56, 1234.0), None),
        (("3,99", "12.50"), (3.99, 12.5), "such as '3,99' and '12.50'"),
        (("1.234,56", "1,234.56"), (1234.56, 1234.56), "such as '1.234,56' and '1,234.56'"),
        (("1.234.567", "0,125"), (1234567.0, 0.125), None),
        (("1.234", "12"), (1.234, 12.0), None),
        (("1,234", "12"), (1.234, 12.0), None),
        (("-1.234,5", " 7,5 "), (-1.0, 7.5), None),
        (("1.23,4", "2,5"), (-1.0, 2.5), None),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_the_last_mark_of_a_number_is_its_decimal_mark(
    tmp_path: Path, suffix: str, cells: tuple[str, str], numbers: tuple[float, float], said: str | None
) -> None:
    """-1: not a price."""
    text = f"customer_id;item_id;time;price\na;x;2021-03-01;{cells[0]}\na;y;2021-03-02;{cells[1]}\n"
    (tmp_path / f"e.{suffix}").write_text(text.replace(";", "\t") if suffix == "tsv" else text)
    log = read_log(tmp_path / f"e.{suffix}", now=NOW)
    assert log.events["price"].fill_nan(-1.0).to_list() == pytest.approx(numbers)
    both = [problem.found for problem in log.problems if problem.found.startswith("decimal commas and")]
    assert both == ([] if said is None else [f"decimal commas and decimal points, {said}"])


def test_categories_are_read_as_their_text(tmp_path: Path) -> None:
    frame = pl.DataFrame({
        "customer_id": ["a", "a"],
        "item_id": ["x", "y"],
        "time": ["2021-03-01", "2021-03-02"],
        "type": ["purchase", "view"],
        "quantity": ["2", "1"],
        "price": ["1.5", "2"],
    })  # fmt: skip
    frame.cast(pl.Categorical).write_parquet(tmp_path / "e.parquet")
    kinds = pl.Enum(["3.5", "nothing"])
    items = pl.DataFrame({"item_id": ["x", "y"], "price": pl.Series(["3.5", "nothing"], dtype=kinds)})
    items.write_parquet(tmp_path / "i.parquet")
    log = read_log(tmp_path / "e.parquet", tmp_path / "i.parquet", now=NOW)
    assert log.events["price"].to_list() == [1.5, 2.0] and log.events["quantity"].to_list() == [2.0, 1.0]
    assert log.items["price"].to_list() == [3.5, 2.0]


def test_ids_that_are_whole_floats_are_whole_numbers(tmp_path: Path) -> None:
    """As nullable numbers of other tools are: 1e15 is no id of the events."""
    numbers = [10**15, 10**16, 3]
    frame = pl.DataFrame(
        {"customer_id": numbers, "item_id": [1.0, 2.5, None], "time": [1614592800, 1614592801, 1614592802]}
    )
    frame.write_parquet(tmp_path / "e.parquet")
    profiles = pl.DataFrame({"customer_id": [float(number) for number in (*numbers[:2], 7)], "age": [1, 2, 3]})
    profiles.write_parquet(tmp_path / "c.parquet")
    log = read_log(tmp_path / "e.parquet", customers=tmp_path / "c.parquet", now=NOW)
    assert log.customer_ids == ["1000000000000000", "10000000000000000"] and log.item_ids == ["1", "2.5"]
    assert [log.attributes[customer] for customer in log.customer_ids] == [(("age", "1"),), (("age", "2"),)]
    assert found(log)["customer_id", "no id of the events; 2 others are"] == (1, "not used")


def test_a_price_column_full_of_nulls_is_no_price(tmp_path: Path) -> None:
    for empty in (pl.Series([None, None], dtype=pl.Null), pl.Series([None, None], dtype=pl.Float64)):
        frame = pl.DataFrame({"customer_id": ["a", "a"], "item_id": ["x", "y"], "time": ["2021-03-01", "2021-03-02"]})
        frame.with_columns(empty.alias("price")).write_parquet(tmp_path / "e.parquet")
        log = read_log(tmp_path / "e.parquet", now=NOW)
        assert log.events["price"].is_nan().all() and log.items["price"].is_null().all()
        assert found(log)["price", "empty, negative or not a number"] == (2, "unknown price")


def test_a_purchase_at_a_negative_price_is_a_return(tmp_path: Path) -> None:
    rows = "a,x,2021-03-01,5,purchase\na,x,2021-03-02,-5,purchase\na,y,2021-03-03,-1,view\n"
    log = read(tmp_path, f"{HEADER},price,type\n{rows}")
    assert log.events["kind"].to_list() == [EventKind.PURCHASE, EventKind.RETURN, EventKind.VIEW]
    assert found(log)["price", "negative, of a purchase"] == (1, "read as a return")
    assert found(log)["price", "empty, negative or not a number"] == (2, "unknown price")


def test_a_catalogue_of_other_ids_is_said(tmp_path: Path) -> None:
    log = read(tmp_path, f"{HEADER}\na,007,2021-03-01\na,008,2021-03-02\n", "item_id,title\n7,Tea\n8,Ale\n")
    text = "in the events but not in the items: none is; they are such as '007', the items' '7'"
    assert found(log)["item_id", text] == (2, "added, with the id as the title")
