"""Times of a shop's log: their documented forms, zones, and dates."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from log_files import HEADER, found, read
from shoplm.training.log import read_log
from shoplm.training.log_columns import time_column
from tiny_log import NOW


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
        ("1614592800000000", 1614592800.0),
        ("1614592800000000000", 1614592800.0),
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
    assert found(log)["time", f"empty or not a time, such as '{text}'"] == (1, "dropped")


def test_cells_that_could_not_be_read_are_shown(tmp_path: Path) -> None:
    """The first few, so that a date of the wrong form or a currency's sign is seen for what it is."""
    text = "".join(f"a,x,{day}/1/2021,€{day},{day} pcs\n" for day in range(1, 9))
    log = read(tmp_path, f"{HEADER},price,quantity\na,x,2021-03-01,€1,1\na,x,2021-03-02,€1,{'?' * 99}\na,x,,,\n{text}")
    said = {problem.column: (problem.rows, problem.found) for problem in log.problems}
    assert found(log)["time", "empty or not a time, such as '1/1/2021', '2/1/2021', '3/1/2021'"] == (9, "dropped")
    assert said["price"] == (2, "empty, negative or not a number, such as '€1', '€2', '€3'")
    assert said["quantity"] == (1, f"empty, zero or not a number, such as '{'?' * 40}', '1 pcs', '2 pcs'")


def test_dates_may_be_numbers(tmp_path: Path) -> None:
    frame = pl.DataFrame({"customer_id": [1, 1], "item_id": [2, 2], "time": [20210301, 20210302]})
    frame.write_parquet(tmp_path / "e.parquet")
    assert read_log(tmp_path / "e.parquet", now=NOW).events["time"].to_list() == [1614556800.0, 1614643200.0]


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
    assert found(log)["time", "empty or not a time, such as '2021-03-28 02:30:00'"] == (1, "dropped")


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
