"""Demo customers: true histories in the bundle, for calls that send no events of their own. No protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from shoplm.bundle import ShopManifest
from shoplm.catalog.items import Catalog
from shoplm.errors import BundleError
from shoplm.history import EVENT_KINDS
from shoplm.raw_events import RawEvents, resolve_items

_COLUMNS = ("customer_id", "item_id", "type", "time", "quantity", "price", "basket_id")


@dataclass(frozen=True)
class DemoHistory:
    """A demo customer as the bundle has it."""

    events: RawEvents
    as_of: float  # Unix seconds
    attributes: dict[str, str]


def read_demo_customers(bundle: Path, manifest: ShopManifest, catalog: Catalog) -> dict[str, DemoHistory]:
    """customer_id -> history. Raises BundleError naming what is wrong in customers.parquet or shop.toml."""
    if not manifest.customers:
        return {}
    path = bundle / "customers.parquet"
    try:
        table = pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise BundleError(f"{path}: {error}") from error
    if missing := [name for name in _COLUMNS if name not in table.columns]:
        raise BundleError(f"{path}: has no column {missing[0]}")
    groups = {str(key[0]): group for key, group in table.group_by("customer_id", maintain_order=True)}
    demo = {}
    for customer in manifest.customers:
        if customer.customer_id not in groups:
            raise BundleError(f"{path}: has no events of the demo customer {customer.customer_id!r}")
        try:
            as_of = datetime.fromisoformat(customer.as_of)
        except ValueError as error:
            raise BundleError(f"{bundle / 'shop.toml'}: as_of of {customer.customer_id!r}: {error}") from error
        if as_of.tzinfo is None:
            raise BundleError(f"{bundle / 'shop.toml'}: as_of of {customer.customer_id!r} has no time zone")
        try:
            events = _events(path, groups[customer.customer_id], catalog)
        except pl.exceptions.PolarsError as error:  # a column of another type
            raise BundleError(f"{path}: {error}") from error
        demo[customer.customer_id] = DemoHistory(events, as_of.timestamp(), customer.attributes)
    return demo


def _events(path: Path, table: pl.DataFrame, catalog: Catalog) -> RawEvents:
    unknown = set(table["type"].unique().to_list()) - set(EVENT_KINDS)
    if unknown:
        raise BundleError(f"{path}: type is {sorted(map(str, unknown))[0]!r}, expected one of {', '.join(EVENT_KINDS)}")
    item, has_item, known = resolve_items(table["item_id"].cast(pl.String).to_list(), catalog)
    events = RawEvents(
        item=item,
        has_item=has_item,
        kind=np.asarray([EVENT_KINDS[name] for name in table["type"].to_list()], np.int8),
        time=_unix_seconds(path, table["time"]),
        quantity=table["quantity"].fill_null(1).cast(pl.Float32).to_numpy(),
        price=table["price"].cast(pl.Float64).fill_null(float("nan")).to_numpy(),
        basket=table["basket_id"].cast(pl.String).fill_null("").to_list(),
    )
    return events.select(np.flatnonzero(known))


def _unix_seconds(path: Path, column: pl.Series) -> NDArray[np.float64]:
    if column.null_count():
        raise BundleError(f"{path}: column time is empty in {column.null_count()} rows")
    if isinstance(column.dtype, pl.Datetime):
        return column.dt.epoch("us").cast(pl.Float64).to_numpy() / 1e6
    if column.dtype.is_numeric():
        return column.cast(pl.Float64).to_numpy()
    raise BundleError(f"{path}: column time is {column.dtype}, expected a datetime or Unix seconds")
