"""`shoplm bundle show` and `verify`: one look says everything that is wrong with a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file
from served_shop import ShopFolders
from shoplm.bundle import ShopManifest, file_hash, read_manifest, write_manifest
from shoplm.bundle_check import check_bundle
from shoplm.bundle_cli import bundle
from shoplm.catalog.items import read_catalog
from shoplm.demo_customers import read_demo_customers
from shoplm.errors import BundleError
from shoplm.model.base import resolve_base
from tiny_shop import ITEMS
from typer.testing import CliRunner


@pytest.fixture
def folder(shop_folders: ShopFolders, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be damaged."""
    return shutil.copytree(shop_folders.bundle, tmp_path / "bundle")


def rehashed(folder: Path, **changes: object) -> None:
    """The manifest says what the files are now."""
    manifest = read_manifest(folder, verify=False)
    hashes = {name: file_hash(folder / name) for name in manifest.hashes}
    write_manifest(folder, msgspec.structs.replace(manifest, hashes=hashes, **changes))


def bad(folder: Path) -> dict[str, str]:
    return {finding.what: finding.found for finding in check_bundle(folder) if not finding.good}


def test_a_whole_bundle_passes_and_is_shown(shop_folders: ShopFolders) -> None:
    base = resolve_base(str(shop_folders.base))
    findings = check_bundle(shop_folders.bundle, base)
    assert all(finding.good for finding in findings), findings
    assert {"shop.toml", "weights.safetensors", "tensors", "targets", "base"} <= {finding.what for finding in findings}
    shown = CliRunner().invoke(bundle, ["show", str(shop_folders.bundle)])
    assert shown.exit_code == 0 and "tiny-shop 1" in shown.output and "coupon redemption Type A" in shown.output
    verified = CliRunner().invoke(bundle, ["verify", str(shop_folders.bundle), "--base", str(shop_folders.base)])
    assert verified.exit_code == 0, verified.output


def test_brackets_are_shown_as_they_are(folder: Path) -> None:
    kept = shutil.copytree(folder, folder.parent / "a[" / "x]")
    rehashed(kept, title="A [bold] shop", notice="see [/x] for the rest")
    shown = CliRunner().invoke(bundle, ["show", str(kept)])
    assert "A [bold] shop" in shown.output and "see [/x] for the rest" in shown.output
    verified = CliRunner().invoke(bundle, ["verify", str(kept)])
    assert "a[/x]" in "".join(verified.output.split())
    (kept / "shop.toml").unlink()
    missing = CliRunner().invoke(bundle, ["show", str(kept)])
    assert missing.exit_code == 2 and "a[/x]" in "".join(missing.output.split())


def test_everything_that_is_wrong_is_said_at_once(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    (folder / "types.parquet").write_bytes(b"not a table")
    found = bad(folder)
    assert set(found) >= {"weights.safetensors", "types.parquet", "product types", "tensors", "targets"}
    assert "SHA-256 is" in found["weights.safetensors"]
    verified = CliRunner().invoke(bundle, ["verify", str(folder)])
    assert verified.exit_code == 1 and verified.output.count("FAIL") == len(found)


def test_no_manifest_is_an_error(folder: Path) -> None:
    (folder / "shop.toml").unlink()
    assert "no bundle there" in bad(folder)["shop.toml"]
    shown = CliRunner().invoke(bundle, ["show", str(folder)])
    assert shown.exit_code == 2


def with_rows(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    tensors["output_rows.0"] = tensors["output_rows.0"][:-1]
    save_file(tensors, folder / "weights.safetensors")


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    tensors["output_bias.0"][3] = np.nan
    save_file(tensors, folder / "weights.safetensors")


def without_heads(folder: Path) -> None:
    tensors = {name: each for name, each in load_file(folder / "weights.safetensors").items() if "head" not in name}
    save_file(tensors, folder / "weights.safetensors")


def with_text_prices(folder: Path) -> None:
    items = pl.read_parquet(folder / "items.parquet")
    items.with_columns(pl.col("price").cast(pl.String)).write_parquet(folder / "items.parquet")


def with_a_type_too_many(folder: Path) -> None:
    items = pl.read_parquet(folder / "items.parquet")
    items.with_columns((pl.col("type_index") + 1).alias("type_index")).write_parquet(folder / "items.parquet")


def with_one_id_twice(folder: Path) -> None:
    items = pl.read_parquet(folder / "items.parquet")
    ids = ["item-00", "item-00", *items["item_id"].to_list()[2:]]
    items.with_columns(pl.Series("item_id", ids)).write_parquet(folder / "items.parquet")


def without_the_demo_customer(folder: Path) -> None:
    pl.read_parquet(folder / "customers.parquet").clear().write_parquet(folder / "customers.parquet")


@pytest.mark.parametrize(
    ("damage", "what", "said"),
    [
        (with_rows, "tensors", f"output_rows.0 has shape [{ITEMS - 1}, 32]"),
        (with_nan, "tensors", "output_bias.0 has values that are not finite"),
        (without_heads, "targets", "weights.safetensors has no heads"),
        (with_text_prices, "items", "column price is String, expected Float64"),
        (with_a_type_too_many, "product types", "type_index runs from 1 to 3, there are 3 types"),
        (with_one_id_twice, "items", "1 item ids are repeated"),
        (without_the_demo_customer, "demo customers", "has no events of the demo customer '1001'"),
    ],
)
def test_right_hashes_of_wrong_files_do_not_help(
    folder: Path, damage: Callable[[Path], None], what: str, said: str
) -> None:
    damage(folder)
    rehashed(folder)
    assert said in bad(folder)[what]


@pytest.mark.parametrize(
    ("change", "what", "said"),
    [
        ({"type_count": 4}, "product types", "types.parquet has 3 rows, type_count is 4"),
        ({"feature_version": 99}, "targets", "feature_version is 99"),
        ({"level_sizes": (ITEMS + 1,)}, "items", f"{ITEMS} items have a row, level_sizes says {ITEMS + 1}"),
    ],
)
def test_a_manifest_that_contradicts_the_files(folder: Path, change: dict[str, object], what: str, said: str) -> None:
    rehashed(folder, **change)
    assert said in bad(folder)[what]


def test_another_base_is_named(folder: Path, shop_folders: ShopFolders) -> None:
    manifest: ShopManifest = read_manifest(folder)
    write_manifest(
        folder,
        msgspec.structs.replace(
            manifest, base=msgspec.structs.replace(manifest.base, name="other", fingerprint="0" * 64)
        ),
    )
    findings = {each.what: each for each in check_bundle(folder, resolve_base(str(shop_folders.base)))}
    assert not findings["base"].good and "trained on other (000000000000)" in findings["base"].found


@pytest.mark.parametrize(
    ("file", "column", "value"),
    [
        ("items.parquet", "title", pl.lit(None, pl.String)),
        ("items.parquet", "category", pl.lit(None, pl.String)),
        ("items.parquet", "item_id", pl.lit(None, pl.String)),
        ("types.parquet", "description", pl.lit(None, pl.String)),
        ("types.parquet", "description", pl.lit(7)),
        ("customers.parquet", "time", pl.lit(None, pl.Datetime("us", "UTC"))),
        ("customers.parquet", "price", pl.lit("dear")),
    ],
)
def test_a_column_that_cannot_be_served_is_named(folder: Path, file: str, column: str, value: pl.Expr) -> None:
    pl.read_parquet(folder / file).with_columns(value.alias(column)).write_parquet(folder / file)
    with pytest.raises(BundleError, match=rf"{file}: .*{column}"):
        read_demo_customers(folder, read_manifest(folder, verify=False), read_catalog(folder))
