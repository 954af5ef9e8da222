"""`--base scratch:small`: a base that is trained on the log alone, lies in the bundle, and is served without chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from shoplm.bundle import read_manifest
from shoplm.catalog.items import read_catalog
from shoplm.errors import BundleError, ConfigurationError
from shoplm.model.base import bundle_base
from shoplm.model.origin import Origin
from shoplm.served import load_served
from shoplm.training import pipeline
from shoplm.training.adapt import trainer
from shoplm.training.adapt.scratch_model import SIZES, ScratchSize
from shoplm.training.cli import evaluate, train
from shoplm.training.log import ShopLog
from shoplm.training.scratch import Scratch, ScratchRun, scratch_size
from shoplm.training.watch import Watch
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("quick_heads")
Shell = Callable[..., str]


@pytest.fixture(scope="module")
def shell(tiny_files: Path) -> Shell:
    app = typer.Typer()
    for command in (train, evaluate):
        app.command()(command)

    def invoke(*arguments: object, code: int = 0) -> str:
        files = ["--events", tiny_files / "events.parquet", "--items", tiny_files / "items.parquet"]
        result = CliRunner().invoke(app, [*map(str, (*arguments, *files))])
        assert result.exit_code == code, result.output
        return result.output

    return invoke


@pytest.fixture(scope="module", autouse=True)
def small() -> object:
    """As small as it gets, and few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "small", ScratchSize(1, 1, 1, 128))
        patch.setattr("shoplm.training.scratch.EPOCHS", 1)
        patch.setattr("shoplm.training.scratch.FEWEST_STEPS", 6)
        patch.setattr(trainer, "CHECKPOINT_STEPS", 2)
        yield


def _train(out: Path) -> list[object]:
    quick = ["--history-tokens", 64, "--history-block", 32, "--epochs", 1, "--minutes", 0, "--explained", 0]
    return ["train", "--base", "scratch:small", "--out", out, *quick]


@pytest.fixture(scope="module")
def bundle(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scratch") / "shop"
    said = shell(*_train(out))
    assert "NDCG@10" in said and "training steps" in said
    return out


def test_the_base_lies_in_the_bundle_and_is_known_by_its_content(bundle: Path, tmp_path: Path) -> None:
    base = bundle_base(bundle, None)
    assert base.folder.parent == bundle and base.origin is Origin.SCRATCH
    manifest = read_manifest(bundle)
    assert manifest.base.fingerprint == base.fingerprint
    served = load_served(base, bundle)
    assert served.model_version.base_model == "scratch"
    assert "trained on this log alone" in (bundle / "card.md").read_text()
    rows = load_file(bundle / "weights.safetensors")["input_rows"]
    assert len(rows) == served.shop.vocabulary.shop_size if served.shop else False
    assert rows.float().std() > 0
    weights = bundle / "base" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(BundleError, match="was trained on scratch"):
        load_served(bundle_base(bundle, None), bundle)
    weights.write_bytes(kept)


def test_what_is_trained_learns(bundle: Path) -> None:
    """The rows of items move apart from where they began: items of one type begin near each other."""
    rows = load_file(bundle / "weights.safetensors")["input_rows"].float()
    specials = len(rows) - len(read_catalog(bundle)) - read_manifest(bundle).type_count
    assert bool(torch.isfinite(rows).all())
    assert rows[specials:].std() > 0.015


def test_evaluate_reproduces_the_card(bundle: Path, shell: Shell, tmp_path: Path) -> None:
    shell(
        "evaluate", "--bundle", bundle, "--explained", 0, "--work", tmp_path / "work", "--json", tmp_path / "again.json"
    )
    assert (tmp_path / "again.json").read_bytes() == (bundle / "metrics.json").read_bytes()


def test_a_stopped_run_ends_where_an_uninterrupted_one_does(
    tiny_shop_log: ShopLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = pipeline.prepare(tiny_shop_log)
    schema = pipeline.prompt_schema(shop, "A shop.", 64, 32, adapted=False)
    catalog = pipeline.write_items(shop.items, tmp_path / "items")

    def run(folder: Path) -> Scratch:
        return ScratchRun(SIZES["small"], shop, catalog, schema, folder, seed=0).train(None, Watch())

    def stop(self: trainer.JointTrainer) -> None:
        if self.step == 4:
            raise RuntimeError("the power failed")
        update(self)

    update = trainer.JointTrainer._update
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr(trainer.JointTrainer, "_update", stop)
        run(tmp_path / "parts")
    whole, parts = run(tmp_path / "whole"), run(tmp_path / "parts")
    assert whole.base.fingerprint == parts.base.fingerprint
    assert torch.equal(whole.input_rows, parts.input_rows)
    begun = (tmp_path / "parts").glob("scratch-*/checkpoint.pt")
    before = [path.stat().st_mtime_ns for path in begun]
    run(tmp_path / "parts")  # is over: nothing is trained again
    assert before == [path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("scratch-*/checkpoint.pt")]


def test_a_dry_run_says_how_long_it_takes(shell: Shell, tmp_path: Path) -> None:
    said = shell(*_train(tmp_path / "out"), "--dry-run")
    assert "seconds per step here" in said and not (tmp_path / "out").exists()


def test_only_known_sizes_begin_from_nothing() -> None:
    assert scratch_size(None) is None and scratch_size("Qwen/Qwen2.5-0.5B") is None
    with pytest.raises(ConfigurationError, match="scratch:small"):
        scratch_size("scratch:enormous")
