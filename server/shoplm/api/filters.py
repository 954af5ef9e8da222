"""An `ItemFilter` message becomes the engine's: names checked against the catalogue, impossible ones refused."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from shoplm.api.customers import MAX_AMOUNT, MAX_ID_BYTES
from shoplm.api.validation import Violations, nearest, quote, shown_outside
from shoplm.api.warnings import Warnings
from shoplm.catalog.items import Catalog
from shoplm.config import ServerConfig
from shoplm.history import EventKind, History
from shoplm.request import ItemFilter
from shoplm.v1 import recommendation_pb2

_PRICES = ("min_price", "max_price")


def read_filter(
    message: recommendation_pb2.ItemFilter, catalog: Catalog, config: ServerConfig, violations: Violations
) -> ItemFilter:
    """Conditions on categories, price and stock. The result counts only if no violation was added."""
    include = _categories("include_categories", message.include_categories, catalog, config, violations)
    exclude = _categories("exclude_categories", message.exclude_categories, catalog, config, violations)
    if include and not set(include) - set(exclude):
        violations.add(
            "filter.exclude_categories", "excludes every category of include_categories: no item can pass the filter"
        )
    elif set(catalog.category_names) <= set(exclude):
        violations.add("filter.exclude_categories", "excludes every category: no item can pass the filter")
    low = message.min_price if message.HasField("min_price") else None
    high = message.max_price if message.HasField("max_price") else None
    in_range = [
        value is None or violations.number(f"filter.{name}", value, 0.0, MAX_AMOUNT)
        for name, value in zip(_PRICES, (low, high), strict=True)
    ]
    if all(in_range) and low is not None and high is not None and low > high:
        limit = shown_outside(high, low, MAX_AMOUNT)
        violations.add(
            "filter.min_price",
            f"is {shown_outside(low, 0.0, high)}, above max_price {limit}: no item can pass the filter",
        )
    return ItemFilter(include, exclude, low, high, message.in_stock_only)


def excluded_rows(
    message: recommendation_pb2.ItemFilter,
    catalog: Catalog,
    history: History,
    config: ServerConfig,
    violations: Violations,
    warnings: Warnings,
) -> tuple[int, ...]:
    """Item rows that the request leaves out by id or because they were bought, ascending."""
    rows: set[int] = set()
    if violations.length(
        "filter.exclude_item_ids", message.exclude_item_ids, config.max_filter_values, "max_filter_values"
    ):
        for index, item_id in enumerate(message.exclude_item_ids):
            violations.text(f"filter.exclude_item_ids[{index}]", item_id, MAX_ID_BYTES, required=True)
            row = catalog.rows.get(item_id)
            if row is not None:
                rows.add(row)
            elif item_id not in catalog.rare:  # a rare item is never recommended: leaving it out is no mistake
                warnings.add("UNKNOWN_ITEM")
    if message.exclude_purchased:
        bought = history.has_item & (history.kind == EventKind.PURCHASE)
        rows.update(np.unique(history.item[bought]).tolist())
    return tuple(sorted(rows))


def _categories(
    name: str, values: Iterable[str], catalog: Catalog, config: ServerConfig, violations: Violations
) -> tuple[str, ...]:
    """Sorted and distinct, so that equal filters share a mask in the engine."""
    given = list(values)
    if not violations.length(f"filter.{name}", given, config.max_filter_values, "max_filter_values"):
        return ()
    known = set(catalog.category_names)
    for index, value in enumerate(given):
        if value not in known:
            hint = "" if violations.is_full else nearest(value, catalog.category_names)  # it takes milliseconds
            violations.add(f"filter.{name}[{index}]", f"the catalogue has no category {quote(value)}{hint}")
    return tuple(sorted(set(given)))
