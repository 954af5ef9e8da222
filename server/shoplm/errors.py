"""Every error that ShopLM raises on purpose.

    ShopLMError
    ├── InvalidRequestError      a field of a request is wrong      -> INVALID_ARGUMENT + BadRequest
    ├── UnauthenticatedError     no or a wrong token                -> UNAUTHENTICATED
    ├── NotServingError          this server has no such service    -> FAILED_PRECONDITION
    ├── ExpiredError             the deadline passed in the queue   -> DEADLINE_EXCEEDED
    ├── CancelledByCallerError   the caller has gone                -> CANCELLED
    ├── RetryableError           worth trying again                 -> + RetryInfo
    │   ├── OverloadedError      load, or a deadline out of reach   -> RESOURCE_EXHAUSTED
    │   ├── EngineUnavailableError  the engine died or is starting  -> UNAVAILABLE
    │   └── DrainingError        the server is shutting down        -> UNAVAILABLE
    ├── EngineFailureError       a step failed                      -> INTERNAL
    └── ConfigurationError       a setting, a bundle or a base model cannot be used; raised at start, never in a call
        ├── BundleError
        ├── BaseModelError
        └── TransientError       it failed, and the same start may succeed later
            └── BundleChangedError

The one table from these to gRPC status codes is in `shoplm.api.status`.
"""

from __future__ import annotations


class ShopLMError(Exception):
    """Base of all of them. `reason` is a stable UPPER_SNAKE code for machines."""

    reason = "INTERNAL"


class InvalidRequestError(ShopLMError):
    """One or more fields are wrong. `violations` holds (field path, what is wrong with which value)."""

    reason = "INVALID_REQUEST"

    def __init__(self, *violations: tuple[str, str]) -> None:
        if not violations:
            raise ValueError("InvalidRequestError needs at least one violation")
        self.violations = violations
        super().__init__("; ".join(f"{field}: {text}" for field, text in violations))


class UnauthenticatedError(ShopLMError):
    """The call carries no valid token."""

    reason = "UNAUTHENTICATED"


class NotServingError(ShopLMError):
    """The server does not offer this, for example recommendations without a bundle."""

    reason = "NOT_SERVING"


class RetryableError(ShopLMError):
    """Worth trying again after `retry_seconds`, and not at all where that is 0."""

    def __init__(self, message: str, *, retry_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class OverloadedError(RetryableError):
    """Refused because of load."""

    def __init__(self, message: str, *, reason: str = "OVERLOADED", retry_seconds: float = 1.0) -> None:
        super().__init__(message, retry_seconds=retry_seconds)
        self.reason = reason


class ExpiredError(ShopLMError):
    """The deadline passed before the work was done."""

    reason = "EXPIRED"


class CancelledByCallerError(ShopLMError):
    """The caller cancelled or disconnected."""

    reason = "CANCELLED"


class EngineUnavailableError(RetryableError):
    """The engine process died or is starting."""

    reason = "ENGINE_UNAVAILABLE"


class DrainingError(RetryableError):
    """The server takes no new calls before it stops; another one may."""

    reason = "DRAINING"


class EngineFailureError(ShopLMError):
    """A step raised; the message names the exception."""

    reason = "ENGINE_FAILURE"


class ConfigurationError(ShopLMError):
    """A setting, file or model cannot be used; the message says which value and what to do."""

    reason = "CONFIGURATION"


class BundleError(ConfigurationError):
    """A bundle is missing, damaged or made for another base model."""

    reason = "BUNDLE"


class BaseModelError(ConfigurationError):
    """A base model is missing, damaged or of an unsupported architecture."""

    reason = "BASE_MODEL"


class TransientError(ConfigurationError):
    """What a start needs is not there, and may be for the next one: a port, the network, memory for the engine."""

    reason = "TRANSIENT"


class BundleChangedError(TransientError):
    """The bundle on disk is another one than the server has read: a new start reads it."""

    reason = "BUNDLE_CHANGED"
