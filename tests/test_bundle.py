"""shop.toml: written, read, and refused when something is wrong."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from shoplm.bundle import (
    FORMAT,
    REQUIRED_FILES,
    BaseReference,
    DemoCustomer,
    HeadSpec,
    PromptSchema,
    ScoreWeights,
    ShopManifest,
    file_hash,
    read_manifest,
    write_manifest,
)
from shoplm.errors import BundleError


@pytest.fixture
def manifest(tmp_path: Path) -> ShopManifest:
    for name in REQUIRED_FILES:
        (tmp_path / name).write_bytes(name.encode())
    made = ShopManifest(
        format=FORMAT,
        name="shop",
        version="1",
        title='A "shop" of 茶',
        currency="EUR",
        notice="n",
        trained_until="2018-01-01T00:00:00Z",
        base=BaseReference("base", "f", 8, 100),
        score=ScoreWeights(1.5, 0.1, 30.0),
        prompt=PromptSchema(preamble="Hello.\nSecond line.", attributes=("age",)),
        depth=1,
        level_sizes=(3,),
        type_count=2,
        feature_version=1,
        hashes={name: file_hash(tmp_path / name) for name in REQUIRED_FILES},
        targets=(HeadSpec("purchase", "hazard", (0, 1), 0.25, 7, parameters={"slope": 1.0, "intercept": -0.125}),),
        customers=(DemoCustomer("c", "2018-01-01T00:00:00Z", {"age": "45-54"}),),
    )
    write_manifest(tmp_path, made)
    return made


def test_what_was_written_is_read(manifest: ShopManifest, tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == manifest


def test_a_bundle_of_format_4_lists_no_values_of_attributes(manifest: ShopManifest, tmp_path: Path) -> None:
    path = tmp_path / "shop.toml"
    listed = '[prompt.attribute_values]\nage = [\n    "45-54",\n]\n'
    text = path.read_text("utf-8")
    assert "[prompt.attribute_values]\n" in text
    path.write_text(text.replace("[prompt.attribute_values]\n", listed), "utf-8")
    assert read_manifest(tmp_path).prompt.attribute_values == {"age": ("45-54",)}
    path.write_text(text.replace("[prompt.attribute_values]\n", "").replace("format = 5", "format = 4"), "utf-8")
    assert read_manifest(tmp_path).prompt == manifest.prompt


def test_a_changed_file_is_refused_unless_not_verified(manifest: ShopManifest, tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"items\.parquet: differs from its SHA-256"):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, verify=False) == manifest


def test_a_missing_file_is_named(manifest: ShopManifest, tmp_path: Path) -> None:
    (tmp_path / "items.parquet").unlink()
    with pytest.raises(BundleError, match=r"items\.parquet: missing"):
        read_manifest(tmp_path, verify=False)


def test_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="shoplm train"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": FORMAT + 1}, "bundle format"),
        ({"level_sizes": (3, 4)}, "depth 1 but 2 level_sizes"),
        ({"hashes": {"../x": "0", **dict.fromkeys(REQUIRED_FILES, "0")}}, "not a file of the bundle"),
        ({"hashes": {}}, r"hashes lacks items\.parquet, types\.parquet, weights\.safetensors"),
    ],
)
def test_contradictions_are_refused(
    manifest: ShopManifest, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    write_manifest(tmp_path, msgspec.structs.replace(manifest, **change))
    with pytest.raises(BundleError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("written", "edited", "field"),
    [
        ("decay_days = 30.0", "decay_days = 0.0", "decay_days"),
        ("decay_days = 30.0", "decay_days = nan", "decay_days"),
        ("repeat_weight = 1.5", "repeat_weight = nan", "repeat_weight"),
        ("adopt_weight = 0.0", "adopt_weight = -inf", "adopt_weight"),
        ("history_budget_tokens = 1024", "history_budget_tokens = -1", "history_budget_tokens"),
        ("history_block_tokens = 256", "history_block_tokens = 0", "history_block_tokens"),
        ("slope = 1.0", "slope = inf", "parameters"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_by_field(
    manifest: ShopManifest, tmp_path: Path, written: str, edited: str, field: str
) -> None:
    text = (tmp_path / "shop.toml").read_text("utf-8")
    assert text.count(written) == 1
    (tmp_path / "shop.toml").write_text(text.replace(written, edited), "utf-8")
    with pytest.raises(BundleError, match=rf"shop\.toml: Expected .*{field}"):
        read_manifest(tmp_path)


def test_a_later_format_is_named_before_fields_that_nobody_here_knows(tmp_path: Path) -> None:
    (tmp_path / "shop.toml").write_text(f"format = {FORMAT + 1}\nfield_of_the_future = 1\n")
    with pytest.raises(BundleError, match=f"bundle format {FORMAT + 1}, this server reads 1, 2, 3, 4, {FORMAT}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["format = ", "format = 1\nsurprise = 2\n", "\xff"])
def test_files_that_are_not_a_manifest_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "shop.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"shop\.toml"):
        read_manifest(tmp_path)
