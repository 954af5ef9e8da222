"""A small, seeded shop log with habits in it: customers have favourites, a rhythm and campaigns."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

START = datetime(2021, 1, 1, tzinfo=UTC)
DAYS = 200
NOW = datetime(2022, 1, 1, tzinfo=UTC).timestamp()
CUSTOMERS, ITEMS, TYPES = 60, 40, 5


def events(customers: int = CUSTOMERS, days: int = DAYS, seed: int = 0, items: int = ITEMS) -> pl.DataFrame:
    """Purchases: each customer buys three favourites again and again, and something popular now and then."""
    random = np.random.default_rng(seed)
    rows = []
    for customer in range(customers):
        favourites = random.choice(items, min(3, items), replace=False)
        gap = random.uniform(3.0, 20.0)
        stops = random.uniform(0.5, 1.0) * days if customer % 4 == 0 else days
        day = random.uniform(0.0, gap)
        while day < stops:
            chosen = {int(item) for item in favourites if random.random() < 0.7}
            chosen |= {int(min(random.geometric(0.2), items) - 1)}
            rows += [
                {
                    "customer_id": f"c{customer:03d}",
                    "item_id": f"i{item:03d}",
                    "time": START + timedelta(days=day),
                    "quantity": 1 + int(random.random() < 0.2),
                    "price": round(1.0 + item / 4.0, 2),
                    "basket_id": f"{customer}-{day:.3f}",
                }
                for item in sorted(chosen)
            ]
            day += random.exponential(gap)
    return pl.DataFrame(rows)


def items(count: int = ITEMS) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": [f"i{item:03d}" for item in range(count)],
            "title": [f"Thing {item} of kind {item % TYPES}" for item in range(count)],
            "category": [f"Shelf {item % 3}" for item in range(count)],
            "product_type": [f"Kind {item % TYPES}" for item in range(count)],
        }
    )


def customers(count: int = CUSTOMERS) -> pl.DataFrame:
    ids = [f"c{customer:03d}" for customer in range(0, count, 2)]
    return pl.DataFrame({"customer_id": ids, "age": [["25-34", "45-54"][n % 2] for n in range(len(ids))]})


def campaigns(count: int = CUSTOMERS, days: int = DAYS, seed: int = 1) -> pl.DataFrame:
    """One campaign every ten days; even customers redeem more often than odd ones."""
    random = np.random.default_rng(seed)
    rows = []
    for number, day in enumerate(range(20, days - 10, 10)):
        for customer in range(count):
            if random.random() < 0.5:
                rows.append(
                    {
                        "customer_id": f"c{customer:03d}",
                        "campaign_id": str(number),
                        "campaign_type": "AB"[number % 2],
                        "start": START + timedelta(days=day),
                        "end": START + timedelta(days=day + 8),
                        "redeemed": bool(random.random() < (0.6 if customer % 2 == 0 else 0.15)),
                    }
                )
    return pl.DataFrame(rows)


def write_log(folder: Path) -> None:
    events().write_parquet(folder / "events.parquet")
    items().write_parquet(folder / "items.parquet")
    customers().write_parquet(folder / "customers.parquet")
    campaigns().write_parquet(folder / "campaigns.parquet")
