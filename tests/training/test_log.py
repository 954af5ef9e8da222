"""Shop logs as they come: what is wrong is counted, said and repaired; fatal problems are all said at once."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from shoplm.errors import ConfigurationError
from shoplm.history import EventKind
from shoplm.training.catalogue import choose_items
from shoplm.training.log import ShopLog, read_log
from shoplm.training.log_columns import time_column
from shoplm.training.pipeline import prepare
from shoplm.training.problems import LogError
from tiny_log import NOW

HEADER = "customer_id,item_id,time"


def read(folder: Path, events: str, items: str | None = None, **options: object) -> ShopLog:
    (folder / "events.csv").write_text(events, "utf-8")
    if items is not None:
        (folder / "items.csv").write_text(items, "utf-8")
        options["items"] = folder / "items.csv"
    return read_log(folder / "events.csv", now=NOW, **options)  # type: ignore[arg-type]


def found(log: ShopLog) -> dict[tuple[str, str], tuple[int, str]]:
    return {(problem.column, problem.found): (problem.rows, problem.done) for problem in log.problems}


def test_three_columns_are_enough(tmp_path: Path) -> None:
    log = read(tmp_path, f"{HEADER}\n007,x,2021-03-01 10:00:00\n007,y,2021-03-02\n")
    assert log.customer_ids == ["007"]
    assert log.item_ids == ["x", "y"]
    assert log.events["kind"].to_list() == [EventKind.PURCHASE] * 2
    assert log.events["quantity"].to_list() == [1.0, 1.0]
    assert log.events["price"].is_nan().all()
    assert log.items["title"].to_list() == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2021-03-01T10:00:00Z", 1614592800.0),
        ("2021-03-01 10:00:00+02:00", 1614585600.0),
        ("2021-03-01 10:00:00.250", 1614592800.25),
        ("2021-03-01 10:00", 1614592800.0),
        ("2021-03-01", 1614556800.0),
        ("20210301", 1614556800.0),
        ("2021-03-01T10:00Z", 1614592800.0),
        ("2021-03-01t10:00+02:00", 1614585600.0),
        ("2021-03-01T10:00:00,250z", 1614592800.25),
        ("1614592800", 1614592800.0),
        ("1614592800000", 1614592800.0),
    ],
)
def test_times_are_read_in_all_documented_forms(tmp_path: Path, text: str, seconds: float) -> None:
    log = read(tmp_path, f'{HEADER}\na,x,2000-01-01\na,x,"{text}"\n')
    assert log.events["time"].to_list() == [946684800.0, seconds]


@pytest.mark.parametrize("text", ["2021", "45322", "-5"])
def test_small_numbers_are_no_times(tmp_path: Path, text: str) -> None:
    """Years, a spreadsheet's days: as seconds they would be of 1970, and stretch the log."""
    log = read(tmp_path, f"{HEADER}\na,x,2021-03-01\na,x,2021-03-02\na,x,{text}\n")
    assert len(log.events) == 2
    assert found(log)["time", "empty or not a time"] == (1, "dropped")


def test_a_path_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "a[" / "x]*"
    folder.mkdir(parents=True)
    log = read(folder, f"{HEADER}\na,x,2021-03-01\na,y,2021-03-02\n", "item_id\nx\n")
    assert log.item_ids == ["x", "y"]
    pl.read_csv(folder / "events.csv", glob=False).write_parquet(folder / "e.parquet")
    assert read_log(folder / "e.parquet", now=NOW).customer_ids == ["a"]


def test_dates_may_be_numbers(tmp_path: Path) -> None:
    frame = pl.DataFrame({"customer_id": [1, 1], "item_id": [2, 2], "time": [20210301, 20210302]})
    frame.write_parquet(tmp_path / "e.parquet")
    assert read_log(tmp_path / "e.parquet", now=NOW).events["time"].to_list() == [1614556800.0, 1614643200.0]


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


def test_what_is_neither_true_nor_false_is_said(tmp_path: Path) -> None:
    items = 'item_id,in_stock,price\nx,sold out,1\ny,,"1,99"\n'
    log = read(tmp_path, f"{HEADER}\na,x,2021-03-01\na,y,2021-03-02\n", items)
    assert found(log)["in_stock", "neither true nor false, such as 'sold out'"] == (1, "taken as in stock")
    assert found(log)["price", "negative or not a number"] == (1, "median price paid instead")


def test_kinds_of_events_that_tell_little_are_said(tmp_path: Path) -> None:
    views = "".join(f"a,x,2021-03-{day:02d} {hour:02d}:00,view\n" for day in range(2, 30) for hour in range(24))
    log = read(tmp_path, f"{HEADER},type\na,x,2021-03-01,purchase\n{views}a,x,2021-03-01,BUY\na,x,2021-03-01,order\n")
    said = [problem for problem in log.problems if problem.column == "type"]
    assert said[0].found.endswith("such as 'BUY', 'order'") and said[0].rows == 2
    assert said[1].found.startswith("so few purchases beside") and said[1].rows == 1
    with pytest.raises(LogError, match="nothing but returns"):
        read(tmp_path, f"{HEADER},type\na,x,2021-03-01,return\na,x,2021-03-02,return\n")


