"""`shoplm explain`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def explain(
    bundle: Annotated[Path, typer.Option(help="the bundle's folder", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="the page to write: .html")],
    customer: Annotated[str, typer.Option(help="whom: a demo customer of the bundle, or the id of --history")] = "",
    history: Annotated[
        Path | None,
        typer.Option(help="a customer with events: JSON of shoplm.v1.Customer", exists=True, dir_okay=False),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="how many recommendations")] = 5,
    base: Annotated[str | None, typer.Option(help="base model; default: the bundle's")] = None,
) -> None:
    """Draw why: a page with a customer's history, what moved each answer, and where the model's attention lay.

    Runs a server of its own on the CPU; its other settings are read from SHOPLM_* variables.
    """
    from shoplm.client.customer_file import read_customer
    from shoplm.client.requests import customer_message
    from shoplm.config_sources import load_config
    from shoplm.errors import ShopLMError
    from shoplm.explain.collect import explain as collect
    from shoplm.explain.page import render
    from shoplm.v1 import shop_pb2

    console = Console(stderr=True)
    flags = ["--bundle", str(bundle), "--port", "0", "--metrics-port", "0", "--backend", "torch"]
    flags += [] if base is None else ["--base", base]
    try:
        whom = shop_pb2.Customer(customer_id=customer)
        if history is not None:
            whom = customer_message(read_customer(history, customer or None))
        config = load_config(flags)
        if not customer and history is None:
            raise ValueError("give --customer, a demo customer of the bundle, or --history")
        page = render(asyncio.run(collect(config, whom, count)))
    except (ShopLMError, ValueError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    out.write_text(page, "utf-8")
    console.print(f"wrote [bold]{out}[/bold]")
