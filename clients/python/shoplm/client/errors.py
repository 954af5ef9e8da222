"""Every error that a call can raise.

    ShopLMClientError          base of all of them: `except ShopLMClientError` is enough
    ├── InvalidArgumentError   a field of the request is wrong; `violations` names it INVALID_ARGUMENT
    ├── UnauthenticatedError   no token, or a wrong one                               UNAUTHENTICATED
    ├── PermissionDeniedError  the token does not allow this                          PERMISSION_DENIED
    ├── NotServingError        this server does not offer the service                 UNIMPLEMENTED, FAILED_PRECONDITION
    ├── OverloadedError        refused for now; try again after `retry_seconds`       RESOURCE_EXHAUSTED
    ├── UnavailableError       no server there, or it is starting or draining         UNAVAILABLE
    ├── DeadlineExceededError  no answer within the timeout                           DEADLINE_EXCEEDED
    ├── CancelledError         the call was cancelled                                 CANCELLED
    └── ServerError            anything else: a fault of the server                   INTERNAL, UNKNOWN, ...

An argument that cannot be sent at all (a time without a time zone, a target of unknown kind) raises `ValueError` or
`TypeError` before anything goes over the wire.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request: its path (`customer.events[3].time`) and what is wrong with which value."""

    field: str
    description: str


class ShopLMClientError(Exception):
    """A call that failed.

    `code` is the gRPC status, `reason` a stable UPPER_SNAKE code where the server gave one, `retry_seconds` how long
    the server asks to wait, and `request_id` what to look for in the server's log.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        request_id: str = "",
        retry_seconds: float | None = None,
        violations: tuple[FieldViolation, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.retry_seconds = retry_seconds
        self.violations = violations


class InvalidArgumentError(ShopLMClientError):
    """The server refused a field of the request; sending it again cannot help."""


class UnauthenticatedError(ShopLMClientError):
    """The token is missing or wrong."""


class PermissionDeniedError(ShopLMClientError):
    """Whoever this token stands for may not do this; a gateway said so."""


class NotServingError(ShopLMClientError):
    """The server does not offer this service, for example recommendations without a bundle."""


class OverloadedError(ShopLMClientError):
    """The server refused the request to keep its promises to others; worth trying again after `retry_seconds`."""


class UnavailableError(ShopLMClientError):
    """No server could be reached, or it is starting, restarting or draining."""


class DeadlineExceededError(ShopLMClientError):
    """The answer did not come within the timeout."""


class CancelledError(ShopLMClientError):
    """The call was cancelled, here or by the server."""


class ServerError(ShopLMClientError):
    """The server failed; the request may be fine."""


_BY_CODE: dict[grpc.StatusCode, type[ShopLMClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: NotServingError,
    grpc.StatusCode.FAILED_PRECONDITION: NotServingError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
}


def error_from_status(
    code: grpc.StatusCode,
    message: str,
    trailing_metadata: Iterable[tuple[str, str | bytes]] = (),
    *,
    request_id: str = "",
) -> ShopLMClientError:
    """The exception for a finished call's status; `google.rpc` details are read from the trailing metadata."""
    reason, retry_seconds, violations = "", None, []
    for detail in _details(trailing_metadata):
        if isinstance(detail, error_details_pb2.BadRequest):
            violations += [FieldViolation(v.field, v.description) for v in detail.field_violations]
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_seconds = detail.retry_delay.seconds + detail.retry_delay.nanos * 1e-9
        elif isinstance(detail, error_details_pb2.ErrorInfo):
            reason = detail.reason
    return _BY_CODE.get(code, ServerError)(
        message or code.name,
        code=code,
        reason=reason,
        request_id=request_id,
        retry_seconds=retry_seconds,
        violations=tuple(violations),
    )


def error_from_rpc(error: grpc.RpcError, *, request_id: str = "") -> ShopLMClientError:
    """The exception for what grpc raised, from a blocking or an asyncio call."""
    call: Any = error  # every RpcError raised by a call is a grpc.Call or a grpc.aio.AioRpcError
    return error_from_status(
        call.code() or grpc.StatusCode.UNKNOWN,
        call.details() or "",
        call.trailing_metadata() or (),
        request_id=request_id,
    )


def _details(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> list[object]:
    """The known `google.rpc` messages of a status; what cannot be read is left out: the status itself still counts."""
    known = (error_details_pb2.BadRequest, error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo)
    found: list[object] = []
    for key, value in trailing_metadata:
        if key != _DETAILS_KEY or isinstance(value, str):
            continue
        try:
            status = status_pb2.Status.FromString(value)
            for packed in status.details:
                for kind in known:
                    message = kind()
                    if packed.Unpack(message):
                        found.append(message)
        except DecodeError:
            continue
    return found
