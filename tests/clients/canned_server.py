"""A real gRPC server on loopback whose answers are fixed but true to the contract, error details included.

It lets the clients and the load generator be tested over the wire without a model. Customers' ids choose what happens:
`refused` RESOURCE_EXHAUSTED with RetryInfo, `denied` PERMISSION_DENIED as from a gateway, `unavailable` UNAVAILABLE,
`broken` INTERNAL, `slow` no answer until the
caller gives up, `flaky-N` UNAVAILABLE for the first N attempts of a call, `broken-off` CANCELLED for the first one;
anything else is answered.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from shoplm.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    engine_pb2,
    engine_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    prediction_pb2,
    prediction_pb2_grpc,
    recommendation_pb2,
    recommendation_pb2_grpc,
    shop_pb2,
)

TOKEN = "open-sesame"
RETRY_SECONDS = 0.25
MAX_COUNT = 100
VERSION = shop_pb2.ModelVersion(bundle="canned", version="1", base_model="none")
INFLUENCES = [
    shop_pb2.Influence(
        kind=shop_pb2.Influence.KIND_ITEM,
        item_id="milk",
        title="Milk",
        time=Timestamp(seconds=1_700_000_000, nanos=500_000_000),
        visits=3,
        effect=0.75,
        model_effect=0.25,
        text="Milk, in 3 visits",
    ),
    shop_pb2.Influence(
        kind=shop_pb2.Influence.KIND_HABIT, title="how much is spent", effect=-0.5, text="spends little"
    ),
]
USAGE = shop_pb2.Usage(prompt_tokens=120, cached_tokens=96, history_tokens=100)
ANSWER = ("Returns", " are", " free", " for", " 30", " days ", "✓")
ITEMS = ("milk", "bread", "coffee", "apples", "rice")
ENDLESS = ("hang", "Tell me everything")  # how a message begins whose answer only a cancellation ends
Context = Any  # grpc.aio.ServicerContext; its generic arguments differ per method


@dataclass
class Record:
    """What the server saw; read by tests after the call."""

    attempts: Counter[str] = field(default_factory=Counter)  # by request id
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)  # by request id, of the last attempt
    remaining_seconds: dict[str, float | None] = field(default_factory=dict)  # by request id
    requests: dict[str, Any] = field(default_factory=dict)  # by request id, of the last attempt
    last_request: Any = None
    cancelled: threading.Event = field(default_factory=threading.Event)  # set when a `slow` call is cancelled
    slow_running: threading.Event = field(default_factory=threading.Event)


async def refuse(context: Context, code: int, message: str, *details: Any, pushback_ms: int | None = None) -> NoReturn:
    """End a call with a google.rpc.Status."""
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        status.details.add().Pack(detail)
    rich = rpc_status.to_status(status)
    metadata = list(rich.trailing_metadata or ())
    if pushback_ms is not None:
        metadata.append(("grpc-retry-pushback-ms", str(pushback_ms)))
    await context.abort(rich.code, rich.details, tuple(metadata))
    raise AssertionError("abort returned")


async def refuse_field(context: Context, field_path: str, text: str) -> NoReturn:
    """INVALID_ARGUMENT that names a field."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=field_path, description=text)
    await refuse(
        context,
        code_pb2.INVALID_ARGUMENT,
        f"{field_path}: {text}",
        error_details_pb2.BadRequest(field_violations=[violation]),
        error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="shoplm"),
    )


