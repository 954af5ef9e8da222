"""The blocking client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


class ChatStream(Iterator[str]):
    """A chat answer while it arrives: iterate over its text, then read `summary`.

    Leaving the `with` block, or `cancel()`, ends the call on the server within one step. Errors of the call
    (`ShopLMClientError`) are raised by the iteration.
    """

    def __init__(self, call: Any, request_id: str) -> None:
        self._call = call  # a grpc.Call that iterates over chat_pb2.ChatResponse
        self._summary: ChatSummary | None = None
        self.request_id = request_id

    def __next__(self) -> str:
        while True:
            try:
                event: chat_pb2.ChatResponse = next(self._call)
            except grpc.RpcError as error:
                raise error_from_rpc(error, request_id=self.request_id) from error
            if event.HasField("summary"):
                self._summary = responses.chat_summary(event.summary)
            elif event.delta:
                return event.delta

    def text(self) -> str:
        """The rest of the answer as one string, waiting for its end."""
        return "".join(self)

    @property
    def summary(self) -> ChatSummary:
        """Finish reason, usage and citations; RuntimeError before the iteration has ended."""
        if self._summary is None:
            raise RuntimeError("the answer has not ended yet: iterate to its end, or call text(), before summary")
        return self._summary

    def cancel(self) -> None:
        """Stop the answer; no effect when it has ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """Blocking calls to a ShopLM server; safe to share between threads. Close it, or use it in a `with` block.

    `timeout` is a deadline in seconds for every call, or `Timeouts` per service; each method takes its own too.
    Methods raise `ShopLMClientError` (see `shoplm.client.errors`).

        with Client("127.0.0.1:50051") as client:
            for item in client.recommend(customer="7", count=5).items:
                print(item.title)
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
        self._channel = self._connection.open()
        self._recommendation = recommendation_pb2_grpc.RecommendationServiceStub(self._channel)
        self._chat = chat_pb2_grpc.ChatServiceStub(self._channel)
        self._prediction = prediction_pb2_grpc.PredictionServiceStub(self._channel)
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)

    def recommend(
        self,
        customer: str | Customer,
        *,
        count: int | None = None,
        filter: ItemFilter | None = None,
        beam_width: int | None = None,
        explain: bool = False,
        allow_degraded: bool = False,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Recommendations:
        """The best items for a customer that pass the filter, best first. None leaves the server's default."""
        request = requests.recommend_request(customer, count, filter, beam_width, explain, allow_degraded)
        seconds = self.timeouts.recommendation_seconds
        return responses.recommendations(
            self._call(self._recommendation.Recommend, request, timeout, seconds, request_id)
        )

    def rank(
        self,
        customer: str | Customer,
        item_ids: Sequence[str],
        *,
        explain: bool = False,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Ranking:
        """The given items with their scores for a customer, best first."""
        request = requests.rank_request(customer, item_ids, explain)
        seconds = self.timeouts.recommendation_seconds
        return responses.ranking(self._call(self._recommendation.Rank, request, timeout, seconds, request_id))

    def predict(
        self,
        customer: str | Customer,
        targets: Sequence[Target] = (),
        *,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Predictions:
        """One prediction for each target, in their order; no targets means all that the bundle has."""
        request = requests.predict_request(customer, targets)
        seconds = self.timeouts.prediction_seconds
        return responses.predictions(self._call(self._prediction.Predict, request, timeout, seconds, request_id))

    def get_model(self, *, timeout: float | None = None, request_id: str | None = None) -> ModelInfo:
        """Bundle, base model, limits, targets and demo customers of the server."""
        request = model_pb2.GetModelRequest()
        seconds = self.timeouts.model_seconds
        return responses.model_info(self._call(self._model.GetModel, request, timeout, seconds, request_id))

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
    ) -> ChatStream:
        """The assistant's next turn as a stream of text; a string is one user message, no customer is a visitor.

        Temperature None or 0 is greedy; `grounding` None uses the shop's own texts where the bundle has some.
        """
        request = requests.chat_request(
            messages, customer, max_tokens, temperature, top_k, top_p, seed, stop, grounding
        )
        seconds, call_id = self._terms(timeout, self.timeouts.chat_seconds, request_id)
        call = self._chat.Chat(request, timeout=seconds, metadata=self._connection.metadata(call_id))
        return ChatStream(call, call_id)

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Block until the server accepts connections; UnavailableError if it does not within `timeout` seconds."""
        check_timeout("timeout", timeout)
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout)
        except grpc.FutureTimeoutError as error:
            raise UnavailableError(
                f"no server accepted a connection at {self._connection.address} within {timeout:g} s",
                code=grpc.StatusCode.UNAVAILABLE,
            ) from error

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _terms(self, timeout: float | None, default_seconds: float, request_id: str | None) -> tuple[float, str]:
        if timeout is not None:
            check_timeout("timeout", timeout)
        return default_seconds if timeout is None else timeout, request_id or new_request_id()

    def _call(
        self,
        method: Callable[..., Answer],
        request: object,
        timeout: float | None,
        default_seconds: float,
        request_id: str | None,
    ) -> Answer:
        seconds, call_id = self._terms(timeout, default_seconds, request_id)
        try:
            return method(request, timeout=seconds, metadata=self._connection.metadata(call_id))
        except grpc.RpcError as error:
            raise error_from_rpc(error, request_id=call_id) from error