def test_profiles_that_a_server_refuses_or_that_name_one_customer_are_left_out(tmp_path: Path) -> None:
    count = 120
    profiles = pl.DataFrame({
        "customer_id": [f"c{number}" for number in range(count)],
        "email": [f"c{number}@example.org" for number in range(count)],
        "note": ["word " * 100] * count,
        "age": ["30", "40"] * (count // 2),
        "as_of": ["2021-03-01"] * count,
        "tags": [["a"]] * count,
    })  # fmt: skip
    profiles.write_parquet(tmp_path / "customers.parquet")
    rows = "".join(f"c{number},x,2021-03-0{1 + number % 9}\n" for number in range(count))
    log = read(tmp_path, f"{HEADER}\n{rows}", customers=tmp_path / "customers.parquet")
    assert log.attributes["c7"] == (("age", "40"),)
    said = {problem.column: problem.done for problem in log.problems if problem.table == "customers"}
    assert said == {
        "email": "left out: it says nothing of others",
        "note": "left out",
        "tags": "left out",
    }


def test_local_times_are_those_of_the_named_zone(tmp_path: Path) -> None:
    log = read(tmp_path, f"{HEADER}\na,x,2021-07-01 10:00:00\na,x,2021-01-01 10:00:00\n", timezone="Europe/Berlin")
    assert log.events["time"].to_list() == [1609491600.0, 1625126400.0]


def test_parquet_times_keep_their_zone(tmp_path: Path) -> None:
    moment = (
        pl.Series([1614592800000, 1614592860000], dtype=pl.Int64).cast(pl.Datetime("ms")).dt.replace_time_zone("UTC")
    )
    local = moment.dt.convert_time_zone("Asia/Tokyo")
    pl.DataFrame({"customer_id": [1, 1], "item_id": [2, 2], "time": local}).write_parquet(tmp_path / "e.parquet")
    log = read_log(tmp_path / "e.parquet", now=NOW)
    assert log.events["time"].to_list() == [1614592800.0, 1614592860.0]
    assert log.customer_ids == ["1"]
    assert ("time", "no time zone") not in found(log)


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
    assert found(log)["time", "empty or not a time"] == (1, "dropped")
    assert found(log)["time", "before 1970-01-02"] == (1, "dropped")


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


def test_a_stray_event_behind_a_gap_is_said(tmp_path: Path) -> None:
    days = [f"a,x,2020-{month:02d}-{day:02d}" for month in range(1, 11) for day in range(1, 29)]
    log = read(tmp_path, "\n".join([HEADER, *days]))
    assert not any("before a gap" in problem.found for problem in log.problems)
    log = read(tmp_path, "\n".join([HEADER, *days, "a,x,2021-12-20"]))
    (problem,) = [problem for problem in log.problems if "before a gap" in problem.found]
    assert problem.rows == 1 and "2021-12-20" in problem.found and "2020-10-28" in problem.found
    with pytest.raises(ConfigurationError, match=r"no purchase from 2021-10-21 to 2021-11-20.* of 2020-10-28"):
        prepare(log)


def test_profiles_of_nobody_in_the_log_are_said(tmp_path: Path) -> None:
    for ids, said in ((("C1", "C2"), True), (("1", "C2"), False)):
        (tmp_path / "customers.csv").write_text("customer_id,age\n" + "".join(f"{each},30\n" for each in ids))
        log = read(tmp_path, f"{HEADER}\n1,x,2021-03-01\n2,y,2021-03-02\n", customers=tmp_path / "customers.csv")
        text = "no id of the events, which are such as '1'; these are such as 'C1'"
        assert (("customer_id", text) in found(log)) == said


def test_campaigns_and_profiles_of_unknown_customers_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "campaigns.csv").write_text(
        "customer_id,campaign_id,campaign_type,start,end,redeemed\n"
        "a,1,A,2021-03-01,2021-03-09,true\n"
        "a,2,A,2021-03-09,2021-03-01,1\n"
        "nobody,1,A,2021-03-01,2021-03-09,0\n"
    )
    (tmp_path / "customers.csv").write_text("customer_id,age,city\na,30,\nnobody,40,x\na,50,y\n")
    log = read(
        tmp_path,
        f"{HEADER}\na,x,2021-03-01\na,x,2021-03-02\n",
        campaigns=tmp_path / "campaigns.csv",
        customers=tmp_path / "customers.csv",
    )
    assert log.campaigns["campaign_id"].to_list() == ["1"]
    assert log.campaigns["redeemed"].to_list() == [True]
    assert log.attributes["a"] == (("age", "30"),)