class Services(
    recommendation_pb2_grpc.RecommendationServiceServicer,
    chat_pb2_grpc.ChatServiceServicer,
    prediction_pb2_grpc.PredictionServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    engine_pb2_grpc.EngineServiceServicer,
):
    """All services."""

    def __init__(self, record: Record, token: str | None) -> None:
        self.record = record
        self.token = token

    async def _enter(self, request: Any, context: Context) -> None:
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        call_id = metadata.get("x-request-id", "")
        self.record.attempts[call_id] += 1
        self.record.metadata[call_id] = metadata
        self.record.remaining_seconds[call_id] = context.time_remaining()
        self.record.requests[call_id] = self.record.last_request = request
        if self.token is not None and metadata.get("authorization") != f"Bearer {self.token}":
            await refuse(context, code_pb2.UNAUTHENTICATED, "no valid token")
        customer = request.customer.customer_id if "customer" in request.DESCRIPTOR.fields_by_name else ""
        if customer == "refused":
            retry = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=int(RETRY_SECONDS * 1e9)))
            reason = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="shoplm")
            await refuse(context, code_pb2.RESOURCE_EXHAUSTED, "the queue is full", retry, reason, pushback_ms=-1)
        if customer == "denied":
            await refuse(context, code_pb2.PERMISSION_DENIED, "not for this token")
        if customer == "unavailable":
            await refuse(context, code_pb2.UNAVAILABLE, "the server is draining")
        if customer == "broken":
            await refuse(context, code_pb2.INTERNAL, "a step failed")
        if customer.startswith("flaky-") and self.record.attempts[call_id] <= int(customer.removeprefix("flaky-")):
            await refuse(context, code_pb2.UNAVAILABLE, "restarting", pushback_ms=1)
        if customer == "broken-off" and self.record.attempts[call_id] == 1:
            await refuse(context, code_pb2.CANCELLED, "the port closes")
        if customer == "slow":
            await self._wait_for_cancellation()

    async def _wait_for_cancellation(self) -> None:
        self.record.slow_running.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.record.cancelled.set()

    async def Recommend(self, request: recommendation_pb2.RecommendRequest, context: Context) -> Any:
        await self._enter(request, context)
        if request.count > MAX_COUNT:
            await refuse_field(context, "count", f"{request.count} is over the limit of {MAX_COUNT}")
        count = request.count or 10
        return recommendation_pb2.RecommendResponse(
            items=[_item(name, rank, request.explain) for rank, name in enumerate(ITEMS[:count])],
            model=VERSION,
            usage=USAGE,
            degradations=[shop_pb2.DEGRADATION_NARROWER_BEAMS] if request.allow_degraded else [],
            warnings=[shop_pb2.Warning(code="EMPTY_HISTORY", message="no events", count=1)],
        )

    async def Rank(self, request: recommendation_pb2.RankRequest, context: Context) -> Any:
        await self._enter(request, context)
        known = [name for name in ITEMS if name in request.item_ids]
        unknown = len(request.item_ids) - len(known)
        return recommendation_pb2.RankResponse(
            items=[_item(name, rank, request.explain) for rank, name in enumerate(known)],
            model=VERSION,
            usage=USAGE,
            warnings=[shop_pb2.Warning(code="UNKNOWN_ITEM", message="not in the catalogue", count=unknown)],
            degradations=[shop_pb2.DEGRADATION_NO_EXPLANATION] if request.allow_degraded else [],
        )

    async def Predict(self, request: prediction_pb2.PredictRequest, context: Context) -> Any:
        await self._enter(request, context)
        targets = list(request.targets) or list(model_response().targets)
        return prediction_pb2.PredictResponse(
            predictions=[_prediction(target, request.explain) for target in targets],
            model=VERSION,
            usage=USAGE,
            degradations=[shop_pb2.DEGRADATION_NO_EXPLANATION] if request.allow_degraded else [],
        )

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        await self._enter(request, context)
        return model_response()

    async def Chat(self, request: chat_pb2.ChatRequest, context: Context) -> AsyncIterator[chat_pb2.ChatResponse]:
        await self._enter(request, context)
        for index, message in enumerate(request.messages):
            if message.role not in ("system", "user", "assistant"):
                await refuse_field(context, f"messages[{index}].role", f"{message.role!r} is not a role")
        tokens = ANSWER[: request.max_tokens or len(ANSWER)]
        try:
            for token in tokens:
                yield chat_pb2.ChatResponse(delta=token)
            if request.messages and request.messages[-1].content.startswith(ENDLESS):
                await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):  # cancelled while waiting, or while sending
            self.record.cancelled.set()
            raise
        complete = len(tokens) == len(ANSWER)
        yield chat_pb2.ChatResponse(
            summary=chat_pb2.ChatSummary(
                finish_reason=chat_pb2.FINISH_REASON_STOP if complete else chat_pb2.FINISH_REASON_LENGTH,
                usage=shop_pb2.Usage(prompt_tokens=80, cached_tokens=64, completion_tokens=len(tokens)),
                citations=[chat_pb2.Citation(source="returns.md", title="Returns", text="Free for 30 days.")],
                model=VERSION,
                degradations=[shop_pb2.DEGRADATION_FEWER_TOKENS] if request.allow_degraded else [],
            )
        )

    async def Generate(
        self, request: engine_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[engine_pb2.GenerateResponse]:
        for token in range(request.max_tokens):
            yield engine_pb2.GenerateResponse(token_ids=[token])
        yield engine_pb2.GenerateResponse(finished=True, timings=engine_pb2.Timings(total_seconds=0.001))

    async def Search(self, request: engine_pb2.SearchRequest, context: Context) -> engine_pb2.SearchResponse:
        return engine_pb2.SearchResponse(hits=[engine_pb2.SearchHit(item=0, score=-1.0)])


def model_response() -> model_pb2.GetModelResponse:
    """What GetModel answers."""
    return model_pb2.GetModelResponse(
        model=VERSION,
        limits=model_pb2.Limits(max_count=MAX_COUNT, max_events=1000, max_completion_tokens=64, max_candidates=500),
        targets=[
            prediction_pb2.Target(kind=prediction_pb2.TARGET_KIND_PURCHASE, horizon_days=7),
            prediction_pb2.Target(kind=prediction_pb2.TARGET_KIND_SPEND, horizon_days=30),
            prediction_pb2.Target(kind=prediction_pb2.TARGET_KIND_CHURN),
        ],
        item_count=len(ITEMS),
        categories=["grocery"],
        attributes=["age", "town"],
        attribute_values=[model_pb2.AttributeValues(attribute="age", values=["19-24", "25-34"])],
        demo_customer_ids=["demo-1", "demo-2"],
        notice="Canned answers.",
        server_version="0.0.0",
    )


def _item(name: str, rank: int, explain: bool) -> recommendation_pb2.RecommendedItem:
    reason = recommendation_pb2.Reason
    terms = [
        reason(kind=reason.KIND_MODEL, contribution=-1.5 - rank, text="Goes with what was bought last."),
        reason(kind=reason.KIND_REPEAT, contribution=0.5, text="Bought 3 times."),
    ]
    return recommendation_pb2.RecommendedItem(
        item_id=name,
        title=name.title(),
        category="grocery",
        price=None if rank == 1 else 1.25 + rank,
        score=-1.0 - rank,
        reasons=terms if explain else [],
        influences=INFLUENCES if explain else [],
    )


def _prediction(target: prediction_pb2.Target, explain: bool) -> prediction_pb2.Prediction:
    found = _value(target)
    found.influences.extend(INFLUENCES if explain else [])
    return found


def _value(target: prediction_pb2.Target) -> prediction_pb2.Prediction:
    if target.kind == prediction_pb2.TARGET_KIND_SPEND:
        return prediction_pb2.Prediction(
            target=target, amount=42.5, interval_low=10.0, interval_high=90.0, population_mean=30.0, applicable=True
        )
    applicable = target.kind != prediction_pb2.TARGET_KIND_CHURN
    return prediction_pb2.Prediction(target=target, probability=0.75, population_mean=0.5, applicable=applicable)


class CannedServer:
    """Runs the services on a free loopback port, in a thread with an event loop of its own."""

    def __init__(self, token: str | None = None, *, health: bool = True) -> None:
        self.record = Record()
        self.address = ""
        self._token = token
        self._has_health = health
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="canned-server")

    def __enter__(self) -> CannedServer:
        self._thread.start()
        assert self._started.wait(30), "the canned server did not start within 30 s"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the canned server did not stop within 30 s"

    def set_serving(self, serving: bool) -> None:
        """What health says."""
        status = health_pb2.HealthCheckResponse
        work = self._health.set("", status.SERVING if serving else status.NOT_SERVING)
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server()
        services = Services(self.record, self._token)
        recommendation_pb2_grpc.add_RecommendationServiceServicer_to_server(services, server)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(services, server)
        prediction_pb2_grpc.add_PredictionServiceServicer_to_server(services, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(services, server)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(services, server)
        self._health = health_aio.HealthServicer()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        if self._has_health:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._started.set()
        await self._stop.wait()
        await server.stop(grace=0)
