"""The calls that wait for the engine, and what came for each of them."""

from __future__ import annotations

import asyncio

from shoplm.errors import (
    CancelledByCallerError,
    EngineFailureError,
    EngineUnavailableError,
    ExpiredError,
    InvalidRequestError,
    OverloadedError,
    ShopLMError,
)
from shoplm.request import CallOutput, FailedOutput, FailureKind, FinishedOutput, TokensOutput


class Call:
    """What came for one request and nobody has taken yet. Tokens add up; they come before the end."""

    __slots__ = ("_cached_tokens", "_end", "_loop", "_request_id", "_tokens", "_waiting")

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self._request_id = request_id
        self._loop = loop
        self._tokens: list[int] = []
        self._cached_tokens = 0
        self._end: FinishedOutput | FailedOutput | None = None
        self._waiting: asyncio.Future[None] | None = None

    def put(self, output: CallOutput) -> None:
        """Something came."""
        if isinstance(output, TokensOutput):
            self._tokens += output.tokens
            self._cached_tokens = output.cached_tokens
        else:
            self._end = output
        self._wake()

    def put_token(self, token: int) -> None:
        """A further token came."""
        self._tokens.append(token)
        self._wake()

    async def take(self) -> TokensOutput | FinishedOutput:
        """All tokens that are there, or the end; waits for either. Raises the ShopLMError of a request that failed."""
        if not self._tokens and self._end is None:
            self._waiting = self._loop.create_future()
            await self._waiting
        if self._tokens:
            tokens, self._tokens = self._tokens, []
            return TokensOutput(self._request_id, tuple(tokens), self._cached_tokens)
        assert self._end is not None
        if isinstance(self._end, FailedOutput):
            raise failure(self._end)
        return self._end

    @property
    def has_ended(self) -> bool:
        """The engine will say no more of it."""
        return self._end is not None

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def failure(output: FailedOutput) -> ShopLMError:
    """The exception for a request that the engine did not serve."""
    match output.kind:
        case FailureKind.OVERLOADED:
            return OverloadedError(output.message, reason=output.reason, retry_seconds=output.retry_seconds)
        case FailureKind.EXPIRED:
            return ExpiredError(output.message)
        case FailureKind.CANCELLED:
            return CancelledByCallerError(output.message)
        case FailureKind.INVALID:
            return InvalidRequestError(("request", output.message))
        case FailureKind.UNAVAILABLE:
            return EngineUnavailableError(output.message, retry_seconds=output.retry_seconds)
        case FailureKind.INTERNAL:
            return EngineFailureError(output.message)
