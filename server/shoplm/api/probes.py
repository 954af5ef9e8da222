"""HTTP for Prometheus and Kubernetes: /metrics, /healthz, /readyz. GET and HEAD, one request a connection.

On the event loop of the server, so that /healthz fails where it should: when that loop no longer runs.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from shoplm.address import address
from shoplm.errors import ConfigurationError, TransientError

_READ_SECONDS = 5.0  # to send the head of a request
_MAX_HEAD_BYTES = 16 * 1024
_LATER = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)  # what may be had at another time
_TEXT = "text/plain; charset=utf-8"


class ProbeServer:
    """Starts with `start`. `ready` says whether the server takes calls."""

    def __init__(self, registry: CollectorRegistry, ready: Callable[[], bool]) -> None:
        self._registry = registry
        self._ready = ready
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Returns the port. `::` is all addresses, those of IPv4 too. Raises ConfigurationError if it cannot be had,
        TransientError if it may be at another time."""
        try:
            if host == "::":
                both = socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
                self._server = await asyncio.start_server(self._serve, sock=both, limit=_MAX_HEAD_BYTES)
            else:
                self._server = await asyncio.start_server(self._serve, host, port, limit=_MAX_HEAD_BYTES)
        except OSError as error:
            raise (TransientError if error.errno in _LATER else ConfigurationError)(
                f"metrics cannot listen on {address(host, port)} ({error.strerror or error}); "
                "choose another --metrics-port or --metrics-host"
            ) from error
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
            status, kind, body = await self._answer(*_parse(head))
            is_head = head.startswith(b"HEAD ")
            writer.write(_response(status, kind, body, with_body=not is_head))
            await writer.drain()
        except asyncio.LimitOverrunError:
            writer.write(_response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TEXT, b"", with_body=True))
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass  # the peer has gone, or never was one
        finally:
            writer.close()

    async def _answer(self, method: str, path: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"only GET and HEAD\n"
        if path == "/metrics":
            encode, kind = choose_encoder(accept)
            return HTTPStatus.OK, kind, await asyncio.to_thread(encode, self._registry)
        if path == "/healthz":
            return HTTPStatus.OK, _TEXT, b"alive\n"
        if path == "/readyz":
            if self._ready():
                return HTTPStatus.OK, _TEXT, b"ready\n"
            return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"not ready\n"
        return HTTPStatus.NOT_FOUND, _TEXT, b"/metrics, /healthz and /readyz are here\n"


def _parse(head: bytes) -> tuple[str, str, str]:
    """(method, path without query, Accept header); empty method for what is no HTTP."""
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/"):
        return "", "", ""
    headers = (line.partition(":") for line in lines[1:] if line)
    accept = next((value.strip() for name, _, value in headers if name.strip().lower() == "accept"), "")
    return parts[0], parts[1].partition("?")[0], accept


def _response(status: HTTPStatus, kind: str, body: bytes, *, with_body: bool) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\nCache-Control: no-store\r\n\r\n"
    )
    return head.encode("latin-1") + (body if with_body else b"")
