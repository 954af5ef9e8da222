"""Cleans the columns of a shop's log: every rule counts the rows that it touched."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import polars as pl
from shoplm.history import EVENT_KINDS, EventKind
from shoplm.training.problems import Notes, Problem

_MAX_AMOUNT = 1e9  # a quantity or price above this is a defect of the file, not a purchase
_OLDEST = datetime(1970, 1, 2, tzinfo=UTC).timestamp()
# Unix times above these are finer than seconds, by so many parts: as coarser ones they would lie in the year 5138.
_FINER = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
_LEAST_SECONDS = 1e8  # numbers below this, years such as 2024 or spreadsheets' days, are no Unix time after March 1973
_ZONED = r"^\d{4}-\d{2}-\d{2} .*(Z|[+-]\d{2}(:?\d{2})?)$"
_EXAMPLES, _EXAMPLE_CHARACTERS = 3, 40  # of what was not read: so many, so long
_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
_ITEM_COLUMNS = ("title", "category", "product_type")
_PAID = "_median_paid"
_RESERVED = ("row", "type_index", _PAID)  # of items.parquet, or made on the way to it


def plain_columns(frame: pl.DataFrame) -> list[pl.Expr]:
    """Those columns that need it as what others read: categories as their text, ids that are whole floats without an
    exponent."""
    found = []
    for name, dtype in frame.schema.items():
        column = pl.col(name)
        if isinstance(dtype, pl.Categorical | pl.Enum):
            found.append(column.cast(pl.String))
        elif dtype.is_float() and name.endswith("_id"):
            whole = column.cast(pl.Int64, strict=False)
            text = pl.when(whole == column).then(whole.cast(pl.String)).otherwise(column.cast(pl.String))
            found.append(pl.when(column.is_not_nan()).then(text).alias(name))
    return found


def text_column(name: str) -> pl.Expr:
    """The column as stripped text; empty is null. A whole float loses its `.0`, as ids of nullable numbers get one."""
    text = pl.col(name).cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text.str.replace(r"^(-?\d+)\.0$", "$1")).alias(name)


def flag_column(name: str) -> pl.Expr:
    """The column as true or false, null where it is neither."""
    text = text_column(name).str.to_lowercase()
    return pl.when(text.is_in(_TRUE)).then(True).when(text.is_in(_FALSE)).then(False).alias(name)


def note_unknown_flags(note: Notes, frame: pl.DataFrame, name: str, done: str) -> None:
    """Note the cells that are not empty and neither true nor false."""
    odd = frame.filter(text_column(name).is_not_null() & flag_column(name).is_null())[name]
    if len(odd):
        note.add(name, len(odd), f"neither true nor false, such as {str(odd[0])!r}", done)


def time_column(frame: pl.DataFrame, name: str, timezone: str, *, last: bool = False) -> pl.Expr:
    """The column as Unix seconds, null where it cannot be read: datetimes, dates (20240131, too), ISO 8601 text, or
    Unix seconds (or milli-, micro- or nanoseconds). A time without a zone is one of `timezone`; a local time that does
    not exist is null, midnight the first that does. A date is its first moment; with `last`, its end."""
    days = pl.duration(days=1 if last else 0)
    dtype = frame.schema[name]
    column = pl.col(name)
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        return (column.dt.timestamp("us") / 1e6).alias(name)
    if dtype.is_numeric():
        compact = column.cast(pl.Int64, strict=False).cast(pl.String).str.to_date("%Y%m%d", strict=False)
        dated = _localized(compact.cast(pl.Datetime("us")) + days, timezone)
        return pl.coalesce(_unix(column.cast(pl.Float64)), dated).alias(name)
    if dtype == pl.Date:
        return _localized(column.cast(pl.Datetime("us")) + days, timezone).alias(name)
    if isinstance(dtype, pl.Datetime):
        return _localized(column.cast(pl.Datetime("us")), timezone).alias(name)
    text = _time_text(name)
    zoned = text.str.replace(r"Z$", "+00:00").str.replace(r"([+-]\d{2})$", "${1}:00")
    formats = ("%Y-%m-%d %H:%M:%S%.f%:z", "%Y-%m-%d %H:%M%:z")
    parsed = pl.coalesce(zoned.str.to_datetime(each, strict=False, time_unit="us") for each in formats)
    with_zone = parsed.dt.timestamp("us") / 1e6
    has_zone = text.str.contains(_ZONED)
    plain = pl.coalesce(
        text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", strict=False, time_unit="us"),
        text.str.to_datetime("%Y-%m-%d %H:%M", strict=False, time_unit="us"),
        text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us")) + days,
        text.str.to_date("%Y%m%d", strict=False).cast(pl.Datetime("us")) + days,
    )
    numeric = _unix(text.cast(pl.Float64, strict=False))
    return (
        pl.when(has_zone.fill_null(False))
        .then(with_zone)
        .otherwise(pl.coalesce(_localized(plain, timezone), numeric))
        .alias(name)
    )


def zoneless(frame: pl.DataFrame, name: str) -> int:
    """Rows whose time names no zone, and so is one of wherever the shop is."""
    dtype = frame.schema[name]
    if isinstance(dtype, pl.Datetime) or dtype == pl.Date:
        return len(frame) - frame[name].null_count() if getattr(dtype, "time_zone", None) is None else 0
    if dtype.is_numeric():
        return 0
    dated = _time_text(name).str.contains(r"^\d{4}-\d{2}-\d{2}") & ~_time_text(name).str.contains(_ZONED)
    return int(frame.select(dated.sum()).item() or 0)


def _examples(cells: pl.Series, unread: pl.Series) -> str:
    """`, such as 'a', 'b'`: the first of the cells that say something which was not read; nothing without any."""
    text = cells.filter(unread).cast(pl.String).str.strip_chars()
    said = text.filter(text != "").unique(maintain_order=True)[:_EXAMPLES].str.slice(0, _EXAMPLE_CHARACTERS)
    return f", such as {', '.join(map(repr, said))}" if len(said) else ""


def is_timezone(name: str) -> bool:
    """Whether there is a time zone of this name."""
    try:
        ZoneInfo(name)
    except (ValueError, OSError, KeyError):
        return False
    return True


def _time_text(name: str) -> pl.Expr:
    text = pl.col(name).cast(pl.String).str.strip_chars().str.to_uppercase()
    return text.str.replace(r"^(\d{4}-\d{2}-\d{2})T", "${1} ").str.replace(r"(:\d{2}),(\d)", "${1}.${2}")


def _unix(number: pl.Expr) -> pl.Expr:
    finer = (pl.when(number > least).then(number / parts) for least, parts in _FINER)
    seconds = pl.coalesce(*finer, number)
    return pl.when(seconds.is_finite() & (seconds.abs() >= _LEAST_SECONDS)).then(seconds)


def _localized(naive: pl.Expr, timezone: str) -> pl.Expr:
    def there(moment: pl.Expr) -> pl.Expr:
        return moment.dt.replace_time_zone(timezone, ambiguous="earliest", non_existent="null")

    # Where summer time begins at midnight, a date has no such moment.
    midnight = pl.when(naive == naive.dt.truncate("1d")).then(naive)
    first = (there(midnight + pl.duration(minutes=minutes)) for minutes in (30, 60))
    return pl.coalesce(there(naive), *first).dt.timestamp("us") / 1e6


def cleaned_events(raw: pl.DataFrame, timezone: str, now: float, problems: list[Problem]) -> pl.DataFrame:
    """Columns customer_id, item_id, kind, time, quantity, price, basket; only usable rows."""
    note = Notes("events", problems)
    note.add("time", zoneless(raw, "time"), "no time zone", f"read as {timezone} (--timezone)")
    priced = "price" in raw.columns
    for name, default in (("type", "purchase"), ("quantity", "1"), ("price", None), ("basket_id", None)):
        if name not in raw.columns:
            raw = raw.with_columns(pl.lit(default, pl.String).alias(name))
    names = pl.col("type").cast(pl.String).str.strip_chars().str.to_lowercase()
    frame = raw.select(
        text_column("customer_id"),
        text_column("item_id"),
        names.fill_null("purchase")
        .replace_strict({name: int(kind) for name, kind in EVENT_KINDS.items()}, default=None, return_dtype=pl.Int8)
        .alias("kind"),
        time_column(raw, "time", timezone),
        pl.col("quantity").cast(pl.Float32, strict=False),
        pl.col("price").cast(pl.Float32, strict=False),
        text_column("basket_id").fill_null("").alias("basket"),
    )
    unread = {"type": "kind", "time": "time", "quantity": "quantity", "price": "price"}
    such = {name: _examples(raw[name], frame[made].is_null()) for name, made in unread.items()}
    frame = note.drop(frame, "customer_id", pl.col("customer_id").is_null(), "empty")
    frame = note.drop(frame, "item_id", pl.col("item_id").is_null(), "empty")
    kinds = f"not one of {', '.join(EVENT_KINDS)}{such['type']}"
    frame = note.drop(frame, "type", pl.col("kind").is_null(), kinds)
    frame = note.drop(frame, "time", pl.col("time").is_null(), f"empty or not a time{such['time']}")
    frame = note.drop(frame, "time", pl.col("time") > now, "in the future")
    frame = note.drop(frame, "time", pl.col("time") < _OLDEST, "before 1970-01-02")
    negative = pl.col("quantity") < 0
    count = frame.select(negative.sum()).item() or 0
    note.add("quantity", count, "negative", "read as a return of as many")
    refund = ~negative.fill_null(False) & (pl.col("price") < 0) & (pl.col("kind") == int(EventKind.PURCHASE))
    note.add("price", frame.select(refund.sum()).item() or 0, "negative, of a purchase", "read as a return")
    frame = frame.with_columns(
        pl.when(negative | refund).then(pl.lit(int(EventKind.RETURN), pl.Int8)).otherwise(pl.col("kind")).alias("kind"),
        pl.col("quantity").abs(),
    )
    odd = pl.col("quantity").is_null() | (pl.col("quantity") == 0) | ~(pl.col("quantity") <= _MAX_AMOUNT)
    count = frame.select(odd.sum()).item() or 0
    note.add("quantity", count, f"empty, zero or not a number{such['quantity']}", "set to 1")
    known = pl.col("price").is_not_null() & (pl.col("price") >= 0) & (pl.col("price") <= _MAX_AMOUNT)
    if priced:
        count = frame.select((~known).sum()).item() or 0
        note.add("price", count, f"empty, negative or not a number{such['price']}", "unknown price")
    frame = frame.with_columns(
        pl.when(odd).then(1.0).otherwise(pl.col("quantity")).cast(pl.Float32).alias("quantity"),
        pl.when(known).then(pl.col("price")).otherwise(float("nan")).cast(pl.Float32).alias("price"),
    )
    unique = frame.unique(maintain_order=True)
    note.add("-", len(frame) - len(unique), "equal to another row in every column", "kept once")
    if not unique["time"].is_sorted():
        note.add("time", len(unique), "not in order of time", "sorted")
    return unique


def cleaned_items(raw: pl.DataFrame | None, events: pl.DataFrame, problems: list[Problem]) -> pl.DataFrame:
    """One row per item of the catalogue or the log, sorted by id, with every column that a bundle needs."""
    note = Notes("items", problems)
    if raw is None:
        raw = pl.DataFrame(schema={"item_id": pl.String})
        note.add("item_id", events["item_id"].n_unique(), "no items file", "the id is the title")
    for name in _RESERVED:
        if name in raw.columns:
            note.add(name, len(raw), "a column that a bundle has of its own", "left out")
    frame = raw.drop(_RESERVED, strict=False).with_columns(text_column("item_id"))
    frame = note.drop(frame, "item_id", pl.col("item_id").is_null(), "empty")
    unique = frame.unique("item_id", keep="first", maintain_order=True)
    note.add("item_id", len(frame) - len(unique), "repeated", "first row kept")
    missing = events.select("item_id").unique().join(unique.select("item_id"), on="item_id", how="anti")
    if len(raw):
        found = "in the events but not in the items"
        if len(unique) and len(missing) == events["item_id"].n_unique():
            found += f": none is; they are such as {missing['item_id'].min()!r}, the items' {unique['item_id'].min()!r}"
        note.add("item_id", len(missing), found, "added, with the id as the title")
    frame = pl.concat([unique, missing], how="diagonal")
    for name in _ITEM_COLUMNS:
        if name not in frame.columns:
            frame = frame.with_columns(pl.lit(None, pl.String).alias(name))
    if "price" not in frame.columns:
        frame = frame.with_columns(pl.lit(None, pl.Float64).alias("price"))
    price = pl.col("price").cast(pl.Float64, strict=False)
    valid = (price.is_finite() & (price >= 0)).fill_null(False)
    bad = frame.select((text_column("price").is_not_null() & ~valid).alias("bad"))["bad"]
    found = f"negative or not a number{_examples(frame['price'], bad)}"
    note.add("price", int(bad.sum()), found, "median price paid instead")
    stock = pl.lit(True)
    if "in_stock" in frame.columns:
        stock = flag_column("in_stock")
        note_unknown_flags(note, frame, "in_stock", "taken as in stock")
    frame = frame.with_columns(
        *(text_column(name) for name in frame.columns if name not in ("item_id", "price", "in_stock")),
        pl.when(valid).then(price).alias("price"),
        stock.fill_null(True).alias("in_stock"),
    )
    paid = events.filter(pl.col("price").is_not_nan()).group_by("item_id").agg(pl.col("price").median().alias(_PAID))
    frame = frame.join(paid, on="item_id", how="left").with_columns(
        pl.coalesce("price", pl.col(_PAID).cast(pl.Float64)).round(2).alias("price"),
        pl.coalesce("title", "product_type", "item_id").alias("title"),
        pl.coalesce("category", "product_type", pl.lit("Other")).alias("category"),
    )
    return frame.with_columns(pl.coalesce("product_type", "category").alias("product_type")).drop(_PAID).sort("item_id")
