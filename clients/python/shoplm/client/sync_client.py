"""The blocking client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc
from shoplm.client import requests, responses
from shoplm.client.base import ChatStreamBase, ClientBase, Stubs
from shoplm.client.channel import check_timeout
from shoplm.client.errors import error_from_rpc
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


class ChatStream(ChatStreamBase, Iterator[str]):
    """A chat answer while it arrives: iterate over its text, then read `summary`.

    Leaving the `with` block, or `cancel()`, ends the call on the server within one step. Errors of the call
    (`ShopLMClientError`) are raised by the iteration.
    """

    def __next__(self) -> str:
        while True:
            try:
                event: chat_pb2.ChatResponse = next(self._call)
            except grpc.RpcError as error:
                raise error_from_rpc(error, request_id=self.request_id) from error
            if delta := self._take(event):
                return delta

    def text(self) -> str:
        """The rest of the answer as one string, waiting for its end."""
        return "".join(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client(ClientBase):
    """Blocking calls to a ShopLM server; safe to share between threads. Close it, or use it in a `with` block.

    `timeout` is a deadline in seconds for every call, or `Timeouts` per service; each method takes its own too.
    A call's `priority` is from -100 to 100: larger is sooner, among the calls of one tenant.
    Methods raise `ShopLMClientError` (see `shoplm.client.errors`).

        with Client("127.0.0.1:50051") as client:
            for item in client.recommend(customer="7", count=5).items:
                print(item.title)
    """

    def _open(self) -> None:
        self._channel = self._connection.open()
        self._stubs = Stubs(self._channel)

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
        priority: int | None = None,
    ) -> Recommendations:
        """The best items for a customer that pass the filter, best first. None leaves the server's default."""
        request = requests.recommend_request(customer, count, filter, beam_width, explain, allow_degraded)
        seconds = self.timeouts.recommendation_seconds
        return responses.recommendations(
            self._call(self._stubs.recommend, request, timeout, seconds, request_id, priority)
        )

    def rank(
        self,
        customer: str | Customer,
        item_ids: Sequence[str],
        *,
        explain: bool = False,
        allow_degraded: bool = False,
        timeout: float | None = None,
        request_id: str | None = None,
        priority: int | None = None,
    ) -> Ranking:
        """The given items with their scores for a customer, best first.

        `explain` says what moved each; `allow_degraded` lets the server leave that out rather than refuse."""
        request = requests.rank_request(customer, item_ids, explain, allow_degraded)
        seconds = self.timeouts.recommendation_seconds
        return responses.ranking(self._call(self._stubs.rank, request, timeout, seconds, request_id, priority))

    def predict(
        self,
        customer: str | Customer,
        targets: Sequence[Target] = (),
        *,
        explain: bool = False,
        allow_degraded: bool = False,
        timeout: float | None = None,
        request_id: str | None = None,
        priority: int | None = None,
    ) -> Predictions:
        """One prediction for each target, in their order; no targets means all that the bundle has.

        `explain` says what moved each; `allow_degraded` lets the server leave that out rather than refuse."""
        request = requests.predict_request(customer, targets, explain, allow_degraded)
        seconds = self.timeouts.prediction_seconds
        return responses.predictions(self._call(self._stubs.predict, request, timeout, seconds, request_id, priority))

    def get_model(self, *, timeout: float | None = None, request_id: str | None = None) -> ModelInfo:
        """Bundle, base model, limits, targets and demo customers of the server."""
        request = model_pb2.GetModelRequest()
        seconds = self.timeouts.model_seconds
        return responses.model_info(self._call(self._stubs.get_model, request, timeout, seconds, request_id))

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
    ) -> ChatStream:
        """The assistant's next turn as a stream of text; a string is one user message, no customer is a visitor.

        Temperature None or 0 is greedy. `grounding` None uses the shop's own texts, items named in the question and
        the customer's purchases where the server has a bundle; False does not. `allow_degraded` lets the server
        shorten the answer rather than refuse it; the summary says so.
        """
        request = requests.chat_request(
            messages, customer, max_tokens, temperature, top_k, top_p, seed, stop, grounding, allow_degraded
        )
        terms = self._terms(timeout, self.timeouts.chat_seconds, request_id, priority)
        call = self._stubs.chat(request, **terms.keywords)
        return ChatStream(call, terms.request_id)

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Block until the server accepts connections; UnavailableError if it does not within `timeout` seconds."""
        check_timeout("timeout", timeout)
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout)
        except grpc.FutureTimeoutError as error:
            raise self._nobody_there(timeout) from error

    def close(self) -> None:
        """Close the connection; running calls are cancelled, and further ones raise ValueError."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(
        self,
        method: Callable[..., Answer],
        request: object,
        timeout: float | None,
        default_seconds: float,
        request_id: str | None,
        priority: int | None = None,
    ) -> Answer:
        terms = self._terms(timeout, default_seconds, request_id, priority)
        try:
            return method(request, **terms.keywords)
        except grpc.RpcError as error:
            raise error_from_rpc(error, request_id=terms.request_id) from error
