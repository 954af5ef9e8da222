"""Writes a bundle: everything in a folder beside the target first, which then takes its place."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file
from shoplm.bundle import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FOLDER,
    FORMAT,
    BaseReference,
    DemoCustomer,
    PromptSchema,
    Recommends,
    ShopManifest,
    file_hash,
    write_manifest,
)
from shoplm.features import FEATURE_VERSION
from shoplm.history import EventKind, utc_moment
from shoplm.model.base import Base
from shoplm.model.origin import Origin
from shoplm.retrieval import TEXTS_FOLDER, text_files
from shoplm.training.adopting import adopt_tensors
from shoplm.training.html_report import render_report
from shoplm.training.model import Model
from shoplm.training.pipeline import write_items
from shoplm.training.rebuying import rebuy_tensors
from shoplm.training.report import Report
from shoplm.training.shop import Shop
from shoplm.training.watch import Watch

HASHED = (
    "items.parquet",
    "types.parquet",
    "weights.safetensors",
    "customers.parquet",
    "metrics.json",
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
)


@dataclass(frozen=True, slots=True)
class Identity:
    """How the shop presents itself."""

    name: str
    title: str
    currency: str
    notice: str


def write_bundle(
    folder: Path,
    shop: Shop,
    base: Base,
    schema: PromptSchema,
    model: Model,
    report: Report,
    identity: Identity,
    *,
    card: str,
    watch: Watch,
    adapter: Path | None,
    input_rows: torch.Tensor | None,
    knowledge: Path | None,
    demo_customers: Sequence[int],
) -> ShopManifest:
    """Write all files of a bundle to `folder`. An older bundle there is replaced; its knowledge/ stays unless
    `knowledge` names another. So does that of one that a stopped run had moved away."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_items(shop.items, partial)
    _write_weights(partial / "weights.safetensors", model, input_rows)
    if base.origin is Origin.SCRATCH:
        shutil.copytree(base.folder, partial / BASE_FOLDER)
    demo_events(shop, demo_customers).write_parquet(partial / "customers.parquet")
    (partial / "metrics.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    (partial / "card.md").write_text(card, "utf-8")
    (partial / "report.html").write_text(render_report(identity.title, report, watch), "utf-8")
    if adapter is not None:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(adapter / name, partial / name)
    texts = text_files(knowledge if knowledge is not None else folder / TEXTS_FOLDER)
    for text in texts:
        (partial / TEXTS_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(text, partial / TEXTS_FOLDER / text.name)
    hashes = {name: file_hash(partial / name) for name in HASHED if (partial / name).exists()}
    manifest = _manifest(shop, base, schema, model, identity, hashes, demo_customers)
    write_manifest(partial, manifest)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return manifest


def _manifest(
    shop: Shop,
    base: Base,
    schema: PromptSchema,
    model: Model,
    identity: Identity,
    hashes: dict[str, str],
    demo_customers: Sequence[int],
) -> ShopManifest:
    # Its version is what the files are: the same training gives the same version, another one another.
    weights = [hashes[name] for name in ("weights.safetensors", ADAPTER_WEIGHTS) if name in hashes]
    version = (weights[0] if len(weights) == 1 else hashlib.sha256("".join(weights).encode()).hexdigest())[:12]
    return ShopManifest(
        format=FORMAT,
        name=identity.name,
        version=version,
        title=identity.title,
        currency=identity.currency,
        notice=identity.notice,
        trained_until=utc_moment(shop.timeline.test_at),
        base=BaseReference(base.name, base.fingerprint, base.config.hidden_size, base.config.vocab_size),
        score=model.weights.score(),
        prompt=schema,
        depth=1,
        level_sizes=(len(shop.items.row_item),),
        type_count=len(shop.items.types),
        feature_version=FEATURE_VERSION,
        hashes=hashes,
        targets=model.predictor.specs if model.predictor is not None else (),
        recommends=cast(Recommends, shop.items.label_kind.name.lower()),
        customers=tuple(
            DemoCustomer(
                customer_id=shop.log.customer_ids[customer],
                as_of=utc_moment(demo_moment(shop)),
                attributes=dict(shop.log.attributes.get(shop.log.customer_ids[customer], ())),
            )
            for customer in demo_customers
        ),
    )


def demo_moment(shop: Shop) -> float:
    """The first whole second after the last event: demo customers are shown as they were then."""
    return float(np.floor(shop.timeline.end) + 1.0)


def choose_demo_customers(shop: Shop, count: int, seed: int) -> list[int]:
    """Customers with a recent purchase, spread from few to many events, preferably with a profile."""
    events = shop.log.events.group_by("customer").agg(pl.len().alias("events"), pl.col("time").max().alias("last"))
    recent = events.filter((pl.col("last") >= shop.timeline.test_at) & (pl.col("events") >= 5))
    pool = recent if len(recent) >= count else events
    known = pl.Series([shop.log.customer_ids[c] in shop.log.attributes for c in pool["customer"].to_list()])
    profiled = pool.filter(known)
    pool = (profiled if len(profiled) >= count else pool).sort("events", "customer")
    if len(pool) <= count:
        return pool["customer"].to_list()
    generator = np.random.default_rng(seed)
    slices = np.array_split(np.arange(len(pool)), count)
    return [int(pool["customer"][int(generator.choice(part))]) for part in slices]


def demo_events(shop: Shop, customers: Sequence[int]) -> pl.DataFrame:
    """customers.parquet: the true events of these customers, oldest first."""
    names = {int(kind): kind.name.lower() for kind in EventKind}
    items = pl.DataFrame(
        {"item_id": shop.log.item_ids, "item": pl.Series(range(len(shop.log.item_ids)), dtype=pl.Int32)}
    )
    people = pl.DataFrame(
        {"customer": pl.Series(customers, dtype=pl.Int32), "customer_id": [shop.log.customer_ids[c] for c in customers]}
    )
    return (
        shop.log.events.join(people, on="customer")
        .join(items, on="item")
        .sort("customer_id", "time", "basket", "item_id")
        .select(
            "customer_id",
            "item_id",
            pl.col("kind").cast(pl.Int64).replace_strict(names, return_dtype=pl.String).alias("type"),
            pl.from_epoch((pl.col("time") * 1e6).round().cast(pl.Int64), time_unit="us")
            .dt.replace_time_zone("UTC")
            .alias("time"),
            "quantity",
            pl.col("price").fill_nan(None),
            pl.col("basket").alias("basket_id"),
        )
    )


def _write_weights(path: Path, model: Model, input_rows: torch.Tensor | None) -> None:
    tensors = {
        "output_rows.0": model.rows.rows.half().contiguous(),
        "output_bias.0": model.rows.bias.float().contiguous(),
        "popularity": model.popularity.float().contiguous(),
    }
    tensors |= model.habits.tensors()
    if model.rebuy is not None:
        tensors |= rebuy_tensors(model.rebuy)
    if model.adopt is not None:
        tensors |= adopt_tensors(model.adopt)
    if input_rows is not None:
        tensors["input_rows"] = input_rows.contiguous()
    if model.predictor is not None:
        standard = model.predictor.standard
        tensors |= {
            "head.input_mean": torch.from_numpy(standard.mean.astype(np.float32)),
            "head.input_scale": torch.from_numpy(standard.scale.astype(np.float32)),
            "head.input_range": torch.from_numpy(np.stack([standard.least, standard.greatest]).astype(np.float32)),
            "head.weight": torch.from_numpy(np.ascontiguousarray(model.predictor.head.weight, np.float32)),
            "head.bias": torch.from_numpy(model.predictor.head.bias.astype(np.float32)),
        }
        head = model.predictor.head
        if head.unit_weight is not None:
            tensors["head.unit_weight"] = torch.from_numpy(np.ascontiguousarray(head.unit_weight, np.float32))
            tensors["head.unit_bias"] = torch.from_numpy(head.unit_bias.astype(np.float32))
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors keeps it to its owner; a server may run as another user
