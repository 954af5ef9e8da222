"""`shoplm train` end to end on small logs of every shape, through the command line, with a tiny base."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import polars as pl
import pytest
import torch
import typer
from polars.testing import assert_frame_equal
from safetensors.torch import load_file
from shoplm.bundle import read_manifest
from shoplm.catalog.items import read_catalog
from shoplm.features import FEATURE_NAMES
from shoplm.model.base import Base
from shoplm.model.shop_weights import load_shop_weights
from shoplm.readout.targets import check_spec
from shoplm.training.cli import evaluate, train
from shoplm.training.folder_lock import exclusive
from shoplm.training.pipeline import prompt_schema
from shoplm.training.report import Report
from shoplm.vocabulary import ShopVocabulary
from tiny_log import START, events, items
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("quick_heads")
FILES = ("--items", "items.parquet"), ("--customers", "customers.parquet"), ("--campaigns", "campaigns.parquet")
Invoke = Callable[..., str]
EXPLAINED = 4
NOTES = "Was für das Lager nicht half: **Wochentage**."


@pytest.fixture(scope="module")
def shell(tiny_base: Base) -> Invoke:
    """Runs a command with the tiny base and returns what it printed; fails where it fails."""
    app = typer.Typer()
    app.command()(train)
    app.command()(evaluate)

    def invoke(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [*map(str, arguments), "--base", str(tiny_base.folder)])
        assert result.exit_code == code, result.output
        return result.output

    return invoke


def quick(out: Path) -> list[object]:
    return [
        "--out",
        out,
        "--history-tokens",
        64,
        "--history-block",
        32,
        "--epochs",
        2,
        "--minutes",
        0,
        "--explained",
        0,
    ]


@pytest.fixture(scope="module")
def trained(shell: Invoke, tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "my-shop"
    (tiny_files / "knowledge").mkdir()
    (tiny_files / "knowledge" / "returns.md").write_text("# Returns\nWithin 30 days.\n")
    (tiny_files / "knowledge" / "salaries.csv").write_text("name,salary\n")
    paths = [part for flag, name in FILES for part in (flag, tiny_files / name)]
    (tiny_files / "notes.md").write_text(f"{NOTES}\n")
    knowledge = ["--knowledge", tiny_files / "knowledge", "--demo-customers", 4, "--explained", EXPLAINED]
    knowledge += ["--notes", tiny_files / "notes.md"]
    shell("train", "--events", tiny_files / "events.parquet", *paths, *quick(out), *knowledge)
    return out


def opened(folder: Path, base: Base) -> None:
    """The bundle is one that the server can load: hashes, shapes, targets."""
    manifest = read_manifest(folder)
    catalog = read_catalog(folder)
    assert manifest.base.fingerprint == base.fingerprint
    vocabulary = ShopVocabulary(manifest.base.vocab_size, manifest.level_sizes, manifest.type_count)
    assert len(catalog) == manifest.level_sizes[0]
    embedding = torch.zeros(manifest.base.vocab_size, manifest.base.hidden_size)
    weights = load_shop_weights(
        folder / "weights.safetensors", manifest, vocabulary, embedding, token_texts=[[1]] * vocabulary.shop_size
    )
    assert bool(np.isfinite(weights.table.popularity).all())
    outputs = weights.heads.outputs if weights.heads is not None else 0
    assert weights.heads is None or weights.heads.features == len(FEATURE_NAMES)
    for spec in manifest.targets:
        check_spec(spec, outputs)
    for tensor in load_file(folder / "weights.safetensors").values():
        assert bool(torch.isfinite(tensor).all())


def test_the_bundle_has_everything_the_server_reads(trained: Path, tiny_base: Base) -> None:
    opened(trained, tiny_base)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in trained.iterdir())
    manifest = read_manifest(trained)
    assert {spec.kind for spec in manifest.targets} == {
        "purchase",
        "purchase_count",
        "spend",
        "churn",
        "coupon_redemption",
    }
    assert [spec.campaign_type for spec in manifest.targets if spec.campaign_type] == ["A", "B"]
    assert manifest.prompt.attributes == ("age",)
    assert manifest.prompt.attribute_values == {"age": ("25-34", "45-54")}
    assert [path.name for path in (trained / "knowledge").iterdir()] == ["returns.md"]
    demo = pl.read_parquet(trained / "customers.parquet")
    assert sorted(demo["customer_id"].unique().to_list()) == sorted(c.customer_id for c in manifest.customers)
    assert len(manifest.customers) == 4


def test_the_demo_customers_events_are_the_true_ones(trained: Path, tiny_files: Path) -> None:
    demo = pl.read_parquet(trained / "customers.parquet")
    true = pl.read_parquet(tiny_files / "events.parquet").filter(
        pl.col("customer_id").is_in(demo["customer_id"].unique().to_list())
    )
    columns = ["customer_id", "item_id", "basket_id", "time"]
    assert_frame_equal(demo.select(columns).sort(columns), true.select(columns).sort(columns))


def test_the_card_says_what_was_measured(trained: Path) -> None:
    card = (trained / "card.md").read_text()
    report = msgspec.json.decode((trained / "metrics.json").read_bytes(), type=Report)
    for result in report.rankings:
        for row in result.rows:
            assert f"| {row.name} | {row.recall:.4f} | {row.ndcg:.4f} |" in card
    assert "popularity" in card and "tuned count" in card and "Privacy" in card
    assert f"## Notes\n\n{NOTES}\n\n## Reproduce" in card
    assert all(f"| {row.target} | {row.customers:,} |" in card for row in (*report.probabilities, *report.amounts))


def test_the_card_says_how_true_explanations_are(trained: Path) -> None:
    report = msgspec.json.decode((trained / "metrics.json").read_bytes(), type=Report)
    result = report.explanations
    assert result is not None and result.customers == EXPLAINED
    assert result.score is not None and -1 <= result.score <= 1
    assert set(result.predictions) == {"purchase 30 d", "churn 30 d", "purchase count 30 d", "spend 30 d"}
    assert result.cited_in_history == 1.0
    assert result.deletion.cited > 0
    card = (trained / "card.md").read_text()
    assert card.count("## Explanations") == 1
    assert f"| effects on the score of a recommendation | {result.score:.2f} |" in card
    assert card.index("## Explanations") < card.index("## Privacy")


def test_evaluate_reproduces_the_card(trained: Path, shell: Invoke, tiny_files: Path, tmp_path: Path) -> None:
    """From the bundle's files and freshly computed hidden states alone."""
    paths = [part for flag, name in FILES for part in (flag, tiny_files / name)]
    out, work = tmp_path / "again.json", tmp_path / "work"
    shell(
        "evaluate",
        "--explained",
        EXPLAINED,
        "--write",
        "--bundle",
        trained,
        "--events",
        tiny_files / "events.parquet",
        *paths,
        "--work",
        work,
        "--json",
        out,
    )
    assert list(work.glob("hidden-*/*.safetensors"))
    assert out.read_bytes() == (trained / "metrics.json").read_bytes()
    card = (trained / "card.md").read_text()
    assert card.count("## Explanations") == 1 and NOTES in card
    read_manifest(trained)  # what was written has its hash


