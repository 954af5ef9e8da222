"""The client's command-line verbs: `recommend`, `rank`, `chat`, `predict` and `model`. Need only the client, no server.

Answers go to stdout (readable, or JSON with `--json`), everything else to stderr. Exit codes:

    0    answered
    1    the server failed, or does not offer the service
    2    the request or the command line is wrong
    3    no server could be reached, or it is draining
    4    refused because of load
    5    no answer within the timeout
    6    no valid token, or one that does not allow this
    130  interrupted
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message as ProtobufMessage
from rich.console import Console
from shoplm.client import render
from shoplm.client.cli_connection import connected
from shoplm.client.customer_file import read_customer
from shoplm.client.sync_client import Client
from shoplm.client.types import (
    Customer,
    ItemFilter,
    Message,
    ModelInfo,
    Predictions,
    Ranking,
    Recommendations,
    Target,
    TargetKind,
)

Answer = TypeVar("Answer", Recommendations, Ranking, Predictions, ModelInfo)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
CustomerId = Annotated[str | None, typer.Option("--customer", help="Whom; left out: the server's first demo customer.")]
AllowDegraded = Annotated[
    bool, typer.Option("--allow-degraded", help="Rather a smaller answer than a refusal when the server is busy.")
]
Priority = Annotated[
    int | None, typer.Option(help="Before (above 0) or behind the other requests of the same tenant, where they wait.")
]
HistoryFile = Annotated[
    Path | None, typer.Option("--history", help="A customer with events: JSON of shoplm.v1.Customer.", dir_okay=False)
]


@connected
def recommend(
    client: Client,
    customer: CustomerId = None,
    history: HistoryFile = None,
    count: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    category: Annotated[list[str] | None, typer.Option(help="Only this category; may be repeated.")] = None,
    exclude_category: Annotated[list[str] | None, typer.Option(help="Not this category; may be repeated.")] = None,
    min_price: Annotated[float | None, typer.Option(help="Lowest price.")] = None,
    max_price: Annotated[float | None, typer.Option(help="Highest price.")] = None,
    in_stock: Annotated[bool, typer.Option("--in-stock", help="Only what the catalogue marks as in stock.")] = False,
    new_only: Annotated[bool, typer.Option("--new-only", help="Leave out what the customer has bought.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say why.")] = False,
    allow_degraded: AllowDegraded = False,
    priority: Priority = None,
    as_json: Json = False,
) -> None:
    """Recommend items to a customer."""
    item_filter = ItemFilter(
        include_categories=category or (),
        exclude_categories=exclude_category or (),
        min_price=min_price,
        max_price=max_price,
        exclude_purchased=new_only,
        in_stock_only=in_stock,
    )
    whom = _customer(client, customer, history)
    answer = client.recommend(
        whom, count=count, filter=item_filter, explain=explain, allow_degraded=allow_degraded, priority=priority
    )
    _show(answer, render.recommendations, as_json=as_json)


@connected
def rank(
    client: Client,
    items: Annotated[list[str], typer.Argument(help="Ids of the items.", metavar="ITEM…")],
    customer: CustomerId = None,
    history: HistoryFile = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why.")] = False,
    allow_degraded: AllowDegraded = False,
    priority: Priority = None,
    as_json: Json = False,
) -> None:
    """Put items of your choice in a customer's order, best first."""
    whom = _customer(client, customer, history)
    answer = client.rank(whom, items, explain=explain, allow_degraded=allow_degraded, priority=priority)
    _show(answer, render.recommendations, as_json=as_json)


@connected
def predict(
    client: Client,
    customer: CustomerId = None,
    history: HistoryFile = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="purchase, purchase_count, spend or churn, with :DAYS where not 30, or coupon_redemption:TYPE; may be "
            "repeated."
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what moved each prediction.")] = False,
    allow_degraded: AllowDegraded = False,
    priority: Priority = None,
    as_json: Json = False,
) -> None:
    """Predict what a customer will do; without --target, everything the shop can predict."""
    targets = [parse_target(text) for text in target or ()]
    whom = _customer(client, customer, history)
    answer = client.predict(whom, targets, explain=explain, allow_degraded=allow_degraded, priority=priority)
    _show(answer, render.predictions, as_json=as_json)


