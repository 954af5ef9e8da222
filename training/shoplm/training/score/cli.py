"""`shoplm score`."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zoneinfo import ZoneInfo

import typer
from rich.console import Console
from rich.markup import escape
from shoplm.training.log_columns import is_timezone
from shoplm.training.terminal import errors, fail, print_problems, watching

if TYPE_CHECKING:
    from shoplm.config import ServerConfig
    from shoplm.engine.client import EngineClient
    from shoplm.model.base import Base


def score(
    bundle: Annotated[Path, typer.Option(help="the bundle's folder", exists=True, file_okay=False)],
    customers: Annotated[
        Path,
        typer.Option(help="whom: customer_id, perhaps as_of and profile columns; .parquet or .csv", exists=True),
    ],
    out: Annotated[Path, typer.Option(help="the answers, one row per row of the customers: .parquet")],
    events: Annotated[
        Path | None, typer.Option(help="their events; without it, the customers' file holds events", exists=True)
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="items per customer")] = 10,
    as_of: Annotated[
        str | None, typer.Option(help="moment that rows without one are seen from (ISO 8601); default: now")
    ] = None,
    timezone: Annotated[str, typer.Option(help="zone of times that name none")] = "UTC",
    base: Annotated[str | None, typer.Option(help="base model; default: the default base")] = None,
    backend: Annotated[str | None, typer.Option(help="torch or triton; default: as the server")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="of the engine; 0: one per core")] = None,
    resume: Annotated[bool, typer.Option(help="go on from what a stopped run answered")] = True,
) -> None:
    """Score a whole customer base: recommendations and predictions, through the engine that serves calls.

    Other settings of the engine are read from SHOPLM_* variables, as the server's are.
    """
    from shoplm.config_sources import load_config
    from shoplm.model.base import bundle_base
    from shoplm.training.score.run import ScoreRequest
    from shoplm.training.score.run import score as run

    console = Console(stderr=True)
    if out.suffix.lower() not in (".parquet", ".pq"):
        fail(console, f"--out {out}: the answers are lists and numbers; name a .parquet file")
    if out.resolve() in {path.resolve() for path in (customers, events) if path is not None}:
        fail(console, f"--out {out} is one of the files to be read")
    chosen = {"--bundle": bundle, "--base": base, "--backend": backend, "--threads": threads}
    flags = [part for flag, value in chosen.items() if value is not None for part in (flag, str(value))]
    with errors(console):
        config = load_config(flags)
        request = ScoreRequest(customers, events, out, count, _moment(console, as_of, timezone), timezone, resume)
        resolved = bundle_base(config.bundle, config.base)
        with watching(console) as watch:
            rows = asyncio.run(
                run(
                    request,
                    config,
                    resolved,
                    engine_process,
                    lambda done, total: watch.advance("customers", done, total),
                    lambda problems: print_problems(console, problems),
                    watch.say,
                )
            )
    console.print(f"wrote [bold]{escape(str(out))}[/bold]: {rows:,} rows")


def engine_process(config: ServerConfig, base: Base) -> EngineClient:
    """The engine in a process of its own, as the server runs it."""
    from shoplm.engine.supervisor import ProcessEngineClient

    return ProcessEngineClient(config.engine_spec(base.folder), config.engine_hang_seconds)


def _moment(console: Console, text: str | None, timezone: str) -> float | None:
    if not is_timezone(timezone):
        fail(console, f"--timezone {timezone!r}: no time zone is called so; name one such as Europe/Berlin")
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo is not None else found.replace(tzinfo=ZoneInfo(timezone))).timestamp()
    except ValueError as error:
        example = datetime(2024, 1, 31, 18, 5, tzinfo=UTC).isoformat()
        fail(console, f"--as-of {text!r}: {error}; write it like {example}")