def test_evaluate_weighs_what_formats_cost(trained: Path, shell: Invoke, tiny_files: Path) -> None:
    """As it is and rounded, on hidden states of their own; a format that the base does not suit is refused. The tiny
    base's random weights talk less well in FP8 than may be."""
    paths = [part for flag, name in FILES for part in (flag, tiny_files / name)]
    arguments = ["evaluate", "--bundle", trained, "--events", tiny_files / "events.parquet", *paths]
    said = shell(*arguments, "--kv-format", "int8")
    assert "they cost: keys and values int8" in " ".join(said.split())
    assert "NDCG@10" in said and "perplexity of talk" in said and "BROKEN" not in said
    broken = shell(*arguments, "--weight-format", "fp8", code=1)
    assert [line.split()[1] for line in broken.splitlines() if "BROKEN" in line] == ["perplexity"]
    assert "48 inputs, expected a multiple of 64" in " ".join(
        shell(*arguments, "--weight-format", "int8", code=2).split()
    )
    assert "'int2' is not one of" in " ".join(shell(*arguments, "--kv-format", "int2", code=2).split())


def test_the_model_is_not_below_counting_on_a_shop_that_repeats(trained: Path) -> None:
    report = msgspec.json.decode((trained / "metrics.json").read_bytes(), type=Report)
    for result in report.rankings:
        ndcg = {row.name: row.ndcg for row in result.rows}
        assert ndcg["ShopLM"] > ndcg["tuned count + decay + popularity"] - 0.03
        assert ndcg["ShopLM"] > ndcg["popularity"] + 0.1


