"""A shop's log as files: read, checked, cleaned. The schema is documented in docs/training.md.

What is wrong with the files becomes rows of a table (`Problem`): what was found, how often, what was done about it.
Fatal problems are all found before any work starts.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from shoplm.history import MAX_ATTRIBUTE_BYTES, MAX_ATTRIBUTES, utc_moment
from shoplm.training.log_checks import check_end, check_kinds
from shoplm.training.log_columns import (
    cleaned_events,
    cleaned_items,
    flag_column,
    is_timezone,
    note_unknown_flags,
    plain_columns,
    text_column,
    time_column,
)
from shoplm.training.log_numbers import with_points
from shoplm.training.problems import LogError, Notes, Problem

# Columns that are read, by file; of the customers' file and the catalogue, the others are kept as they are.
COLUMNS: Mapping[str, frozenset[str]] = {
    "events": frozenset({"customer_id", "item_id", "time", "type", "quantity", "price", "basket_id"}),
    "items": frozenset({"item_id", "title", "category", "product_type", "price", "in_stock"}),
    "customers": frozenset({"customer_id", "as_of"}),
    "campaigns": frozenset({"customer_id", "campaign_id", "campaign_type", "start", "end", "redeemed"}),
}

_SEVERAL_CUSTOMERS = 50


@dataclass(frozen=True)
class ShopLog:
    """Cleaned files. Customers and items are numbered by their sorted ids; times are Unix seconds, UTC."""

    customer_ids: list[str]
    item_ids: list[str]
    events: pl.DataFrame  # customer i32, item i32, kind i8, time f64, quantity f32, price f32 (NaN unknown), basket str
    items: pl.DataFrame  # one row per item_ids entry: item_id, title, category, product_type, price, in_stock, extras
    attributes: dict[str, tuple[tuple[str, str], ...]]  # customer id -> known profile attributes
    campaigns: pl.DataFrame  # customer i32, campaign_id, campaign_type, start f64, end f64, redeemed bool
    problems: list[Problem] = field(default_factory=list)

    @property
    def start(self) -> float:
        """Time of the first event."""
        return float(self.events["time"].min())  # type: ignore[arg-type]

    @property
    def end(self) -> float:
        """Time of the last event."""
        return float(self.events["time"].max())  # type: ignore[arg-type]


CAMPAIGN_SCHEMA = {
    "customer": pl.Int32,
    "campaign_id": pl.String,
    "campaign_type": pl.String,
    "start": pl.Float64,
    "end": pl.Float64,
    "redeemed": pl.Boolean,
}


def read_log(
    events: Path,
    items: Path | None = None,
    customers: Path | None = None,
    campaigns: Path | None = None,
    *,
    timezone: str = "UTC",
    now: float,
) -> ShopLog:
    """Read CSV or Parquet files. `timezone` is that of times that name none; events after `now` (Unix seconds) are
    dropped. Raises LogError with every fatal problem found.
    """
    problems: list[Problem] = []
    if not is_timezone(timezone):
        found = f"no time zone is called {timezone!r}"
        problems.append(Problem("events", "time", 0, found, "name one such as Europe/Berlin", fatal=True))
    raw_events = read_table(events, "events", ("customer_id", "item_id", "time"), problems)
    raw_items = read_table(items, "items", ("item_id",), problems) if items is not None else None
    raw_customers = read_table(customers, "customers", ("customer_id",), problems) if customers is not None else None
    wanted = ("customer_id", "campaign_id", "campaign_type", "start", "end", "redeemed")
    raw_campaigns = read_table(campaigns, "campaigns", wanted, problems) if campaigns is not None else None
    if any(problem.fatal for problem in problems):
        raise LogError(problems)
    assert raw_events is not None
    clean = cleaned_events(raw_events, timezone, now, problems)
    if not len(clean):
        problems.append(Problem("events", "-", len(raw_events), "no usable row is left", "repair the file", fatal=True))
    elif clean["time"].n_unique() == 1:
        found = f"all events are at {utc_moment(clean['time'][0])}"
        done = "give a log with a duration: there is no later event to learn from"
        problems.append(Problem("events", "time", len(clean), found, done, fatal=True))
    if any(problem.fatal for problem in problems):
        raise LogError(problems)
    check_kinds(clean, problems)
    check_end(clean, problems)
    known = cleaned_items(raw_items, clean, problems)
    item_ids = known["item_id"].to_list()
    customer_ids = clean["customer_id"].unique().sort().to_list()
    numbered = _numbered(clean, customer_ids, item_ids)
    return ShopLog(
        customer_ids=customer_ids,
        item_ids=item_ids,
        events=numbered,
        items=known,
        attributes=_attributes(raw_customers, customer_ids, problems),
        campaigns=_campaigns(raw_campaigns, customer_ids, timezone, problems),
        problems=problems,
    )


def read_table(path: Path, table: str, required: tuple[str, ...], problems: list[Problem]) -> pl.DataFrame | None:
    """A file as it is, column names in lower case; None after adding a fatal problem. Columns of CSV and ids are
    text."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".parquet", ".pq"):
            frame = pl.read_parquet(path, glob=False)
        elif suffix in (".csv", ".tsv"):
            frame = _read_csv(path, table, "\t" if suffix == ".tsv" else ",", problems)
        else:
            found = f"{path} is neither .parquet nor .csv"
            problems.append(Problem(table, "-", 0, found, "convert the file", fatal=True))
            return None
    except (OSError, pl.exceptions.PolarsError) as error:
        problems.append(Problem(table, "-", 0, f"{path}: {str(error).splitlines()[0]}", "repair the file", fatal=True))
        return None
    names = [name.strip().lower() for name in frame.columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        found = (
            f"more than one column is called so: {', '.join(n for n in frame.columns if n.strip().lower() in twice)}"
        )
        problems.append(Problem(table, twice[0], len(frame), found, "rename all but one", fatal=True))
        return None
    frame = frame.rename(dict(zip(frame.columns, names, strict=True)))
    for column, dtype in frame.schema.items():
        if not (dtype.is_nested() or dtype in (pl.Binary, pl.Object, pl.Duration, pl.Time)):
            continue
        found = f"a cell holds {dtype}, not one value"
        if column in COLUMNS[table]:
            problems.append(Problem(table, column, len(frame), found, "write one row per value", fatal=True))
        else:
            problems.append(Problem(table, column, len(frame), found, "left out"))
            frame = frame.drop(column)
    for column in required:
        if column not in frame.columns:
            found = f"the column is missing; there are: {', '.join(frame.columns)}"
            problems.append(Problem(table, column, len(frame), found, "add or rename the column", fatal=True))
    return frame.with_columns(plain_columns(frame))


def _read_csv(path: Path, table: str, separator: str, problems: list[Problem]) -> pl.DataFrame:
    """Everything is text until its column is read: ids such as 007 must stay what they are. Spreadsheets of some
    countries write semicolons between the columns, or tabs, and a comma into numbers."""
    with path.open("rb") as file:
        begin = file.read(4096)
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise pl.exceptions.ComputeError("it is UTF-16; save it as UTF-8")
    header = begin.splitlines()[0] if begin else b""
    semicolons = separator not in header.decode("utf-8", "replace") and b";" in header
    frame = pl.read_csv(path, glob=False, infer_schema=False, separator=";" if semicolons else separator)
    if semicolons:
        problems.append(Problem(table, "-", len(frame), "semicolons between the columns", "read so"))
    if semicolons or separator != ",":
        numbers = [name for name in frame.columns if name.strip().lower() in ("price", "quantity")]
        frame = frame.with_columns(with_points(frame, name, table, problems) for name in numbers)
    return frame


def _numbered(events: pl.DataFrame, customer_ids: list[str], item_ids: list[str]) -> pl.DataFrame:
    def index(ids: list[str], name: str) -> pl.DataFrame:
        return pl.DataFrame({f"{name}_id": ids, name: pl.Series(range(len(ids)), dtype=pl.Int32)})

    joined = events.join(index(customer_ids, "customer"), on="customer_id").join(index(item_ids, "item"), on="item_id")
    columns = ["customer", "item", "kind", "time", "quantity", "price", "basket"]
    return joined.select(columns).sort("customer", "time", "basket", "kind", "item", "quantity", "price")


def _attributes(
    frame: pl.DataFrame | None, customer_ids: list[str], problems: list[Problem]
) -> dict[str, tuple[tuple[str, str], ...]]:
    if frame is None:
        return {}
    frame = frame.with_columns(text_column(name) for name in frame.columns)
    unique = frame.filter(pl.col("customer_id").is_not_null()).unique("customer_id", keep="first", maintain_order=True)
    if len(unique) < len(frame):
        problems.append(
            Problem("customers", "customer_id", len(frame) - len(unique), "empty or repeated id", "first row kept")
        )
    matching = int(unique["customer_id"].is_in(customer_ids).sum())
    if 0 < matching < len(unique):
        found = f"no id of the events; {matching:,} others are"
        problems.append(Problem("customers", "customer_id", len(unique) - matching, found, "not used"))
    if len(unique) and not matching:
        theirs = unique[0, "customer_id"]
        found = f"no id of the events, which are such as {customer_ids[0]!r}; these are such as {theirs!r}"
        problems.append(Problem("customers", "customer_id", len(unique), found, "no customer has a profile"))
    names = _usable_attributes(
        unique, sorted(name for name in frame.columns if name not in COLUMNS["customers"]), problems
    )
    return {
        row["customer_id"]: tuple((name, row[name]) for name in names if row[name] is not None)
        for row in unique.iter_rows(named=True)
    }


def _usable_attributes(customers: pl.DataFrame, names: list[str], problems: list[Problem]) -> list[str]:
    """The attributes that say something of others, too, and that a server takes."""
    note = Notes("customers", problems)
    kept: list[str] = []
    for name in names:
        column = customers[name].drop_nulls()
        if column.n_unique() > max(_SEVERAL_CUSTOMERS, len(column) / 2):
            note.add(name, len(column), "another value for nearly each customer", "left out: it says nothing of others")
        elif long := int((column.str.len_bytes() > MAX_ATTRIBUTE_BYTES).sum()):
            note.add(name, long, f"longer than {MAX_ATTRIBUTE_BYTES} bytes, which a server refuses", "left out")
        elif len(kept) == MAX_ATTRIBUTES:
            note.add(name, len(column), f"more than {MAX_ATTRIBUTES} columns, which a server refuses", "left out")
        else:
            kept.append(name)
    return kept


def _campaigns(
    frame: pl.DataFrame | None, customer_ids: list[str], timezone: str, problems: list[Problem]
) -> pl.DataFrame:
    if frame is None:
        return pl.DataFrame(schema=CAMPAIGN_SCHEMA)
    ids = pl.DataFrame({"customer_id": customer_ids, "customer": pl.Series(range(len(customer_ids)), dtype=pl.Int32)})
    note_unknown_flags(Notes("campaigns", problems), frame, "redeemed", "taken as not redeemed")
    parsed = frame.with_columns(
        text_column("customer_id"),
        text_column("campaign_id"),
        text_column("campaign_type"),
        time_column(frame, "start", timezone),
        time_column(frame, "end", timezone, last=True),
        flag_column("redeemed").fill_null(False),
    )
    known = parsed.join(ids, on="customer_id").select(list(CAMPAIGN_SCHEMA)).drop_nulls()
    usable = known.filter(pl.col("start") < pl.col("end")).unique(maintain_order=True)
    if len(usable) < len(frame):
        found = "unknown customer, empty field, end not after start, or a repeated row"
        problems.append(Problem("campaigns", "-", len(frame) - len(usable), found, "dropped"))
    reached = [name for name in CAMPAIGN_SCHEMA if name != "redeemed"]
    merged = usable.group_by(reached, maintain_order=True).agg(pl.col("redeemed").any())
    if len(merged) < len(usable):
        found = "redeemed by one row of a customer and campaign, not by another"
        problems.append(Problem("campaigns", "redeemed", len(usable) - len(merged), found, "taken as redeemed"))
    return merged.sort("start", "campaign_id", "customer")
