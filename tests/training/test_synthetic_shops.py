"""What training promises on any shop, on two made-up extremes: nothing but habits, and none at all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest
import typer
from shoplm.bundle import read_manifest
from shoplm.model.base import Base
from shoplm.training.cli import train
from shoplm.training.report import COUNT, OURS, POPULARITY, Report
from tiny_log import START
from typer.testing import CliRunner

CUSTOMERS, ITEMS, VISITS = 150, 100, 20


def visits(choose: Callable[[np.random.Generator, np.ndarray], np.ndarray]) -> pl.DataFrame:
    """`choose(random, own)` gives the items of a visit; `own` are ten items of the customer's own."""
    random = np.random.default_rng(11)
    rows = []
    for customer in range(CUSTOMERS):
        own = random.permutation(ITEMS)[:10]
        day = random.uniform(0.0, 9.0)
        for _ in range(VISITS):
            rows += [
                {"customer_id": f"c{customer}", "item_id": f"i{item}", "time": START + timedelta(days=day)}
                for item in np.unique(choose(random, own)).tolist()
            ]
            day += random.uniform(4.0, 12.0)
    return pl.DataFrame(rows)


def habits() -> pl.DataFrame:
    """Everybody buys from their own ten items, the first ones most often, whatever others buy."""
    return visits(lambda random, own: own[np.minimum(random.geometric(0.3, 3) - 1, 9)])


def no_habits() -> pl.DataFrame:
    """Everybody buys at random, some items more often than others."""
    return visits(lambda random, own: np.minimum(random.geometric(0.06, 3) - 1, ITEMS - 1))


@pytest.fixture
def trained(tiny_base: Base, tmp_path: Path) -> Callable[[pl.DataFrame], Report]:
    """The report of `shoplm train` with its defaults, but for a short history and no limit of time."""
    app = typer.Typer()
    app.command()(train)

    def run(log: pl.DataFrame) -> Report:
        log.write_parquet(tmp_path / "events.parquet")
        flags = ["--events", tmp_path / "events.parquet", "--out", tmp_path / "shop", "--minutes", 0]
        short = ["--history-tokens", 64, "--history-block", 32, "--base", tiny_base.folder]
        result = CliRunner().invoke(app, [str(part) for part in (*flags, *short)])
        assert result.exit_code == 0, result.output
        return msgspec.json.decode((tmp_path / "shop" / "metrics.json").read_bytes(), type=Report)

    return run


@pytest.mark.parametrize("kind", ["purchase", "cart"])
def test_on_a_shop_of_habits_the_model_is_not_below_counting(
    trained: Callable[[pl.DataFrame], Report], tmp_path: Path, kind: str
) -> None:
    """Where nobody buys, what customers put into carts is counted and recommended instead."""
    report = trained(habits().with_columns(pl.lit(kind).alias("type")))
    manifest = read_manifest(tmp_path / "shop")
    assert manifest.recommends == kind
    assert manifest.score.repeat_weight > 0 or manifest.score.rebuy_weight > 0
    assert len(report.rankings) == 2
    for result in report.rankings:
        ndcg = {row.name: row.ndcg for row in result.rows}
        assert ndcg[COUNT] > 2.0 * ndcg[POPULARITY]
        assert result.ndcg_over_count.verdict != "below", result.ndcg_over_count
        assert ndcg[OURS] > ndcg[COUNT] - 0.01


def test_on_a_shop_without_habits_the_model_is_not_below_popularity(
    trained: Callable[[pl.DataFrame], Report],
) -> None:
    report = trained(no_habits())
    for result in report.rankings:
        ndcg = {row.name: row.ndcg for row in result.rows}
        assert ndcg[OURS] > ndcg[POPULARITY] - 0.02, ndcg
