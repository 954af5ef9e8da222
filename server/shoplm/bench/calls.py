"""One call of the load, and when its parts arrived."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from shoplm.request import Service
from shoplm.v1 import (
    chat_pb2_grpc,
    prediction_pb2_grpc,
    recommendation_pb2_grpc,
)

_REFUSED = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}


@dataclass(slots=True)
class Outcome:
    """What became of one request. Moments are `time.perf_counter()` seconds; filled by `perform` and the load."""

    service: Service
    measured: bool
    intended: float
    sent: float = 0.0
    first: float | None = None  # of chat: the first text
    end: float = 0.0
    gaps: tuple[float, ...] = ()  # of chat: seconds between two pieces of text
    code: grpc.StatusCode = grpc.StatusCode.OK
    message: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    degraded: bool = False

    @property
    def completed(self) -> bool:
        return self.code is grpc.StatusCode.OK

    @property
    def refused(self) -> bool:
        return self.code in _REFUSED

    @property
    def expired(self) -> bool:
        return self.code is grpc.StatusCode.DEADLINE_EXCEEDED

    @property
    def latency(self) -> float:
        """Seconds from the intended send time to the end."""
        return self.end - self.intended


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel without retries: a retry would hide a refusal from the count."""
    return grpc.aio.insecure_channel(address, [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)])


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call with a token."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


class Caller:
    """Performs calls on one channel."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self._metadata = metadata
        self._unary: Mapping[Service, Any] = {
            Service.RECOMMENDATION: recommendation_pb2_grpc.RecommendationServiceStub(channel).Recommend,
            Service.PREDICTION: prediction_pb2_grpc.PredictionServiceStub(channel).Predict,
        }
        self._chat: Any = chat_pb2_grpc.ChatServiceStub(channel).Chat

    async def perform(self, request: Any, outcome: Outcome, deadline_seconds: float) -> None:
        """Send `request` now and fill `outcome`; errors of the call are its outcome, not exceptions."""
        outcome.sent = time.perf_counter()
        try:
            if outcome.service is Service.CHAT:
                await self._stream(request, outcome, deadline_seconds)
            else:
                method = self._unary[outcome.service]
                answer = await method(request, timeout=deadline_seconds, metadata=self._metadata)
                outcome.prompt_tokens = answer.usage.prompt_tokens
                outcome.cached_tokens = answer.usage.cached_tokens
                outcome.degraded = bool(answer.degradations)
        except grpc.aio.AioRpcError as error:
            outcome.code, outcome.message = error.code(), error.details() or ""
        outcome.end = time.perf_counter()

    async def _stream(self, request: Any, outcome: Outcome, deadline_seconds: float) -> None:
        moments: list[float] = []
        async for event in self._chat(request, timeout=deadline_seconds, metadata=self._metadata):
            if event.HasField("summary"):
                usage = event.summary.usage
                outcome.prompt_tokens, outcome.cached_tokens = usage.prompt_tokens, usage.cached_tokens
                outcome.completion_tokens = usage.completion_tokens
                outcome.degraded = bool(event.summary.degradations)
            else:
                moments.append(time.perf_counter())
        outcome.first = moments[0] if moments else None
        outcome.gaps = tuple(later - earlier for earlier, later in itertools.pairwise(moments))