def test_the_same_seed_gives_the_same_bundle_and_a_stopped_run_goes_on(
    trained: Path, shell: Invoke, tiny_files: Path, tmp_path: Path
) -> None:
    paths = [part for flag, name in FILES for part in (flag, tiny_files / name)]
    out = tmp_path / "my-shop"
    arguments = ["train", "--events", tiny_files / "events.parquet", *paths, *quick(out), "--demo-customers", 4]
    shell(*arguments, "--max-customers", 32)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / ".my-shop.train").glob("hidden-*/*.safetensors")}
    assert len(shards) == 1
    # As where a run was stopped between moving the older bundle away and putting the new one there.
    (out / "knowledge").mkdir()
    (out / "knowledge" / "returns.md").write_text("# Returns\nWithin 30 days.\n")
    out.rename(tmp_path / ".my-shop.old")
    shell(*arguments)
    assert (out / "knowledge" / "returns.md").is_file() and not (tmp_path / ".my-shop.old").exists()
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    one, two = (load_file(folder / "weights.safetensors") for folder in (trained, out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_manifest(out).version == read_manifest(trained).version


def test_a_log_that_is_another_is_refused_by_evaluate(trained: Path, shell: Invoke, tmp_path: Path) -> None:
    events(days=150).write_parquet(tmp_path / "events.parquet")
    said = shell("evaluate", "--bundle", trained, "--events", tmp_path / "events.parquet", code=2)
    assert "was trained until" in " ".join(said.split())


def test_a_dry_run_writes_nothing(shell: Invoke, tiny_files: Path, tmp_path: Path) -> None:
    said = shell("train", "--events", tiny_files / "events.parquet", *quick(tmp_path / "out"), "--dry-run")
    assert "tokens per second here" in said
    assert not (tmp_path / "out").exists()


def ids_only() -> pl.DataFrame:
    return events(customers=12, days=60).select("customer_id", "item_id", "time")


def views_and_carts() -> pl.DataFrame:
    kinds = pl.Series("type", ["view", "cart", "view"])
    made = events(customers=12, days=60).drop("basket_id", "price")
    return made.with_columns(kinds.gather(pl.Series(np.arange(len(made)) % 3)).alias("type"))


def one_customer() -> pl.DataFrame:
    return events(customers=1, days=120)


def three_events() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "customer_id": ["a", "a", "b"],
            "item_id": ["x", "y", "x"],
            "time": [START, START.replace(day=3), START.replace(day=9)],
        }
    )


def two_items() -> pl.DataFrame:
    return events(customers=15, days=80, items=2)


def messy() -> pl.DataFrame:
    made = events(customers=12, days=60)
    twice = pl.concat([made, made]).sample(fraction=1.0, shuffle=True, seed=3)
    return twice.with_columns(pl.lit(None, pl.Float64).alias("price"))


