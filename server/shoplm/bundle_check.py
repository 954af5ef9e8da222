"""Is a bundle whole? Every check that serving makes at start, and those that would only show in an answer, as a list.

Serving stops at the first thing that is wrong; this goes on, so that one look says everything. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from shoplm.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ShopManifest, file_hash, read_manifest
from shoplm.catalog.items import read_catalog
from shoplm.demo_customers import read_demo_customers
from shoplm.errors import BundleError, ConfigurationError
from shoplm.features import FEATURE_NAMES, FEATURE_VERSION
from shoplm.model.adapter import read_adapter
from shoplm.model.base import Base
from shoplm.model.shop_weights import load_shop_weights
from shoplm.readout.targets import check_spec
from shoplm.retrieval import read_knowledge
from shoplm.served import check_base
from shoplm.vocabulary import ShopVocabulary


@dataclass(frozen=True, slots=True)
class Finding:
    """One check and what it found."""

    what: str
    found: str
    good: bool


def check_bundle(folder: Path, base: Base | None = None) -> tuple[Finding, ...]:
    """All checks of the bundle in `folder`, and with `base` whether it is the one that the bundle was trained on."""
    findings: list[Finding] = []

    def check(what: str, look: Callable[[], str]) -> None:
        try:
            findings.append(Finding(what, look(), True))
        # What reads damaged files may raise what its library raises: it is a finding, not a crash.
        except (ConfigurationError, OSError, ValueError, SafetensorError, pl.exceptions.PolarsError) as error:
            findings.append(Finding(what, str(error), False))

    try:
        manifest = read_manifest(folder, verify=False)
    except BundleError as error:
        return (Finding("shop.toml", str(error), False),)
    findings.append(Finding("shop.toml", f"{manifest.name} {manifest.version}, format {manifest.format}", True))
    for name in sorted(manifest.hashes):
        check(name, lambda name=name: _hash(folder, name, manifest.hashes[name]))  # type: ignore[misc]
    check("items", lambda: _items(folder, manifest))
    check("product types", lambda: _types(folder, manifest))
    check("tensors", lambda: _tensors(folder, manifest))
    check("targets", lambda: _targets(folder, manifest))
    check("demo customers", lambda: _demo(folder, manifest))
    check("knowledge", lambda: f"{len(read_knowledge(folder)):,} passages")
    if manifest.has_adapter:
        check("adapter", lambda: _adapter(folder, manifest))
    if base is not None:
        check("base", lambda: _base(folder, manifest, base))
    return tuple(findings)


def _hash(folder: Path, name: str, expected: str) -> str:
    found = file_hash(folder / name)
    if found != expected:
        raise BundleError(f"SHA-256 is {found[:12]}…, shop.toml says {expected[:12]}…: copy or train it again")
    return f"{(folder / name).stat().st_size:,} bytes, SHA-256 {found[:12]}…"


def _items(folder: Path, manifest: ShopManifest) -> str:
    catalog = read_catalog(folder)
    if manifest.depth == 1 and manifest.level_sizes[0] != len(catalog):
        raise BundleError(f"{len(catalog)} items have a row, level_sizes says {manifest.level_sizes[0]}")
    if len(catalog.rows) < len(catalog):
        raise BundleError(f"{len(catalog) - len(catalog.rows)} item ids are repeated")
    return f"{len(catalog):,} with a row, {len(catalog.rare):,} that stand for their product type"


def _types(folder: Path, manifest: ShopManifest) -> str:
    types = pl.read_parquet(folder / "types.parquet", glob=False)
    indices = pl.read_parquet(folder / "items.parquet", glob=False)["type_index"]
    if len(types) != manifest.type_count:
        raise BundleError(f"types.parquet has {len(types)} rows, type_count is {manifest.type_count}")
    low, high = indices.min(), indices.max()
    if isinstance(low, int) and isinstance(high, int) and not 0 <= low <= high < manifest.type_count:
        raise BundleError(f"items.parquet: type_index runs from {low} to {high}, there are {manifest.type_count} types")
    return f"{len(types):,}"


def _tensors(folder: Path, manifest: ShopManifest) -> str:
    path = folder / "weights.safetensors"
    vocabulary = ShopVocabulary(manifest.base.vocab_size, manifest.level_sizes, manifest.type_count)
    # The loader of the server itself; the base's embedding only lends its width and one row for every token's text.
    texts = None if manifest.depth > 1 else [[0]] * vocabulary.shop_size
    embedding = torch.zeros(1, manifest.base.hidden_size)
    weights = load_shop_weights(path, manifest, vocabulary, embedding, token_texts=texts)
    tensors = load_file(path)
    if weights.heads is not None and weights.heads.features != len(FEATURE_NAMES):
        raise BundleError(
            f"heads read {weights.heads.features} dense features, this code computes {len(FEATURE_NAMES)}"
        )
    return f"{len(tensors)}, {sum(tensor.numel() for tensor in tensors.values()):,} numbers"


def _targets(folder: Path, manifest: ShopManifest) -> str:
    if manifest.feature_version != FEATURE_VERSION:
        raise BundleError(f"feature_version is {manifest.feature_version}, this code computes {FEATURE_VERSION}")
    if not manifest.targets:
        return "none"
    bias = load_file(folder / "weights.safetensors").get("head.bias")
    if bias is None:
        raise BundleError(f"{len(manifest.targets)} targets, but weights.safetensors has no heads")
    for spec in manifest.targets:
        check_spec(spec, len(bias))
    return f"{len(manifest.targets)} of {len(bias)} raw values"


def _demo(folder: Path, manifest: ShopManifest) -> str:
    demo = read_demo_customers(folder, manifest, read_catalog(folder))
    return f"{len(demo)} with {sum(len(customer.events) for customer in demo.values()):,} events"


def _adapter(folder: Path, manifest: ShopManifest) -> str:
    if ADAPTER_CONFIG not in manifest.hashes:
        raise BundleError(f"{ADAPTER_WEIGHTS} comes without {ADAPTER_CONFIG}")
    read_adapter(folder)
    return "a low-rank adapter of the base"


def _base(folder: Path, manifest: ShopManifest, base: Base) -> str:
    check_base(folder, manifest, base)
    return f"{base.name}, {base.fingerprint[:12]}"
