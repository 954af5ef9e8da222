"""What every command-line verb shares: the options of the connection, errors as one line, and exit codes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer
from shoplm.client.channel import DEFAULT_ADDRESS
from shoplm.client.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotServingError,
    OverloadedError,
    PermissionDeniedError,
    ShopLMClientError,
    UnauthenticatedError,
    UnavailableError,
)
from shoplm.client.sync_client import Client

EXIT_CODES: dict[type[ShopLMClientError], int] = {
    InvalidArgumentError: 2,
    UnavailableError: 3,
    OverloadedError: 4,
    DeadlineExceededError: 5,
    UnauthenticatedError: 6,
    PermissionDeniedError: 6,
}

Arguments = ParamSpec("Arguments")


def _file(variable: str, help_text: str) -> Any:
    return typer.Option(envvar=variable, help=help_text, dir_okay=False, exists=True)


def open_client(
    address: Annotated[str, typer.Option(envvar="SHOPLM_ADDRESS", help="The server, as host:port.")] = DEFAULT_ADDRESS,
    token: Annotated[
        str | None, typer.Option(envvar="SHOPLM_TOKEN", help="The server's token, if it asks for one.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(envvar="SHOPLM_TENANT", help="As whom, where tenants share the server.")
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", envvar="SHOPLM_TLS", help="Encrypt the connection.")] = False,
    ca_file: Annotated[Path | None, _file("SHOPLM_CA_FILE", "Trust this certificate (PEM); encrypts.")] = None,
    cert_file: Annotated[
        Path | None, _file("SHOPLM_CERT_FILE", "The certificate to show (PEM), for mutual TLS.")
    ] = None,
    key_file: Annotated[Path | None, _file("SHOPLM_KEY_FILE", "The key of --cert-file (PEM).")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds to wait for the answer, default 10, in chat 120; the server sees them."),
    ] = None,
) -> Client:
    """The client that the connection's options describe; ValueError says what is wrong with them."""
    if (cert_file is None) != (key_file is None):
        raise ValueError("--cert-file and --key-file come together: give both or none")
    return Client(
        address,
        token=token,
        tenant=tenant,
        tls=tls,
        root_certificates=_content(ca_file),
        certificate_chain=_content(cert_file),
        private_key=_content(key_file),
        timeout=timeout,
    )


def connected(verb: Callable[Concatenate[Client, Arguments], None]) -> Callable[..., None]:
    """The verb as a command: its first parameter, the client, is replaced by the options of `open_client`."""
    own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
    shared = list(inspect.signature(open_client, eval_str=True).parameters.values())

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        options = {parameter.name: given.pop(parameter.name) for parameter in shared}
        try:
            with open_client(**options) as client:
                verb(client, **given)  # type: ignore[call-arg]
        except ShopLMClientError as error:
            typer.echo(f"shoplm: {_advice(error, options['address'])}", err=True)
            raise typer.Exit(EXIT_CODES.get(type(error), 1)) from error
        except ValueError as error:
            typer.echo(f"shoplm: {_one_line(str(error))}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *shared)]
    # typer reads both; functools.wraps would leave those of the verb.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del command.__wrapped__
    return command


def _content(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _advice(error: ShopLMClientError, address: str) -> str:
    """What went wrong and what to do, in one line."""
    text = _one_line(error.message)
    if isinstance(error, UnavailableError):
        return f"no server answers at {address}; start one with `shoplm serve` or set --address ({text})"
    if isinstance(error, OverloadedError):
        if error.retry_seconds is None:
            return f"the server refuses: {text}; allow more with --timeout SECONDS, or ask for less"
        return f"the server is busy: {text}; try again in {error.retry_seconds:.2g} s"
    if isinstance(error, DeadlineExceededError):
        return f"no answer in time from {address}; allow more with --timeout SECONDS"
    if isinstance(error, UnauthenticatedError):
        return f"the server refused the token: {text}; set --token or SHOPLM_TOKEN"
    if isinstance(error, PermissionDeniedError):
        return f"the token does not allow this: {text}; set another with --token or SHOPLM_TOKEN"
    if isinstance(error, NotServingError):
        return f"the server does not offer this: {text}; `shoplm model` shows what it serves"
    if isinstance(error, InvalidArgumentError):
        return f"the request is wrong: {text}"
    return f"the server failed: {text}; its log has request {error.request_id}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
