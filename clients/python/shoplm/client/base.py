"""What the blocking and the asyncio client share: settings, stubs, the terms of a call, and the state of a chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from shoplm.client import responses
from shoplm.client.channel import (
    DEFAULT_ADDRESS,
    Connection,
    Timeouts,
    check_priority,
    check_request_id,
    check_timeout,
    new_request_id,
)
from shoplm.client.errors import UnavailableError
from shoplm.client.types import ChatSummary
from shoplm.v1 import chat_pb2, chat_pb2_grpc, model_pb2_grpc, prediction_pb2_grpc, recommendation_pb2_grpc


@dataclass(frozen=True, slots=True)
class Terms:
    """Under which a call is made. `keywords` are gRPC's own."""

    seconds: float
    request_id: str
    metadata: tuple[tuple[str, str], ...]

    @property
    def keywords(self) -> dict[str, Any]:
        return {"timeout": self.seconds, "metadata": self.metadata}


class Stubs:
    """The methods of all services on one channel, blocking or asyncio as the channel is."""

    def __init__(self, channel: Any) -> None:
        recommendation: Any = recommendation_pb2_grpc.RecommendationServiceStub(channel)
        prediction: Any = prediction_pb2_grpc.PredictionServiceStub(channel)
        model: Any = model_pb2_grpc.ModelServiceStub(channel)
        chat: Any = chat_pb2_grpc.ChatServiceStub(channel)
        self.recommend, self.rank = recommendation.Recommend, recommendation.Rank
        self.predict, self.get_model, self.chat = prediction.Predict, model.GetModel, chat.Chat


class ClientBase:
    """Settings of a client and of its calls."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tenant: str | None = None,
        timeout: float | Timeouts | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
        certificate_chain: bytes | None = None,
        private_key: bytes | None = None,
        retries: bool = True,
        round_robin: bool = False,
        health_checks: bool = True,
    ) -> None:
        self._connection = Connection(
            address,
            token=token,
            tenant=tenant,
            tls=tls,
            root_certificates=root_certificates,
            certificate_chain=certificate_chain,
            private_key=private_key,
            retries=retries,
            round_robin=round_robin,
            health_checks=health_checks,
        )
        self.timeouts = Timeouts.of(timeout)
        self._is_closed = False
        self._open()

    def _open(self) -> None:
        """Open what can be opened now."""

    def _terms(
        self, timeout: float | None, default_seconds: float, request_id: str | None, priority: int | None
    ) -> Terms:
        if self._is_closed:
            raise ValueError("the client is closed")
        if timeout is not None:
            check_timeout("timeout", timeout)
        if priority is not None:
            check_priority(priority)
        if request_id is not None:
            check_request_id(request_id)
        call_id = request_id or new_request_id()
        seconds = default_seconds if timeout is None else timeout
        return Terms(seconds, call_id, self._connection.metadata(call_id, priority))

    def _nobody_there(self, seconds: float) -> UnavailableError:
        return UnavailableError(
            f"no server accepted a connection at {self._connection.address} within {seconds:g} s",
            code=grpc.StatusCode.UNAVAILABLE,
        )


class ChatStreamBase:
    """A chat answer while it arrives."""

    def __init__(self, call: Any, request_id: str) -> None:
        self._call = call  # yields chat_pb2.ChatResponse
        self._summary: ChatSummary | None = None
        self.request_id = request_id

    def _take(self, event: chat_pb2.ChatResponse) -> str:
        """The text of a message; "" of the last one, which is kept as the summary."""
        if event.HasField("summary"):
            self._summary = responses.chat_summary(event.summary)
        return event.delta

    @property
    def summary(self) -> ChatSummary:
        """Finish reason, usage and citations; RuntimeError before the iteration has ended."""
        if self._summary is None:
            raise RuntimeError("the answer has not ended yet: iterate to its end, or take text(), before summary")
        return self._summary

    def cancel(self) -> None:
        """Stop the answer; no effect when it has ended."""
        self._call.cancel()
