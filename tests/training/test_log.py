"""Shop logs as they come: what is wrong with files and rows is counted, said and repaired; fatal problems at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from log_files import HEADER, found, read
from shoplm.errors import ConfigurationError
from shoplm.history import EventKind
from shoplm.training.catalogue import choose_items
from shoplm.training.log import read_log
from shoplm.training.pipeline import prepare
from shoplm.training.problems import LogError
from tiny_log import NOW


def test_three_columns_are_enough(tmp_path: Path) -> None:
    log = read(tmp_path, f"{HEADER}\n007,x,2021-03-01 10:00:00\n007,y,2021-03-02\n")
    assert log.customer_ids == ["007"]
    assert log.item_ids == ["x", "y"]
    assert log.events["kind"].to_list() == [EventKind.PURCHASE] * 2
    assert log.events["quantity"].to_list() == [1.0, 1.0]
    assert log.events["price"].is_nan().all()
    assert log.items["title"].to_list() == ["x", "y"]


def test_a_path_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "a[" / "x]*"
    folder.mkdir(parents=True)
    log = read(folder, f"{HEADER}\na,x,2021-03-01\na,y,2021-03-02\n", "item_id\nx\n")
    assert log.item_ids == ["x", "y"]
    pl.read_csv(folder / "events.csv", glob=False).write_parquet(folder / "e.parquet")
    assert read_log(folder / "e.parquet", now=NOW).customer_ids == ["a"]


def test_what_is_neither_true_nor_false_is_said(tmp_path: Path) -> None:
    items = 'item_id,in_stock,price\nx,sold out,1\ny,,"1,99"\n'
    log = read(tmp_path, f"{HEADER}\na,x,2021-03-01\na,y,2021-03-02\n", items)
    assert found(log)["in_stock", "neither true nor false, such as 'sold out'"] == (1, "taken as in stock")
    assert found(log)["price", "negative or not a number, such as '1,99'"] == (1, "median price paid instead")


def test_kinds_of_events_that_tell_little_are_said(tmp_path: Path) -> None:
    views = "".join(f"a,x,2021-03-{day:02d} {hour:02d}:00,view\n" for day in range(2, 30) for hour in range(24))
    log = read(tmp_path, f"{HEADER},type\na,x,2021-03-01,purchase\n{views}a,x,2021-03-01,BUY\na,x,2021-03-01,order\n")
    said = [problem for problem in log.problems if problem.column == "type"]
    assert said[0].found.endswith("such as 'BUY', 'order'") and said[0].rows == 2
    assert said[1].found.startswith("so few purchases beside") and said[1].rows == 1
    with pytest.raises(LogError, match="nothing but returns"):
        read(tmp_path, f"{HEADER},type\na,x,2021-03-01,return\na,x,2021-03-02,return\n")


def test_unusable_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        f"{HEADER},type\n"
        "a,x,2021-03-01,purchase\n"
        "a,x,2021-03-04,purchase\n"
        ",x,2021-03-01,purchase\n"
        "a,,2021-03-01,purchase\n"
        "a,x,yesterday,purchase\n"
        "a,x,2099-01-01,purchase\n"
        "a,x,1960-01-01,purchase\n"
        "a,x,2021-03-02,wished for\n",
    )
    assert len(log.events) == 2
    assert {column: rows for (column, _), (rows, _) in found(log).items() if column != "item_id"} == {
        "customer_id": 1,
        "time": 1,
        "type": 1,
    }
    assert found(log)["time", "in the future"] == (1, "dropped")
    assert found(log)["time", "empty or not a time, such as 'yesterday'"] == (1, "dropped")
    assert found(log)["time", "before 1970-01-02"] == (1, "dropped")


def test_items_are_completed_from_the_log_and_prices_from_what_was_paid(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        f"{HEADER},price\na,x,2021-03-01,3\na,x,2021-03-02,5\na,new,2021-03-02,2\n",
        "item_id,title,product_type,in_stock,colour\nx,绿茶,茶,no,green\nx,again,,,\n,no id,,,\ny,Only listed,,1,\n",
    )
    items = {row["item_id"]: row for row in log.items.iter_rows(named=True)}
    assert items["x"]["title"] == "绿茶"
    assert items["x"]["category"] == items["x"]["product_type"] == "茶"
    assert items["x"]["price"] == 4.0
    assert items["x"]["colour"] == "green"
    assert [items[name]["in_stock"] for name in ("x", "y", "new")] == [False, True, True]
    assert items["new"]["title"] == "new"
    assert items["y"]["price"] is None
    assert found(log)["item_id", "repeated"][0] == 1
    assert found(log)["item_id", "in the events but not in the items"][0] == 1


def test_columns_that_a_bundle_has_of_its_own_are_left_out_and_said(tmp_path: Path) -> None:
    """Whatever else the catalogue has is kept: also what a join would name alike."""
    items = "item_id,product_type,row,type_index,paid\nx,tea,7,0,999\ny,ale,abc,abc,yes\n"
    log = read(tmp_path, f"{HEADER},price\na,x,2021-03-01,2.5\na,y,2021-03-02,3\n", items)
    assert log.items["price"].to_list() == [2.5, 3.0]
    assert log.items["paid"].to_list() == ["999", "yes"]
    assert not {"row", "type_index"} & set(log.items.columns)
    assert found(log)["row", "a column that a bundle has of its own"] == (2, "left out")
    chosen = choose_items(log, NOW)
    assert chosen.types["title"].to_list() == ["ale", "tea"]
    assert dict(zip(chosen.table["item_id"], chosen.table["type_index"], strict=True)) == {"x": 1, "y": 0}


def test_fatal_problems_are_said_together(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("name\nx\n")
    (tmp_path / "events.csv").write_text("customer,item_id\na,x\n")
    with pytest.raises(LogError) as caught:
        read_log(tmp_path / "events.csv", tmp_path / "items.csv", now=NOW)
    assert [(p.table, p.column) for p in caught.value.problems if p.fatal] == [
        ("events", "customer_id"),
        ("events", "time"),
        ("items", "item_id"),
    ]


def test_a_log_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no usable row is left"):
        read(tmp_path, f"{HEADER}\na,x,never\n")


def test_unknown_kinds_of_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "events.xlsx").write_bytes(b"PK")
    with pytest.raises(LogError, match=r"neither \.parquet nor \.csv"):
        read_log(tmp_path / "events.xlsx", now=NOW)


@pytest.mark.parametrize(
    ("events", "options", "column", "said"),
    [
        (f"{HEADER}\na,x,2021-03-01\nb,y,2021-03-01\n", {}, "time", "all events are at 2021-03-01T00:00:00"),
        (f"{HEADER},Time\na,x,2021-03-01,2021-03-02\n", {}, "time", "more than one column is called so: time, Time"),
        (f"{HEADER}\na,x,2021-03-01\n", {"timezone": "Mars/Olympus"}, "time", "no time zone is called 'Mars/Olympus'"),
        ("", {}, "-", "events.csv"),
    ],
)
def test_what_cannot_be_used_is_a_row_of_the_table(
    tmp_path: Path, events: str, options: dict[str, object], column: str, said: str
) -> None:
    with pytest.raises(LogError) as caught:
        read(tmp_path, events, **options)  # type: ignore[arg-type]
    (problem,) = [problem for problem in caught.value.problems if problem.fatal]
    assert problem.column == column and said in problem.found and problem.done


def test_cells_that_hold_lists_are_refused(tmp_path: Path) -> None:
    pl.DataFrame({"customer_id": ["a"], "item_id": [["x", "y"]], "time": ["2021-03-01"]}).write_parquet(
        tmp_path / "e.parquet"
    )
    with pytest.raises(LogError, match=r"events\.item_id: a cell holds List\(String\), not one value"):
        read_log(tmp_path / "e.parquet", now=NOW)


def test_a_stray_event_behind_a_gap_is_said(tmp_path: Path) -> None:
    days = [f"a,x,2020-{month:02d}-{day:02d}" for month in range(1, 11) for day in range(1, 29)]
    log = read(tmp_path, "\n".join([HEADER, *days]))
    assert not any("before a gap" in problem.found for problem in log.problems)
    log = read(tmp_path, "\n".join([HEADER, *days, "a,x,2021-12-20"]))
    (problem,) = [problem for problem in log.problems if "before a gap" in problem.found]
    assert problem.rows == 1 and "2021-12-20" in problem.found and "2020-10-28" in problem.found
    with pytest.raises(ConfigurationError, match=r"no purchase from 2021-10-21 to 2021-11-20.* of 2020-10-28"):
        prepare(log)


def test_a_large_log_is_read_whole(tmp_path: Path) -> None:
    """30,000 customers with 25 events each."""
    random = np.random.default_rng(0)
    count = 30_000 * 25
    frame = pl.DataFrame(
        {
            "customer_id": np.repeat(np.arange(30_000), 25),
            "item_id": random.integers(0, 5_000, count),
            "time": 1_600_000_000 + random.integers(0, 86_400 * 300, count),
            "price": random.uniform(1.0, 20.0, count),
        }
    )
    frame.write_parquet(tmp_path / "e.parquet")
    log = read_log(tmp_path / "e.parquet", now=NOW)
    assert len(log.customer_ids) == 30_000 and len(log.item_ids) == 5_000
    assert len(log.events) == count - found(log).get(("-", "equal to another row in every column"), (0, ""))[0]
    assert found(log)["time", "not in order of time"] == (len(log.events), "sorted")
