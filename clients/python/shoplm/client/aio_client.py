"""The asyncio client: the same methods as the blocking one, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from shoplm.client import requests, responses
from shoplm.client.base import ChatStreamBase, ClientBase, Stubs
from shoplm.client.channel import check_timeout
from shoplm.client.errors import CancelledError, error_from_rpc
from shoplm.client.types import (
    Customer,
    ItemFilter,
    Message,
    ModelInfo,
    Predictions,
    Ranking,
    Recommendations,
    Target,
)
from shoplm.v1 import chat_pb2, model_pb2

Answer = TypeVar("Answer")


class AsyncChatStream(ChatStreamBase, AsyncIterator[str]):
    """A chat answer while it arrives: `async for` over its text, then read `summary`.

    Leaving the `async with` block, `cancel()`, or cancelling the task ends the call on the server within one step.
    """

    def __init__(self, call: Any, request_id: str) -> None:
        super().__init__(call, request_id)
        self._events: AsyncIterator[chat_pb2.ChatResponse] = aiter(call)

    async def __anext__(self) -> str:
        while True:
            try:
                event = await anext(self._events)
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error, request_id=self.request_id) from error
            except asyncio.CancelledError as error:
                if _task_is_cancelled():
                    raise
                raise _cancelled(self.request_id) from error
            if delta := self._take(event):
                return delta

    async def text(self) -> str:
        """The rest of the answer as one string, waiting for its end."""
        return "".join([delta async for delta in self])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient(ClientBase):
    """Asyncio calls to a ShopLM server; belongs to one event loop. Close it, or use it in an `async with` block.

    `timeout` is a deadline in seconds for every call, or `Timeouts` per service; each method takes its own too.
    A call's `priority` is from -100 to 100: larger is sooner, among the calls of one tenant.
    Methods raise `ShopLMClientError` (see `shoplm.client.errors`); cancelling the task cancels the call.

        async with AsyncClient("127.0.0.1:50051") as client:
            answer = await client.recommend(customer="7", count=5)
    """

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        # Opened by the first call, so that a client may be made before the event loop that it is used in.
        return self._connection.open_aio()

    @cached_property
    def _stubs(self) -> Stubs:
        return Stubs(self._channel)

    async def recommend(
        self,
        customer: str | Customer,
        *,
        count: int | None = None,
        filter: ItemFilter | None = None,
        beam_width: int | None = None,
        explain: bool = False,
        allow_degraded: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 (a gRPC deadline, which the server sees)
        request_id: str | None = None,
        priority: int | None = None,
    ) -> Recommendations:
        """The best items for a customer that pass the filter, best first. None leaves the server's default."""
        request = requests.recommend_request(customer, count, filter, beam_width, explain, allow_degraded)
        seconds = self.timeouts.recommendation_seconds
        return responses.recommendations(
            await self._call(self._stubs.recommend, request, timeout, seconds, request_id, priority)
        )

    async def rank(
        self,
        customer: str | Customer,
        item_ids: Sequence[str],
        *,
        explain: bool = False,
        allow_degraded: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109
        request_id: str | None = None,
        priority: int | None = None,
    ) -> Ranking:
        """The given items with their scores for a customer, best first.

        `explain` says what moved each; `allow_degraded` lets the server leave that out rather than refuse."""
        request = requests.rank_request(customer, item_ids, explain, allow_degraded)
        seconds = self.timeouts.recommendation_seconds
        return responses.ranking(await self._call(self._stubs.rank, request, timeout, seconds, request_id, priority))

    async def predict(
        self,
        customer: str | Customer,
        targets: Sequence[Target] = (),
        *,
        explain: bool = False,
        allow_degraded: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109
        request_id: str | None = None,
        priority: int | None = None,
    ) -> Predictions:
        """One prediction for each target, in their order; no targets means all that the bundle has.

        `explain` says what moved each; `allow_degraded` lets the server leave that out rather than refuse."""
        request = requests.predict_request(customer, targets, explain, allow_degraded)
        seconds = self.timeouts.prediction_seconds
        return responses.predictions(
            await self._call(self._stubs.predict, request, timeout, seconds, request_id, priority)
        )

    async def get_model(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        request_id: str | None = None,
    ) -> ModelInfo:
        """Bundle, base model, limits, targets and demo customers of the server."""
        request = model_pb2.GetModelRequest()
        return responses.model_info(
            await self._call(self._stubs.get_model, request, timeout, self.timeouts.model_seconds, request_id)
        )

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        customer: str | Customer | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        grounding: bool | None = None,
        allow_degraded: bool = False,
        timeout: float | None = None,
        request_id: str | None = None,
        priority: int | None = None,
    ) -> AsyncChatStream:
        """The assistant's next turn as a stream of text; a string is one user message, no customer is a visitor.

        Needs no `await`: `async for delta in client.chat("Hello")`. Temperature None or 0 is greedy. `grounding` None
        uses the shop's own texts, items named in the question and the customer's purchases where the server has a
        bundle; False does not. `allow_degraded` lets the server shorten the answer rather than refuse it; the summary
        says so.
        """
        request = requests.chat_request(
            messages, customer, max_tokens, temperature, top_k, top_p, seed, stop, grounding, allow_degraded
        )
        terms = self._terms(timeout, self.timeouts.chat_seconds, request_id, priority)
        call = self._stubs.chat(request, **terms.keywords)
        return AsyncChatStream(call, terms.request_id)

    async def wait_until_ready(self, timeout: float = 30.0) -> None:  # noqa: ASYNC109
        """Wait until the server accepts connections; UnavailableError if it does not within `timeout` seconds."""
        check_timeout("timeout", timeout)
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout)
        except TimeoutError as error:
            raise self._nobody_there(timeout) from error

    async def close(self) -> None:
        """Close the connection; running calls are cancelled, and further ones raise ValueError."""
        self._is_closed = True
        if "_channel" in self.__dict__:
            await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(
        self,
        method: Callable[..., Awaitable[Answer]],
        request: object,
        timeout: float | None,  # noqa: ASYNC109
        default_seconds: float,
        request_id: str | None,
        priority: int | None = None,
    ) -> Answer:
        terms = self._terms(timeout, default_seconds, request_id, priority)
        try:
            return await method(request, **terms.keywords)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, request_id=terms.request_id) from error
        except asyncio.CancelledError as error:
            if _task_is_cancelled():
                raise
            raise _cancelled(terms.request_id) from error


def _task_is_cancelled() -> bool:
    """Whether it is the task that is being cancelled. grpc raises the same error for a call that `cancel()`, or closing
    the client, has ended."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _cancelled(request_id: str) -> CancelledError:
    return CancelledError("the call was cancelled", code=grpc.StatusCode.CANCELLED, request_id=request_id)