@connected
def chat(
    client: Client,
    message: Annotated[
        str | None, typer.Argument(help="What to say; left out: read it, or talk in a terminal.")
    ] = None,
    customer: Annotated[str | None, typer.Option("--customer", help="Who is talking; left out: a visitor.")] = None,
    history: HistoryFile = None,
    system: Annotated[str | None, typer.Option(help="Instructions for the assistant.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always gives the likeliest answer.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes a sampled answer repeatable.")] = None,
    grounding: Annotated[
        bool | None,
        typer.Option(help="Use the shop's texts, named items, own purchases; left out: if there is a bundle."),
    ] = None,
    allow_degraded: AllowDegraded = False,
    priority: Priority = None,
    as_json: Json = False,
) -> None:
    """Chat with the shop's assistant; the answer appears as it is made."""
    turns = [Message("system", system)] if system else []
    whom = _customer(client, customer, history) if customer or history else None
    for text in [message] if message is not None else _spoken():
        turns.append(Message("user", text))
        with client.chat(
            turns,
            customer=whom,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            grounding=grounding,
            allow_degraded=allow_degraded,
            priority=priority,
        ) as answer:
            said = []
            for delta in answer:
                said.append(delta)
                typer.echo(json.dumps({"delta": delta}, ensure_ascii=False) if as_json else delta, nl=as_json)
            if as_json:
                typer.echo(json.dumps({"summary": _as_dict(answer.summary.raw)}, ensure_ascii=False))
            else:
                typer.echo("")
                render.chat_summary(_stderr(), answer.summary)
        turns.append(Message("assistant", "".join(said)))


@connected
def model(
    client: Client,
    as_json: Json = False,
) -> None:
    """Show what a server serves: bundle, base model, targets, limits and demo customers."""
    answer = client.get_model()
    _show(answer, render.model_info, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the verbs to an application."""
    for verb in (recommend, rank, chat, predict, model):
        app.command()(verb)


def parse_target(text: str) -> Target:
    """The target that `KIND`, `KIND:DAYS` or `coupon_redemption:TYPE` names; typer.BadParameter says what is wrong."""
    kind_name, _, detail = text.partition(":")
    kinds = [kind.value for kind in TargetKind if kind is not TargetKind.UNSPECIFIED]
    if kind_name not in kinds:
        raise typer.BadParameter(f"{kind_name!r} is not one of {', '.join(kinds)}", param_hint="--target")
    kind = TargetKind(kind_name)
    if kind is TargetKind.COUPON_REDEMPTION:
        return Target(kind, campaign_type=detail)
    if detail and not (detail.isdecimal() and int(detail) > 0):
        raise typer.BadParameter(f"{detail!r} is not a number of days above 0", param_hint="--target")
    return Target(kind, horizon_days=int(detail) if detail else None)


def _customer(client: Client, customer_id: str | None, history: Path | None) -> str | Customer:
    if history is not None:
        return read_customer(history, customer_id)
    if customer_id is not None:
        return customer_id
    demo_ids = client.get_model().demo_customer_ids
    if not demo_ids:
        raise ValueError("the server has no demo customers; pass --customer ID with --history FILE")
    _stderr().print(f"[dim]demo customer {demo_ids[0]} (others: --customer {' | '.join(demo_ids[1:])})[/dim]")
    return demo_ids[0]


def _spoken() -> Iterator[str]:
    """What the user says: the whole of a pipe, or line after line of a terminal until end of file."""
    if not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        if not text:
            raise ValueError('nothing to say: pass a message, as in `shoplm chat "How do returns work?"`')
        yield text
        return
    while True:
        try:
            line = _stderr().input("[bold]> [/bold]")
        except EOFError:
            return
        if line.strip():
            yield line


def _stdout() -> Console:
    return Console()


def _stderr() -> Console:
    return Console(stderr=True)


def _show(answer: Answer, as_people_read: Callable[[Console, Answer], None], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_as_dict(answer.raw), ensure_ascii=False, indent=2))
    else:
        as_people_read(_stdout(), answer)


def _as_dict(message: ProtobufMessage) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
