"""What happens around every call: request id, authentication, limits, parsing, metrics, logs and the final status.

A handler gets the request as bytes from gRPC and a parsed message from here, so that what cannot be parsed is answered
like any other bad input. Errors leave a service as exceptions and become a status in one place, here.

Methods are looked up here rather than registered with gRPC, which waits for a call of each registered method anew
whenever one of them is called.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import Message
from shoplm.api.caller import caller, read_caller
from shoplm.api.failed_calls import FailedCalls
from shoplm.api.methods import METHODS, Method
from shoplm.api.status import CallStatus, status_of
from shoplm.api.wire import parse
from shoplm.call_metrics import MethodCounts
from shoplm.errors import DrainingError, InvalidRequestError, OverloadedError, UnauthenticatedError
from shoplm.logs import request_id
from shoplm.metrics import Metrics

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_HEALTH = "/grpc.health.v1.Health/"
_RETRY_SECONDS = 1.0

log = logging.getLogger("shoplm.api")

Context = grpc.aio.ServicerContext[Any, Any]
Metadata: TypeAlias = "Iterable[tuple[str, str | bytes]]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Calls(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """The handlers of all methods: those of `METHODS` wrapped, others (reflection) guarded by authentication, except
    health. For generated code it is the server that it adds its servicer to."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        tokens: Sequence[str] = (),
        max_calls: int = 4096,
        max_message_bytes: int = 8 * 2**20,
        tenant_key: str = "",
    ) -> None:
        """`tenant_key` is the metadata key that holds the tenant; "": there are none."""
        self._metrics = metrics
        self._tokens = [token.encode() for token in tokens]
        self._max_calls = max_calls
        self._max_message_bytes = max_message_bytes
        self._tenant_key = tenant_key
        self._handlers: dict[str, Handler] = {}
        self._refusals: dict[str, Handler] = {}  # of calls without a token
        self._counts = {
            method: metrics.calls.method(method.label, method.grpc_type, method.grpc_service, method.name)
            for method in METHODS.values()
        }
        self._unauthenticated = FailedCalls("UNAUTHENTICATED")
        self._failed = {code: FailedCalls(code.name, level) for code, level in _LOG_LEVELS.items()}
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_arrival = 0.0  # monotonic seconds
        self._tasks: set[asyncio.Task[Any]] = set()  # of calls in flight
        self._cut: DrainingError | None = None  # what calls end with, once none may go on

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    async def idle(self) -> None:
        """Returns when no call is being served."""
        await self._idle.wait()

    async def quiet(self, seconds: float) -> None:
        """Returns when no call has arrived for this long although the event loop was free to take one."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(seconds)
            if self._last_arrival < before and time.monotonic() < before + 2 * seconds:
                return

    def cut(self, drain_seconds: float) -> None:
        """End the calls that are being served, and those to come, with an error that says why."""
        self._cut = DrainingError(
            f"the server is shutting down: calls that run after drain_seconds ({drain_seconds:g}) are ended",
            retry_seconds=_RETRY_SECONDS,
        )
        for task in self._tasks:
            task.cancel()

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Called by generated code, with the handlers of one service."""
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            method = METHODS.get(path)
            self._handlers[path] = handler if method is None else self._wrap(method, handler)
            self._refusals[path] = self._refusal(method)

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Called by generated code too; the handlers are known already."""

    def service(self, handler_call_details: Any) -> Handler | None:
        path: str = handler_call_details.method
        handler = self._handlers.get(path)
        if handler is None or not self._tokens or path.startswith(_HEALTH):
            return handler
        return handler if self._authorized(handler_call_details.invocation_metadata or ()) else self._refusals[path]

    def _wrap(self, method: Method, handler: Handler) -> Handler:
        counts = self._counts[method]
        if method.streams:
            stream: Callable[[Message, Context], AsyncIterator[Message]] = handler.unary_stream  # type: ignore[assignment]

            async def serve_stream(data: bytes, context: Context) -> None:
                async def body(call: _Call) -> None:
                    async with aclosing(stream(call.parse(data), context)) as responses:  # type: ignore[type-var]
                        async for response in responses:
                            await context.write(response)
                            call.sent()

                await self._serve(method, counts, context, body)

            return grpc.unary_stream_rpc_method_handler(serve_stream, None, handler.response_serializer)

        unary: Callable[[Message, Context], Awaitable[Message]] = handler.unary_unary  # type: ignore[assignment]

        async def serve_unary(data: bytes, context: Context) -> Message:
            async def body(call: _Call) -> Message:
                response = await unary(call.parse(data), context)
                call.sent()
                return response

            response: Message = await self._serve(method, counts, context, body)
            return response

        return grpc.unary_unary_rpc_method_handler(serve_unary, None, handler.response_serializer)

    def _refusal(self, method: Method | None) -> Handler:
        """The handler of calls without a valid token. It is of a kind for which gRPC reads no message before the
        handler asks for one, so a stranger's messages are not read."""
        error = UnauthenticatedError("send a valid token in the metadata: authorization: Bearer <token>")

        async def refuse(_: object, context: Context) -> None:
            # It is none of the calls in flight: strangers take nobody's place.
            identifier = _request_id(context.invocation_metadata() or ())
            request_id.set(identifier)
            self._unauthenticated.add(_loggable(error))
            if method is None:
                await _abort(context, status_of(error), identifier)
            else:
                call = _Call(self._metrics, method, self._counts[method], identifier, self._max_message_bytes)
                await self._fail(call, context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)

    async def _serve(
        self, method: Method, counts: MethodCounts, context: Context, body: Callable[[_Call], Awaitable[Any]]
    ) -> Any:
        """Run one call to its end. Aborts the context on any error."""
        metadata = context.invocation_metadata() or ()
        call = _Call(self._metrics, method, counts, _request_id(metadata), self._max_message_bytes)
        request_id.set(call.request_id)  # this task's own: gRPC gives every call a task
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._last_arrival = time.monotonic()
        self._idle.clear()
        try:
            self._admit(metadata)
            caller.set(read_caller(metadata, self._tenant_key))
            result = await body(call)
        except asyncio.CancelledError:
            if self._cut is not None:
                task.uncancel()
                await self._fail(call, context, self._cut)
            # gRPC cancels the task when the caller has gone and when the deadline passes.
            expired = has_expired(context.time_remaining(), call.seconds())
            call.end(grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            await self._fail(call, context, error)
        else:
            call.end(grpc.StatusCode.OK)
            return result
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()

    async def _fail(self, call: _Call, context: Context, error: Exception) -> NoReturn:
        status = status_of(error)
        call.end(status.code, status.reason, error)
        if (failed := self._failed.get(status.code)) is not None:
            failed.add(_loggable(error), service=call.method.label, method=call.method.name)
        await _abort(context, status, call.request_id)

    def _admit(self, metadata: Metadata) -> None:
        if self._cut is not None:
            raise self._cut
        if self.in_flight > self._max_calls:
            raise OverloadedError(
                f"{self._max_calls} calls are in flight, more are not taken (max_concurrent_calls)",
                reason="TOO_MANY_CALLS",
                retry_seconds=_RETRY_SECONDS,
            )

    def _authorized(self, metadata: Metadata) -> bool:
        given = next((value for key, value in metadata if key == "authorization"), "")
        scheme, _, token = (given if isinstance(given, bytes) else given.encode()).partition(b" ")
        sent = token.strip() if scheme.lower() == b"bearer" else b""  # RFC 7235: the scheme in any case
        # All are compared, in constant time: how long it takes says nothing about a token.
        return any([hmac.compare_digest(sent, token) for token in self._tokens])  # noqa: C419


class _Call:
    """Bookkeeping of one call."""

    def __init__(
        self,
        metrics: Metrics,
        method: Method,
        counts: MethodCounts,
        identifier: str,
        max_message_bytes: int,
    ) -> None:
        self._metrics = metrics
        self.method = method
        self._counts = counts
        self._max_message_bytes = max_message_bytes
        self._started = time.perf_counter()
        self.request_id = identifier
        counts.start()

    def parse(self, data: bytes) -> Message:
        self._counts.received += 1
        return parse(data, self.method.request, self._max_message_bytes)

    def sent(self) -> None:
        self._counts.sent += 1

    def seconds(self) -> float:
        """Since the call came."""
        return time.perf_counter() - self._started

    def end(self, code: grpc.StatusCode, reason: str = "", error: Exception | None = None) -> None:
        seconds = self.seconds()
        self._counts.end(code, seconds)
        if code is not grpc.StatusCode.OK:
            ended = "EXPIRED" if code is grpc.StatusCode.DEADLINE_EXCEEDED else "CANCELLED"
            self._metrics.refusals.labels(self.method.label, reason or ended).inc()
        self._log(code, seconds, error)

    def _log(self, code: grpc.StatusCode, seconds: float, error: Exception | None) -> None:
        level = logging.ERROR if code is grpc.StatusCode.INTERNAL else logging.DEBUG
        if not log.isEnabledFor(level):
            return
        fields = {"service": self.method.label, "method": self.method.name, "code": code.name}
        log.log(
            level,
            "call ended" if error is None else _loggable(error),
            extra={**fields, "seconds": round(seconds, 6)},
            exc_info=error if code is grpc.StatusCode.INTERNAL else None,
        )


def has_expired(remaining: float | None, elapsed: float) -> bool:
    """Whether it was the deadline that ended a call: `remaining` seconds before it (None: there is none), `elapsed`
    seconds after the call came.

    The caller keeps the same deadline, and its cancellation may be here before our own timer: by what the network took
    more for the request than for the cancellation, and by what gRPC rounds a deadline up for the wire, 1 % at most.
    """
    return remaining is not None and remaining <= 0.02 + 0.01 * (remaining + elapsed)


# Every call at INFO would cost more than serving some of them, and a line for each refusal under load would add to the
# load. The metrics count them; `FailedCalls` tells of these, and of calls without a token.
_LOG_LEVELS = {
    grpc.StatusCode.UNAVAILABLE: logging.WARNING,
    grpc.StatusCode.INVALID_ARGUMENT: logging.INFO,
    grpc.StatusCode.FAILED_PRECONDITION: logging.INFO,
}


def _loggable(error: Exception) -> str:
    """The error as it may be logged. Of a refused field only the path: its value may be somebody's data."""
    if isinstance(error, InvalidRequestError):
        return f"refused because of {', '.join(field for field, _ in error.violations)}"
    return str(error) or type(error).__name__


def _request_id(metadata: Metadata) -> str:
    """The caller's own, where it can go into a log line and a header as it is; else a new one."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return f"{random.getrandbits(64):016x}"


async def _abort(context: Context, status: CallStatus, identifier: str) -> NoReturn:
    await context.abort(status.code, status.message, status.trailers((REQUEST_ID_KEY, identifier)))
