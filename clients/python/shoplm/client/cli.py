"""The client's command-line verbs: `recommend`, `chat`, `predict` and `model`. Need only the client, no server.

Answers go to stdout (readable, or JSON with `--json`), everything else to stderr. Exit codes:

    0    answered
    1    the server failed, or does not offer the service
    2    the request or the command line is wrong
    3    no server could be reached, or it is draining
    4    refused because of load
    5    no answer within the timeout
    6    no valid token
    130  interrupted
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message as ProtobufMessage
from rich.console import Console
from shoplm.client import render
from shoplm.client.channel import DEFAULT_ADDRESS
from shoplm.client.customer_file import read_customer
from shoplm.client.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotServingError,
    OverloadedError,
    ShopLMClientError,
    UnauthenticatedError,
    UnavailableError,
)
from shoplm.client.sync_client import Client
from shoplm.client.types import Customer, ItemFilter, Message, Target, TargetKind

EXIT_CODES: dict[type[ShopLMClientError], int] = {
    InvalidArgumentError: 2,
    UnavailableError: 3,
    OverloadedError: 4,
    DeadlineExceededError: 5,
    UnauthenticatedError: 6,
}

Address = Annotated[str, typer.Option(envvar="SHOPLM_ADDRESS", help="The server, as host:port.")]
Token = Annotated[str | None, typer.Option(envvar="SHOPLM_TOKEN", help="The server's token, if it asks for one.")]
Tls = Annotated[bool, typer.Option("--tls", help="Encrypt the connection.")]
CaFile = Annotated[
    Path | None,
    typer.Option(envvar="SHOPLM_CA_FILE", help="Trust this certificate (PEM); encrypts.", dir_okay=False, exists=True),
]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait for the answer; the server sees the deadline.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
CustomerId = Annotated[str | None, typer.Option("--customer", help="Whom; left out: the server's first demo customer.")]
HistoryFile = Annotated[
    Path | None, typer.Option("--history", help="A customer with events: JSON of shoplm.v1.Customer.", dir_okay=False)
]


def recommend(
    customer: CustomerId = None,
    history: HistoryFile = None,
    count: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    category: Annotated[list[str] | None, typer.Option(help="Only this category; may be repeated.")] = None,
    exclude_category: Annotated[list[str] | None, typer.Option(help="Not this category; may be repeated.")] = None,
    max_price: Annotated[float | None, typer.Option(help="Highest price.")] = None,
    new_only: Annotated[bool, typer.Option("--new-only", help="Leave out what the customer has bought.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say why.")] = False,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: Tls = False,
    ca_file: CaFile = None,
    timeout: Timeout = None,
) -> None:
    """Recommend items to a customer."""
    item_filter = ItemFilter(
        include_categories=category or (),
        exclude_categories=exclude_category or (),
        max_price=max_price,
        exclude_purchased=new_only,
    )
    with _connected(address, token, tls, ca_file, timeout) as client:
        whom = _customer(client, customer, history)
        answer = client.recommend(whom, count=count, filter=item_filter, explain=explain)
        if as_json:
            _print_json(answer.raw)
        else:
            render.recommendations(_stdout(), answer)


def predict(
    customer: CustomerId = None,
    history: HistoryFile = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="KIND, KIND:DAYS or coupon_redemption:TYPE, such as purchase:7; may be repeated."),
    ] = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: Tls = False,
    ca_file: CaFile = None,
    timeout: Timeout = None,
) -> None:
    """Predict what a customer will do; without --target, everything the shop can predict."""
    targets = [parse_target(text) for text in target or ()]
    with _connected(address, token, tls, ca_file, timeout) as client:
        answer = client.predict(_customer(client, customer, history), targets)
        if as_json:
            _print_json(answer.raw)
        else:
            render.predictions(_stdout(), answer)


def chat(
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
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: Tls = False,
    ca_file: CaFile = None,
    timeout: Timeout = None,
) -> None:
    """Chat with the shop's assistant; the answer appears as it is made."""
    turns = [Message("system", system)] if system else []
    with _connected(address, token, tls, ca_file, timeout) as client:
        whom = _customer(client, customer, history) if customer or history else None
        for text in [message] if message is not None else _spoken():
            turns.append(Message("user", text))
            with client.chat(
                turns, customer=whom, max_tokens=max_tokens, temperature=temperature, seed=seed, grounding=grounding
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


def model(
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: Tls = False,
    ca_file: CaFile = None,
    timeout: Timeout = None,
) -> None:
    """Show what a server serves: bundle, base model, targets, limits and demo customers."""
    with _connected(address, token, tls, ca_file, timeout) as client:
        answer = client.get_model()
        if as_json:
            _print_json(answer.raw)
        else:
            render.model_info(_stdout(), answer)


def register(app: typer.Typer) -> None:
    """Add the verbs to an application."""
    for verb in (recommend, chat, predict, model):
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


@contextmanager
def _connected(
    address: str, token: str | None, tls: bool, ca_file: Path | None, timeout: float | None
) -> Iterator[Client]:
    """A client whose errors become one line on stderr and an exit code."""
    try:
        certificates = None if ca_file is None else ca_file.read_bytes()
        with Client(address, token=token, tls=tls, root_certificates=certificates, timeout=timeout) as client:
            yield client
    except ShopLMClientError as error:
        typer.echo(f"shoplm: {_advice(error, address)}", err=True)
        raise typer.Exit(EXIT_CODES.get(type(error), 1)) from error
    except ValueError as error:
        typer.echo(f"shoplm: {_one_line(str(error))}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


def _advice(error: ShopLMClientError, address: str) -> str:
    """What went wrong and what to do, in one line."""
    text = _one_line(error.message)
    if isinstance(error, UnavailableError):
        return f"no server answers at {address}; start one with `shoplm serve` or set --address ({text})"
    if isinstance(error, OverloadedError):
        wait = "a moment" if error.retry_seconds is None else f"{error.retry_seconds:.2g} s"
        return f"the server is busy: {text}; try again in {wait}"
    if isinstance(error, DeadlineExceededError):
        return f"no answer in time from {address}; allow more with --timeout SECONDS"
    if isinstance(error, UnauthenticatedError):
        return f"the server refused the token: {text}; set --token or SHOPLM_TOKEN"
    if isinstance(error, NotServingError):
        return f"the server does not offer this: {text}; `shoplm model` shows what it serves"
    if isinstance(error, InvalidArgumentError):
        return f"the request is wrong: {text}"
    return f"the server failed: {text}; its log has request {error.request_id}"


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


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _stdout() -> Console:
    return Console()


def _stderr() -> Console:
    return Console(stderr=True)


def _as_dict(message: ProtobufMessage) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _print_json(message: ProtobufMessage) -> None:
    typer.echo(json.dumps(_as_dict(message), ensure_ascii=False, indent=2))