def test_times_without_a_zone_are_said(tmp_path: Path) -> None:
    text = f"{HEADER}\na,x,2021-07-01 10:00\na,x,2021-07-02T10:00:00\na,y,2021-07-01T10:00:00Z\na,y,1614592800\n"
    assert found(read(tmp_path, text))["time", "no time zone"] == (2, "read as UTC (--timezone)")
    local = found(read(tmp_path, text, timezone="Asia/Tokyo"))
    assert local["time", "no time zone"] == (2, "read as Asia/Tokyo (--timezone)")
    naive = pl.DataFrame({"customer_id": [1, 1], "item_id": [2, 2], "time": pl.Series([1, 2]).cast(pl.Datetime("ms"))})
    later = naive.with_columns(pl.col("time") + pl.duration(days=18_000))
    later.write_parquet(tmp_path / "naive.parquet")
    assert found(read_log(tmp_path / "naive.parquet", now=NOW))["time", "no time zone"][0] == 2


def test_an_hour_that_summer_time_skips_is_no_time(tmp_path: Path) -> None:
    text = f"{HEADER}\na,x,2021-03-28 02:30:00\na,x,2021-03-28 03:30:00\na,x,2021-10-31 02:30:00\n"
    log = read(tmp_path, text, timezone="Europe/Berlin")
    assert log.events["time"].to_list() == [1616895000.0, 1635640200.0]
    assert found(log)["time", "empty or not a time"] == (1, "dropped")


def test_a_date_without_a_midnight_begins_when_it_does(tmp_path: Path) -> None:
    """In Cairo, summer time began at midnight."""
    zone = ZoneInfo("Africa/Cairo")
    expected = [datetime(2024, 4, day, hour, tzinfo=zone).timestamp() for day, hour in ((25, 0), (26, 1), (27, 0))]
    dates = pl.Series(["2024-04-25", "2024-04-26", "2024-04-27"])
    for column in (dates, dates.str.to_date(), dates.str.to_datetime(), dates.str.replace_all("-", "").cast(pl.Int64)):
        frame = pl.DataFrame({"time": column})
        assert frame.select(time_column(frame, "time", "Africa/Cairo"))["time"].to_list() == expected


def test_a_campaign_lasts_until_the_end_of_its_last_day(tmp_path: Path) -> None:
    (tmp_path / "campaigns.csv").write_text(
        "customer_id,campaign_id,campaign_type,start,end,redeemed\n"
        "a,1,A,2021-03-02,2021-03-02,true\n"
        "a,2,A,2021-03-01 10:00,2021-03-01 10:00,true\n"
        "a,3,A,2021-03-27,2021-03-28,no\n"
    )
    log = read(
        tmp_path,
        f"{HEADER}\na,x,2021-03-01\na,x,2021-03-02\n",
        campaigns=tmp_path / "campaigns.csv",
        timezone="Europe/Berlin",
    )
    assert log.campaigns["campaign_id"].to_list() == ["1", "3"]
    # The second one's last day has 23 hours.
    assert (log.campaigns["end"] - log.campaigns["start"]).to_list() == [86_400.0, 47 * 3600.0]


def test_rows_that_disagree_on_a_campaign_are_one(tmp_path: Path) -> None:
    rows = [f"a,1,A,2021-03-01,2021-03-09,{flag}\n" for flag in ("no", "yes", "no")]
    (tmp_path / "campaigns.csv").write_text(
        "customer_id,campaign_id,campaign_type,start,end,redeemed\n"
        + "".join(rows)
        + "a,2,A,2021-03-01,2021-03-09,no\n"
    )
    log = read(tmp_path, f"{HEADER}\na,x,2021-03-01\na,x,2021-03-02\n", campaigns=tmp_path / "campaigns.csv")
    assert dict(log.campaigns.select("campaign_id", "redeemed").iter_rows()) == {"1": True, "2": False}
    assert len(log.campaigns) == 2
    text = "redeemed by one row of a customer and campaign, not by another"
    assert found(log)["redeemed", text] == (1, "taken as redeemed")


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


def test_a_price_column_full_of_nulls_is_no_price(tmp_path: Path) -> None:
    for empty in (pl.Series([None, None], dtype=pl.Null), pl.Series([None, None], dtype=pl.Float64)):
        frame = pl.DataFrame({"customer_id": ["a", "a"], "item_id": ["x", "y"], "time": ["2021-03-01", "2021-03-02"]})
        frame.with_columns(empty.alias("price")).write_parquet(tmp_path / "e.parquet")
        log = read_log(tmp_path / "e.parquet", now=NOW)
        assert log.events["price"].is_nan().all() and log.items["price"].is_null().all()
        assert found(log)["price", "empty, negative or not a number"] == (2, "unknown price")


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