@pytest.mark.parametrize("make", [ids_only, views_and_carts, one_customer, three_events, two_items, messy])
def test_any_log_becomes_a_bundle(
    make: Callable[[], pl.DataFrame], shell: Invoke, tiny_base: Base, tmp_path: Path
) -> None:
    make().write_csv(tmp_path / "events.csv", datetime_format="%Y-%m-%dT%H:%M:%SZ")
    shell("train", "--events", tmp_path / "events.csv", *quick(tmp_path / "shop"), "--epochs", 1)
    opened(tmp_path / "shop", tiny_base)


def test_the_card_of_a_short_log_names_moments_and_no_heads(shell: Invoke, tmp_path: Path) -> None:
    """Its cuts are not at midnight; and a cell that was not read may hold what parts the columns of a table."""
    odd = pl.DataFrame({"customer_id": ["b"], "item_id": ["y"], "time": ["a|b"]})
    pl.concat([three_events().cast({"time": pl.String}), odd]).write_csv(tmp_path / "events.csv")
    shell("train", "--events", tmp_path / "events.csv", *quick(tmp_path / "shop"), "--epochs", 1)
    card = (tmp_path / "shop" / "card.md").read_text()
    test_at = read_manifest(tmp_path / "shop").trained_until
    assert f"Tests: labels from {test_at} on." in card and not test_at.endswith("T00:00:00Z")
    assert "Heads:" not in card
    (row,) = [line for line in card.splitlines() if "not a time" in line]
    assert row.count("|") == 6


def test_chinese_titles_and_brackets(shell: Invoke, tiny_base: Base, tmp_path: Path) -> None:
    events(customers=10, days=50).write_parquet(tmp_path / "events.parquet")
    named = items().with_columns(
        pl.format("绿茶 {} 克", pl.int_range(pl.len())).alias("title"), pl.lit("饮料").alias("category")
    )
    named.write_csv(tmp_path / "items.csv")
    arguments = ["--events", tmp_path / "events.parquet", "--items", tmp_path / "items.csv"]
    out = tmp_path / "a[" / "x]"
    said = shell("train", *arguments, *quick(out), "--title", "茶店 [/x]", "--epochs", 1)
    assert "a[/x]" in "".join(said.split())
    opened(out, tiny_base)
    assert "绿茶" in read_catalog(out).titles[0]
    assert read_manifest(out).title == "茶店 [/x]"


def test_the_sample_of_the_docs_trains_without_a_problem(shell: Invoke, tiny_base: Base, tmp_path: Path) -> None:
    sample = Path(__file__).parents[2] / "docs" / "sample"
    arguments = ["--events", sample / "events.csv", "--items", sample / "items.csv"]
    said = shell("train", *arguments, *quick(tmp_path / "my-shop"), "--currency", "EUR")
    assert "the log's problems" not in said
    opened(tmp_path / "my-shop", tiny_base)
    manifest = read_manifest(tmp_path / "my-shop")
    assert {spec.kind for spec in manifest.targets} == {"purchase", "churn", "purchase_count", "spend"}
    assert len(manifest.customers) == 10


