"""The asyncio client: the same methods as the blocking one, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from shoplm.client import requests, responses
from shoplm.client.channel import DEFAULT_ADDRESS, Connection, Timeouts, check_timeout, new_request_id
from shoplm.client.errors import UnavailableError, error_from_rpc
from shoplm.client.types import (
    ChatSummary,
    Customer,
    ItemFilter,
    Message,
    ModelInfo,
    Predictions,
    Ranking,
    Recommendations,
    Target,
)
from shoplm.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    prediction_pb2_grpc,
    recommendation_pb2_grpc,
)

Answer = TypeVar("Answer")


class AsyncChatStream(AsyncIterator[str]):
    """A chat answer while it arrives: `async for` over its text, then read `summary`.

    Leaving the `async with` block, `cancel()`, or cancelling the task ends the call on the server within one step.
    """

    def __init__(self, call: Any, request_id: str) -> None:
        self._call = call  # a grpc.aio.UnaryStreamCall of chat_pb2.ChatResponse
        self._events: AsyncIterator[chat_pb2.ChatResponse] = aiter(call)
        self._summary: ChatSummary | None = None
        self.request_id = request_id

    async def __anext__(self) -> str:
        while True:
            try:
                event = await anext(self._events)
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error, request_id=self.request_id) from error
            if event.HasField("summary"):
                self._summary = responses.chat_summary(event.summary)
            elif event.delta:
                return event.delta

    async def text(self) -> str:
        """The rest of the answer as one string, waiting for its end."""
        return "".join([delta async for delta in self])

    @property
    def summary(self) -> ChatSummary:
        """Finish reason, usage and citations; RuntimeError before the iteration has ended."""
        if self._summary is None:
            raise RuntimeError("the answer has not ended yet: iterate to its end, or await text(), before summary")
        return self._summary

    def cancel(self) -> None:
        """Stop the answer; no effect when it has ended."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """Asyncio calls to a ShopLM server; belongs to one event loop. Close it, or use it in an `async with` block.

    `timeout` is a deadline in seconds for every call, or `Timeouts` per service; each method takes its own too.
    Methods raise `ShopLMClientError` (see `shoplm.client.errors`); cancelling the task cancels the call.

        async with AsyncClient("127.0.0.1:50051") as client:
            answer = await client.recommend(customer="7", count=5)
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        timeout: float | Timeouts | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
        retries: bool = True,
        round_robin: bool = False,
    ) -> None:
        self._connection = Connection(address, token, tls, root_certificates, retries, round_robin)
        self.timeouts = Timeouts.of(timeout)
        self._opened: grpc.aio.Channel | None = None

    @property
    def _channel(self) -> grpc.aio.Channel:
        # Opened by the first call, so that a client may be made before the event loop that it is used in.
        if self._opened is None:
            self._opened = self._connection.open_aio()
        return self._opened

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
    ) -> Recommendations:
        """The best items for a customer that pass the filter, best first. None leaves the server's default."""
        request = requests.recommend_request(customer, count, filter, beam_width, explain, allow_degraded)
        method = recommendation_pb2_grpc.RecommendationServiceStub(self._channel).Recommend
        seconds = self.timeouts.recommendation_seconds
        return responses.recommendations(await self._call(method, request, timeout, seconds, request_id))

    async def rank(
        self,
        customer: str | Customer,
        item_ids: Sequence[str],
        *,
        explain: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109
        request_id: str | None = None,
    ) -> Ranking:
        """The given items with their scores for a customer, best first."""
        request = requests.rank_request(customer, item_ids, explain)
        method = recommendation_pb2_grpc.RecommendationServiceStub(self._channel).Rank
        seconds = self.timeouts.recommendation_seconds
        return responses.ranking(await self._call(method, request, timeout, seconds, request_id))

    async def predict(
        self,
        customer: str | Customer,
        targets: Sequence[Target] = (),
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        request_id: str | None = None,
    ) -> Predictions:
        """One prediction for each target, in their order; no targets means all that the bundle has."""
        request = requests.predict_request(customer, targets)
        method = prediction_pb2_grpc.PredictionServiceStub(self._channel).Predict
        seconds = self.timeouts.prediction_seconds
        return responses.predictions(await self._call(method, request, timeout, seconds, request_id))

    async def get_model(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        request_id: str | None = None,
    ) -> ModelInfo:
        """Bundle, base model, limits, targets and demo customers of the server."""
        method = model_pb2_grpc.ModelServiceStub(self._channel).GetModel
        request = model_pb2.GetModelRequest()
        return responses.model_info(await self._call(method, request, timeout, self.timeouts.model_seconds, request_id))

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
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> AsyncChatStream:
        """The assistant's next turn as a stream of text; a string is one user message, no customer is a visitor.

        Needs no `await`: `async for delta in client.chat("Hello")`. Temperature None or 0 is greedy; `grounding`
        None uses the shop's own texts where the bundle has some.
        """
        request = requests.chat_request(
            messages, customer, max_tokens, temperature, top_k, top_p, seed, stop, grounding
        )
        seconds, call_id = self._terms(timeout, self.timeouts.chat_seconds, request_id)
        stub = chat_pb2_grpc.ChatServiceStub(self._channel)
        call = stub.Chat(request, timeout=seconds, metadata=self._connection.metadata(call_id))
        return AsyncChatStream(call, call_id)

    async def wait_until_ready(self, timeout: float = 30.0) -> None:  # noqa: ASYNC109
        """Wait until the server accepts connections; UnavailableError if it does not within `timeout` seconds."""
        check_timeout("timeout", timeout)
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout)
        except TimeoutError as error:
            raise UnavailableError(
                f"no server accepted a connection at {self._connection.address} within {timeout:g} s",
                code=grpc.StatusCode.UNAVAILABLE,
            ) from error

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        if self._opened is not None:
            await self._opened.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _terms(self, timeout: float | None, default_seconds: float, request_id: str | None) -> tuple[float, str]:
        if timeout is not None:
            check_timeout("timeout", timeout)
        return default_seconds if timeout is None else timeout, request_id or new_request_id()

    async def _call(
        self,
        method: Callable[..., Awaitable[Answer]],
        request: object,
        seconds_given: float | None,
        default_seconds: float,
        request_id: str | None,
    ) -> Answer:
        seconds, call_id = self._terms(seconds_given, default_seconds, request_id)
        try:
            return await method(request, timeout=seconds, metadata=self._connection.metadata(call_id))
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, request_id=call_id) from error
