"""`shoplm score`: the same answers as a server's, for many customers, also when it is stopped half-way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
import typer
from google.protobuf.timestamp_pb2 import Timestamp
from polars.testing import assert_frame_equal
from served_shop import ShopFolders
from server_thread import ServerThread
from shoplm.config import ServerConfig
from shoplm.engine.client import EngineClient, ThreadEngineClient
from shoplm.errors import ConfigurationError, EngineUnavailableError
from shoplm.model.base import Base, resolve_base
from shoplm.request import FinishedOutput, Request
from shoplm.training.problems import LogError, Problem
from shoplm.training.score import parts
from shoplm.training.score.cli import score as score_command
from shoplm.training.score.run import ScoreRequest, score
from shoplm.v1 import prediction_pb2, recommendation_pb2, shop_pb2
from tiny_shop import DEMO_AS_OF, ITEMS, item_id
from typer.testing import CliRunner

SMALL = ("--dtype", "float32", "--kv-cache-mib", "16", "--threads", "1")
LATER = DEMO_AS_OF - timedelta(days=3)
Score = Callable[..., pl.DataFrame]


def events() -> pl.DataFrame:
    """Eight customers of different lengths; some buy something that the bundle does not know."""
    rows = [
        {
            "customer_id": f"c{customer}",
            "item_id": "unknown" if index % 17 == 16 else item_id((index * 7 + customer) % ITEMS),
            "time": DEMO_AS_OF - timedelta(days=200 - 4 * index - customer, seconds=customer),
            "type": "view" if index % 5 == 4 else "purchase",
            "price": 2.5,
        }
        for customer in range(8)
        for index in range(5 + 5 * customer)
    ]
    return pl.DataFrame(rows)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    events().write_parquet(tmp_path / "events.parquet")
    asked = [(f"c{customer}", DEMO_AS_OF if customer % 2 else LATER, "35-44") for customer in reversed(range(8))]
    # The same customer at another moment, and one of whom nothing is known.
    asked += [("c3", LATER, ""), ("nobody", DEMO_AS_OF, None)]
    pl.DataFrame(asked, schema=["customer_id", "as_of", "age"], orient="row").write_parquet(tmp_path / "C.parquet")
    return tmp_path


class Flaky(ThreadEngineClient):
    """An engine that is lost after so many answers."""

    left: int | None = None

    async def run(self, request: Request) -> FinishedOutput:
        if Flaky.left is not None:
            if Flaky.left == 0:
                raise EngineUnavailableError("the engine was lost")
            Flaky.left -= 1
        return await super().run(request)


@pytest.fixture
def run_score(files: Path, shop_folders: ShopFolders) -> Score:
    """Scores the files with an engine in a thread."""

    def make(config: ServerConfig, base: Base) -> EngineClient:
        return Flaky(config.engine_spec(base.folder))

    def run(
        *,
        problems: list[Problem] | None = None,
        ticks: list[tuple[int, int]] | None = None,
        said: list[str] | None = None,
        **changes: object,
    ) -> pl.DataFrame:
        fields: dict[str, object] = {
            "customers": files / "C.parquet",
            "events": files / "events.parquet",
            "out": files / "S.parquet",
            "count": 5,
            "as_of": None,
            "timezone": "UTC",
            "resume": True,
            **changes,
        }
        request = ScoreRequest(**fields)  # type: ignore[arg-type]
        base = resolve_base(str(shop_folders.base))
        progress = (lambda done, total: None) if ticks is None else (lambda done, total: ticks.append((done, total)))
        report = (lambda found: None) if problems is None else problems.extend
        say = (lambda text: None) if said is None else said.append
        rows = asyncio.run(score(request, shop_folders.config(*SMALL), base, make, progress, report, say))
        answers = pl.read_parquet(request.out)
        assert rows == len(answers)
        return answers

    return run


def customer_message(customer: str, as_of: datetime, age: str) -> shop_pb2.Customer:
    kinds = {"purchase": shop_pb2.EVENT_TYPE_PURCHASE, "view": shop_pb2.EVENT_TYPE_VIEW}
    message = shop_pb2.Customer(customer_id=customer, attributes={"age": age} if age else {})
    message.as_of.CopyFrom(Timestamp(seconds=int(as_of.timestamp())))
    for row in events().filter(pl.col("customer_id") == customer).iter_rows(named=True):
        event = message.events.add(item_id=row["item_id"], type=kinds[row["type"]], price=row["price"])
        event.time.FromDatetime(row["time"])
    return message


def test_answers_are_the_servers(run_score: Score, files: Path, real_shop: ServerThread) -> None:
    problems: list[Problem] = []
    answers = run_score(problems=problems)
    asked = pl.read_parquet(files / "C.parquet")
    assert answers["customer_id"].to_list() == asked["customer_id"].to_list()
    assert answers["as_of"].to_list() == asked["as_of"].to_list()
    assert [(p.table, p.column, p.found) for p in problems][-1] == ("events", "item_id", "not an item of the bundle")
    for row, question in zip(answers.iter_rows(named=True), asked.iter_rows(named=True), strict=True):
        customer = customer_message(question["customer_id"], question["as_of"], question["age"] or "")
        served = real_shop.recommendation.Recommend(recommendation_pb2.RecommendRequest(customer=customer, count=5))
        assert row["items"] == [item.item_id for item in served.items]
        assert row["scores"] == pytest.approx([item.score for item in served.items], abs=2e-4)
        predicted = real_shop.prediction.Predict(prediction_pb2.PredictRequest(customer=customer)).predictions
        soon, month, churn, count, coupon = predicted
        assert row["purchase_7d"] == pytest.approx(soon.probability, abs=1e-4)
        assert row["purchase_30d"] == pytest.approx(month.probability, abs=1e-4)
        assert row["churn_30d"] == (pytest.approx(churn.probability, abs=1e-4) if churn.applicable else None)
        assert row["purchase_count_30d"] == pytest.approx(count.amount, rel=1e-3)
        low_high = row["purchase_count_30d_low"], row["purchase_count_30d_high"]
        if count.HasField("interval_low"):
            assert low_high == pytest.approx((count.interval_low, count.interval_high), rel=1e-3)
        else:
            assert low_high == (None, None)
        assert row["coupon_redemption_Type A"] == pytest.approx(coupon.probability, abs=1e-4)
    nobody = answers.filter(pl.col("customer_id") == "nobody").row(0, named=True)
    assert (nobody["purchase_30d"], nobody["purchase_count_30d"], nobody["purchase_count_30d_low"]) == (0.9, 2.5, None)
    assert nobody["churn_30d"] is None
    assert answers["churn_30d"].null_count() < len(answers)


def test_as_of_is_each_rows_own(run_score: Score) -> None:
    answers = run_score()
    twice = answers.filter(pl.col("customer_id") == "c3")
    assert twice["as_of"].to_list() == [DEMO_AS_OF, LATER]
    assert twice["purchase_7d"].n_unique() == 2


def test_a_stopped_run_goes_on_where_it_was(run_score: Score, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_score(out=files / "whole.parquet")
    monkeypatch.setattr("shoplm.training.score.run.PART_QUESTIONS", 3)
    monkeypatch.setattr(Flaky, "left", 14)  # two parts of three questions, and one question of the third
    with pytest.raises(EngineUnavailableError, match="the engine was lost"):
        run_score()
    assert not (files / "S.parquet").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (files / ".S.parquet.parts").glob("*.parquet")}
    assert len(kept) == 2
    monkeypatch.setattr(Flaky, "left", 7)  # enough for the four questions that are left, not for one more
    ticks: list[tuple[int, int]] = []
    answers = run_score(ticks=ticks)
    assert ticks[:2] == [(3, 10), (6, 10)] and ticks[-1] == (10, 10)
    assert_frame_equal(answers, whole, abs_tol=1e-4)
    assert not (files / ".S.parquet.parts").exists()


def test_parts_of_other_questions_are_not_used(run_score: Score, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoplm.training.score.run.PART_QUESTIONS", 3)
    monkeypatch.setattr(Flaky, "left", 14)
    with pytest.raises(EngineUnavailableError):
        run_score()
    monkeypatch.setattr(Flaky, "left", None)
    assert run_score(count=3)["items"].list.len().to_list() == [3] * 10


def test_a_run_without_as_of_goes_on_with_its_own_now(tmp_path: Path) -> None:
    kept = parts.Parts(tmp_path / "S.parquet")
    assert kept.open("same", None, 123.5) == (123.5, False)
    kept.write(0, pl.DataFrame({"number": [0]}))
    again = parts.Parts(tmp_path / "S.parquet")
    assert again.open("same", None, 200.0) == (123.5, True)
    assert again.has(0)
    assert again.open("other", None, 200.0) == (200.0, False)
    assert not again.has(0)


@pytest.mark.parametrize(("first", "second"), [(None, 123.5), (123.5, None), (123.5, 124.0)])
def test_a_moment_that_was_asked_for_is_no_now(tmp_path: Path, first: float | None, second: float | None) -> None:
    kept = parts.Parts(tmp_path / "S.parquet")
    kept.open("same", first, 123.5)
    kept.write(0, pl.DataFrame({"number": [0]}))
    assert kept.open("same", second, 200.0) == (second or 200.0, False)
    assert not kept.has(0)


@pytest.mark.parametrize("changed", ["nothing", "events", "customers", "count", "timezone"])
def test_now_is_that_of_a_stopped_run_of_the_same_questions_alone(
    changed: str, run_score: Score, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "D.csv").write_text("customer_id\nc1\nc2\nc3\n")
    (files / "E.csv").write_text("customer_id\nc1\nc2\nc4\n")
    events().head(-1).write_parquet(files / "fewer.parquet")
    monkeypatch.setattr("shoplm.training.score.run.PART_QUESTIONS", 1)
    monkeypatch.setattr(Flaky, "left", 3)
    monkeypatch.setattr("time.time", lambda: LATER.timestamp())
    with pytest.raises(EngineUnavailableError):
        run_score(customers=files / "D.csv")
    monkeypatch.setattr(Flaky, "left", None)
    monkeypatch.setattr("time.time", lambda: DEMO_AS_OF.timestamp())
    other: dict[str, dict[str, object]] = {
        "nothing": {},
        "events": {"events": files / "fewer.parquet"},
        "customers": {"customers": files / "E.csv"},
        "count": {"count": 4},
        "timezone": {"timezone": "Europe/Berlin"},
    }
    said: list[str] = []
    answers = run_score(said=said, **{"customers": files / "D.csv", **other[changed]})
    if changed == "nothing":
        assert answers["as_of"].unique().to_list() == [LATER]
        assert LATER.isoformat().replace("+00:00", "Z") in said[0] and "--no-resume" in said[0]
    else:
        assert answers["as_of"].unique().to_list() == [DEMO_AS_OF] and not said


def test_events_alone_ask_once_per_customer(run_score: Score, files: Path) -> None:
    answers = run_score(customers=files / "events.parquet", events=None, as_of=LATER.timestamp())
    assert answers["customer_id"].to_list() == [f"c{customer}" for customer in range(8)]
    assert answers["as_of"].unique().to_list() == [LATER]
    both = run_score().filter(pl.col("as_of") == LATER)
    with_age = both.filter(pl.col("customer_id") == "c6")
    # Without a profile the prompt is another one; what was bought is the same.
    assert set(with_age["items"][0]) & set(answers.filter(pl.col("customer_id") == "c6")["items"][0])


def test_files_that_cannot_be_used_are_refused_before_an_engine_starts(run_score: Score, files: Path) -> None:
    with pytest.raises(LogError, match="and no --events were given"):
        run_score(events=None)
    pl.DataFrame({"who": ["a"]}).write_csv(files / "bad.csv")
    with pytest.raises(LogError, match=r"customers\.customer_id"):
        run_score(customers=files / "bad.csv")
    with pytest.raises(ConfigurationError, match="--count is 100000"):
        run_score(count=100_000)


def test_events_of_another_shop_are_refused(run_score: Score, files: Path) -> None:
    path = files / "events.parquet"
    pl.read_parquet(path).with_columns(pl.lit("unknown").alias("item_id")).write_parquet(path)
    with pytest.raises(LogError, match=r"events\.item_id: none is an item of the bundle"):
        run_score()


def test_rows_without_a_customer_or_a_moment_are_dropped_and_said(run_score: Score, files: Path) -> None:
    (files / "C.csv").write_text("customer_id,as_of\nc1,2017-12-01\n,2017-12-01\nc2,soon\nc3,\n")
    problems: list[Problem] = []
    answers = run_score(customers=files / "C.csv", as_of=LATER.timestamp(), problems=problems)
    assert answers["customer_id"].to_list() == ["c1", "c3"]
    assert answers["as_of"].to_list() == [datetime(2017, 12, 1, tzinfo=UTC), LATER]
    said = {(p.table, p.column): (p.rows, p.done) for p in problems}
    assert said["customers", "customer_id"] == said["customers", "as_of"] == (1, "dropped")


def test_the_command_scores_the_bundles_own_demo_customers(
    shop_folders: ShopFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, as users run it."""
    for name, value in (("DTYPE", "float32"), ("KV_CACHE_MIB", "16")):
        monkeypatch.setenv(f"SHOPLM_{name}", value)
    app = typer.Typer()
    app.command()(score_command)
    out = tmp_path / "S.parquet"
    paths = ["--bundle", shop_folders.bundle, "--base", shop_folders.base, "--out", out, "--threads", 1]
    asked = ["--customers", shop_folders.bundle / "customers.parquet", "--as-of", "2018-01-01"]
    result = CliRunner().invoke(app, [str(part) for part in (*paths, *asked)])
    assert result.exit_code == 0, result.output
    answers = pl.read_parquet(out)
    assert answers["customer_id"].to_list() == ["1001"]
    assert answers["items"].list.len().to_list() == [10]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "S.csv"], "name a .parquet file"),
        (["--out", "S.parquet", "--as-of", "yesterday"], "--as-of 'yesterday'"),
        (["--out", "S.parquet", "--as-of", "2018-01-01", "--timezone", "Nowhere/Else"], "Nowhere/Else"),
    ],
)
def test_a_wrong_command_line_is_explained(flags: list[str], said: str, shop_folders: ShopFolders, files: Path) -> None:
    app = typer.Typer()
    app.command()(score_command)
    always = ["--bundle", shop_folders.bundle, "--base", shop_folders.base, "--customers", files / "C.parquet"]
    result = CliRunner().invoke(app, [str(part) for part in (*always, *flags)])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