def test_fatal_problems_come_as_a_table_before_any_work(shell: Invoke, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("customer,[/x]\na,x\n")
    said = shell("train", "--events", tmp_path / "events.csv", *quick(tmp_path / "shop"), code=2)
    assert "customer_id" in said and "the column is missing" in " ".join(said.split()) and "[/x]" in said
    assert not (tmp_path / "shop").exists()


def test_texts_are_read_before_any_work(shell: Invoke, tiny_files: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "hours.md").write_bytes("# Öffnung\n".encode("latin-1"))
    common = ["train", "--events", tiny_files / "events.parquet", "--dry-run", *quick(tmp_path / "out"), "--knowledge"]
    assert "hours.md" in shell(*common, tmp_path / "texts", code=2).replace("\n", "")
    shell(*common, tmp_path / "texts" / "hours.md", code=2)
    (tmp_path / "texts" / "hours.md").unlink()
    assert "0 passages for chat" in shell(*common, tmp_path / "texts")


def test_a_folder_with_other_things_is_no_place_for_a_bundle(shell: Invoke, tiny_files: Path, tmp_path: Path) -> None:
    (tmp_path / "events.parquet").write_bytes((tiny_files / "events.parquet").read_bytes())
    said = shell("train", "--events", tmp_path / "events.parquet", "--out", tmp_path, code=2)
    assert "is no bundle" in " ".join(said.split())
    assert [path.name for path in tmp_path.iterdir()] == ["events.parquet"]
    (tmp_path / "a[" / "x]" / "file").mkdir(parents=True)
    said = shell("train", "--events", tmp_path / "events.parquet", "--out", tmp_path / "a[" / "x]", code=2)
    assert "a[/x]isthereandisnobundle" in "".join(said.split())


def test_starting_anew_forgets_what_runs_kept_and_nothing_else(shell: Invoke, tiny_files: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "hidden-0123456789abcdef").mkdir(parents=True)
    (work / "held-out.json").write_text("{}")
    (work / "mine.txt").write_text("other things")
    arguments = ["--events", tiny_files / "events.parquet", "--out", tmp_path / "shop", "--work", work]
    shell("train", *arguments, "--history-tokens", 64, "--history-block", 32, "--no-resume", "--dry-run")
    assert not (work / "hidden-0123456789abcdef").exists() and not (work / "held-out.json").exists()
    assert (work / "mine.txt").read_text() == "other things"


def test_notes_that_are_no_text_are_refused(shell: Invoke, tiny_files: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_bytes("Grüße".encode("latin-1"))
    arguments = ["--events", tiny_files / "events.parquet", "--out", tmp_path / "x", "--notes", tmp_path / "notes.md"]
    said = shell("train", *arguments, code=2)
    assert "--notes" in said and "utf-8" in said and not (tmp_path / "x").exists()


def test_a_bad_name_and_impossible_budgets_are_refused(shell: Invoke, tiny_files: Path, tmp_path: Path) -> None:
    events_path = tiny_files / "events.parquet"
    said = shell("train", "--events", events_path, "--out", tmp_path / "x", "--name", "No Good", code=2)
    assert "--name" in said
    budgets = ["--history-tokens", 64, "--history-block", 128]
    assert "--history-block" in shell("train", "--events", events_path, "--out", tmp_path / "x", *budgets, code=2)


def test_the_help_of_all_commands_waits_for_no_torch() -> None:
    program = "import sys; from shoplm.cli import _application; _application([]); print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


def test_two_runs_do_not_share_a_folder(shell: Invoke, tmp_path: Path) -> None:
    sample, work = Path(__file__).parents[2] / "docs" / "sample", tmp_path / ".shop.train"
    with exclusive(work):
        (work / "hidden-0").mkdir()
        said = shell("train", "--events", sample / "events.csv", "--out", tmp_path / "shop", "--no-resume", code=2)
    assert "another run is at work" in said
    assert (work / "hidden-0").is_dir(), "what the other run keeps is left alone"


def test_a_bundle_lists_the_values_that_training_saw_where_they_are_few() -> None:
    ids = [f"c{number}" for number in range(51)]
    profiles = {name: (("age", "40" if n % 2 else "30"), ("town", str(n))) for n, name in enumerate(ids)}
    profiles["without events"] = (("age", "50"), ("hat", "yes"))
    log = SimpleNamespace(customer_ids=ids, attributes=profiles)
    schema = prompt_schema(SimpleNamespace(log=log), "Hi.", 64, 16, adapted=False)  # type: ignore[arg-type]
    assert schema.attributes == ("age", "hat", "town")
    assert schema.attribute_values == {"age": ("30", "40")}
    log.customer_ids = ids[:50]
    schema = prompt_schema(SimpleNamespace(log=log), "Hi.", 64, 16, adapted=False)  # type: ignore[arg-type]
    assert len(schema.attribute_values["town"]) == 50
