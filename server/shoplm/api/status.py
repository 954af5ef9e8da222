"""The one table from ShopLM's errors to gRPC status, with `google.rpc` details.

Every error carries an ErrorInfo (domain `shoplm`, a stable UPPER_SNAKE reason); INVALID_ARGUMENT a BadRequest with one
violation per field; what is worth trying again a RetryInfo.

The same advice goes out as `grpc-retry-pushback-ms`, which gRPC's own retries obey without the caller's help; a
negative one stops them (gRFC A6).
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from shoplm.errors import (
    CancelledByCallerError,
    DrainingError,
    EngineFailureError,
    EngineUnavailableError,
    ExpiredError,
    InvalidRequestError,
    NotServingError,
    OverloadedError,
    RetryableError,
    ShopLMError,
    UnauthenticatedError,
)

DOMAIN = "shoplm"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# The message goes out twice and the details in base64: in all well below 8 KiB of headers, the most that Java's clients
# take. More than that is an INTERNAL error without a word to them.
MAX_MESSAGE_CHARACTERS = 1024
MAX_VIOLATIONS_BYTES = 2560

CODES: dict[type[ShopLMError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    NotServingError: grpc.StatusCode.FAILED_PRECONDITION,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ExpiredError: grpc.StatusCode.DEADLINE_EXCEEDED,
    CancelledByCallerError: grpc.StatusCode.CANCELLED,
    EngineUnavailableError: grpc.StatusCode.UNAVAILABLE,
    DrainingError: grpc.StatusCode.UNAVAILABLE,
    EngineFailureError: grpc.StatusCode.INTERNAL,
}


@dataclass(frozen=True, slots=True)
class CallStatus:
    """How a call ends that was not served."""

    code: grpc.StatusCode
    message: str
    reason: str
    details: bytes  # serialised google.rpc.Status
    retry_seconds: float | None = None  # 0: trying again is no use; None: nothing is said of it

    def trailers(self, *more: tuple[str, str]) -> tuple[tuple[str, str | bytes], ...]:
        """Trailing metadata of the call that ends like this."""
        trailers: list[tuple[str, str | bytes]] = [*more, (DETAILS_KEY, self.details)]
        if self.retry_seconds is not None:
            pushback = max(round(self.retry_seconds * 1000), 1) if self.retry_seconds > 0 else -1
            trailers.append((PUSHBACK_KEY, str(pushback)))
        return tuple(trailers)


def status_of(error: BaseException) -> CallStatus:
    """Status of any error. What we did not raise on purpose is INTERNAL, and its text stays in the server's log."""
    if not isinstance(error, ShopLMError):
        return _status(grpc.StatusCode.INTERNAL, "an internal error; the server's log has it under the request id")
    code = next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), grpc.StatusCode.INTERNAL)
    details: list[Message] = []
    if isinstance(error, InvalidRequestError):
        details.append(_bad_request(error))
    retry_seconds = None
    if isinstance(error, RetryableError):
        retry_seconds = max(error.retry_seconds, 0.0)
        if retry_seconds:
            delay = Duration()
            delay.FromNanoseconds(round(retry_seconds * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return _status(code, str(error), error.reason, details, retry_seconds)


def _bad_request(error: InvalidRequestError) -> error_details_pb2.BadRequest:
    """The violations that fit; the first always does."""
    detail = error_details_pb2.BadRequest()
    for field, text in error.violations:
        if detail.field_violations and detail.ByteSize() + len(field) + len(text) > MAX_VIOLATIONS_BYTES:
            break
        detail.field_violations.add(field=field, description=text)
    return detail


def _status(
    code: grpc.StatusCode,
    message: str,
    reason: str = "INTERNAL",
    details: list[Message] | None = None,
    retry_seconds: float | None = None,
) -> CallStatus:
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = f"{message[:MAX_MESSAGE_CHARACTERS]}…"
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=message)
    for detail in (error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN), *(details or ())):
        status.details.add().Pack(detail)
    return CallStatus(code, message, reason, status.SerializeToString(), retry_seconds)
