"""Profiles and campaigns of a shop's log."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from log_files import HEADER, found, read


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
