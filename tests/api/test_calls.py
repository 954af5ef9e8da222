"""What holds for every call: request ids, authentication, limits, deadlines, cancellation, status and metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from served_shop import Scripted, Serve
from server_thread import TIMEOUT_SECONDS, bad_fields, detail, details
from shoplm.api.calls import has_expired
from shoplm.api.methods import METHODS
from shoplm.api.status import CODES
from shoplm.errors import (
    CancelledByCallerError,
    ConfigurationError,
    DrainingError,
    EngineFailureError,
    EngineUnavailableError,
    ExpiredError,
    InvalidRequestError,
    NotServingError,
    OverloadedError,
    RetryableError,
    ShopLMError,
)
from shoplm.v1 import chat_pb2, model_pb2, recommendation_pb2, shop_pb2
from tiny_shop import DEMO_CUSTOMER

RECOMMEND = recommendation_pb2.RecommendRequest(customer=shop_pb2.Customer(customer_id=DEMO_CUSTOMER))
ASK = chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="user", content="hello")])


def failure(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value


def sample(scripted: Scripted, name: str, **labels: str) -> float:
    """A metric's value on the server; 0 where it has no such series."""
    return scripted.server.server.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("error", "code", "reason", "retry_seconds"),
    [
        (
            OverloadedError("full", reason="QUEUE_FULL", retry_seconds=2.5),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            2.5,
        ),
        (EngineUnavailableError("died", retry_seconds=0.5), grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE", 0.5),
        (DrainingError("closing", retry_seconds=0.5), grpc.StatusCode.UNAVAILABLE, "DRAINING", 0.5),
        (ExpiredError("late"), grpc.StatusCode.DEADLINE_EXCEEDED, "EXPIRED", None),
        (CancelledByCallerError("gone"), grpc.StatusCode.CANCELLED, "CANCELLED", None),
        (EngineFailureError("step"), grpc.StatusCode.INTERNAL, "ENGINE_FAILURE", None),
        (InvalidRequestError(("tokens", "bad")), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", None),
        (NotServingError("no"), grpc.StatusCode.FAILED_PRECONDITION, "NOT_SERVING", None),
        (ValueError("a secret"), grpc.StatusCode.INTERNAL, "INTERNAL", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_becomes_one_status(
    serve_scripted: Serve, error: Exception, code: grpc.StatusCode, reason: str, retry_seconds: float | None
) -> None:
    scripted = serve_scripted()
    scripted.engine.error = error
    for call in (
        lambda: scripted.server.recommendation.Recommend(RECOMMEND),
        lambda: list(scripted.server.chat.Chat(ASK)),
    ):
        failed = failure(call)
        assert failed.code() is code
        assert detail(failed, error_details_pb2.ErrorInfo).reason == reason
        assert details(failed).code == code.value[0]
        assert "secret" not in str(details(failed))
        if retry_seconds is not None:
            assert (
                detail(failed, error_details_pb2.RetryInfo).retry_delay.ToTimedelta().total_seconds() == retry_seconds
            )
    assert sample(scripted, "shoplm_requests_total", service="chat", method="Chat", code=code.name) == 1
    assert sample(scripted, "shoplm_refusals_total", service="recommendation", reason=reason) == 1


def test_every_error_that_a_call_can_raise_is_in_the_table() -> None:
    kinds = {*ShopLMError.__subclasses__(), *RetryableError.__subclasses__()}
    assert kinds - {ConfigurationError, RetryableError} == set(CODES)


def request_ids(call: Any) -> list[str]:
    return [value for key, value in call.trailing_metadata() if key == "x-request-id"]


def test_the_callers_request_id_comes_back(scripted_shop: Scripted) -> None:
    recommend = scripted_shop.server.recommendation.Recommend
    _, call = recommend.with_call(RECOMMEND, metadata=(("x-request-id", "page-17:rec"),))
    assert request_ids(call) == ["page-17:rec"]
    assert scripted_shop.engine.requests[-1].request_id.startswith("page-17:rec#")
    bad = recommendation_pb2.RecommendRequest(count=9999)
    failed = failure(lambda: recommend(bad, metadata=(("x-request-id", "page-18"),)))
    assert request_ids(failed) == ["page-18"]


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, 'quote"', "esc\\x1b"])
def test_other_request_ids_are_replaced(scripted_shop: Scripted, given: str | None) -> None:
    metadata = (("x-request-id", given),) if given is not None else ()
    _, call = scripted_shop.server.model.GetModel.with_call(model_pb2.GetModelRequest(), metadata=metadata)
    (made,) = request_ids(call)
    assert made != given
    assert len(made) == 16


def test_two_calls_of_one_id_are_two_requests(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    for _ in range(2):
        scripted.server.recommendation.Recommend(RECOMMEND, metadata=(("x-request-id", "same"),))
    assert len({request.request_id for request in scripted.engine.requests}) == 2


def test_the_deadline_reaches_the_engine(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    before = time.monotonic()
    scripted.server.recommendation.Recommend(RECOMMEND, timeout=17.0)
    scripted.server.recommendation.Recommend(RECOMMEND)
    timed, untimed = scripted.engine.requests
    assert timed.deadline_seconds == pytest.approx(before + 17.0, abs=2.0)
    assert before <= timed.arrival_seconds < before + 2.0
    assert untimed.deadline_seconds is None


@pytest.mark.parametrize("how", ["cancel", "deadline"])
@pytest.mark.parametrize("service", ["chat", "recommendation"])
def test_who_has_gone_costs_nothing_more(serve_scripted: Serve, service: str, how: str) -> None:
    scripted = serve_scripted()
    scripted.engine.holds = True
    # The deadline goes as gRPC sends it, without the caller's own timer: its cancellation may come first.
    metadata = (("grpc-timeout", "1S"),) if how == "deadline" else ()
    call: Any
    if service == "chat":
        call = scripted.server.chat.Chat(ASK, metadata=metadata)
        method = "Chat"
    else:
        call = scripted.server.recommendation.Recommend.future(RECOMMEND, metadata=metadata)
        method = "Recommend"
    scripted.server.wait_until(scripted.engine.started.is_set)
    if how == "cancel":
        call.cancel()
    scripted.server.wait_until(lambda: bool(scripted.engine.cancelled))
    assert scripted.engine.cancelled == [scripted.engine.requests[0].request_id]
    code = "CANCELLED" if how == "cancel" else "DEADLINE_EXCEEDED"
    scripted.server.wait_until(
        lambda: sample(scripted, "shoplm_requests_total", service=service, method=method, code=code) == 1
    )
    assert sample(scripted, "shoplm_requests_in_flight", service=service) == 0


@pytest.mark.parametrize(
    ("remaining", "elapsed", "expired"),
    [
        (None, 9.0, False),
        (-0.1, 0.3, True),
        (0.01, 0.29, True),  # the caller's timer was first
        (0.1, 0.2, False),
        (0.09, 9.91, True),  # sent rounded up
        (0.2, 9.8, False),
    ],
)
def test_a_cancellation_by_the_callers_timer_is_the_deadlines(
    remaining: float | None, elapsed: float, expired: bool
) -> None:
    assert has_expired(remaining, elapsed) is expired


def test_calls_over_the_limit_are_refused_and_may_come_again(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--max-concurrent-calls", "1")
    scripted.engine.holds = True
    running = scripted.server.recommendation.Recommend.future(RECOMMEND, timeout=TIMEOUT_SECONDS)
    scripted.server.wait_until(scripted.engine.started.is_set)
    failed = failure(lambda: scripted.server.recommendation.Recommend(RECOMMEND))
    assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(failed, error_details_pb2.ErrorInfo).reason == "TOO_MANY_CALLS"
    assert detail(failed, error_details_pb2.RetryInfo).retry_delay.seconds == 1
    health = health_pb2_grpc.HealthStub(scripted.server.channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING  # probes are not calls
    scripted.server.run(_release(scripted))
    assert running.result().items
    scripted.engine.holds = False
    assert scripted.server.recommendation.Recommend(RECOMMEND).items


async def _release(scripted: Scripted) -> None:
    scripted.engine.released.set()


def test_without_a_token_only_health_answers(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--auth-tokens", "one,two")
    channel = scripted.server.channel
    for metadata in (
        (),
        (("authorization", "Bearer three"),),
        (("authorization", "one"),),
        (("authorization", "Bearer "),),
    ):
        for path, method in METHODS.items():
            if method.grpc_service.endswith("EngineService"):
                continue  # not offered
            failed = failure(lambda: list(channel.unary_stream(path, None, None)(b"", metadata=metadata)))  # noqa: B023
            assert failed.code() is grpc.StatusCode.UNAUTHENTICATED
            assert detail(failed, error_details_pb2.ErrorInfo).reason == "UNAUTHENTICATED"
    reflected = failure(lambda: ProtoReflectionDescriptorDatabase(channel).get_services())
    assert reflected.code() is grpc.StatusCode.UNAUTHENTICATED
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    for sent in ("Bearer one", "bearer two"):
        metadata = (("authorization", sent),)
        assert scripted.server.recommendation.Recommend(RECOMMEND, metadata=metadata).items


@pytest.mark.parametrize(("key", "first", "second"), [("x-tenant-id", "mine", "another's"), ("x-priority", "0", "9")])
def test_what_a_caller_says_twice_is_refused(scripted_shop: Scripted, key: str, first: str, second: str) -> None:
    """A gateway's own and one that a caller has sent before it: nobody can tell which is whose."""
    metadata = ((key, first), (key, second))
    failed = failure(lambda: scripted_shop.server.recommendation.Recommend(RECOMMEND, metadata=metadata))
    assert bad_fields(failed) == {f"metadata[{key}]": "is there twice"}


def test_strangers_take_nobodys_place(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--auth-tokens", "one", "--max-concurrent-calls", "1")
    scripted.engine.holds = True
    metadata = (("authorization", "Bearer one"),)
    running = scripted.server.recommendation.Recommend.future(RECOMMEND, metadata=metadata, timeout=TIMEOUT_SECONDS)
    scripted.server.wait_until(scripted.engine.started.is_set)
    call = scripted.server.channel.unary_stream("/shoplm.v1.RecommendationService/Recommend", None, None)
    failed = failure(lambda: list(call(b"", timeout=TIMEOUT_SECONDS)))
    assert failed.code() is grpc.StatusCode.UNAUTHENTICATED
    scripted.server.run(_release(scripted))
    assert running.result().items


def test_nothing_is_read_of_a_stranger(serve_scripted: Serve) -> None:
    """Who is refused while the message is still to come has not had it read: a call of a kind that never sends it."""
    scripted = serve_scripted("--auth-tokens", "one")
    silence = threading.Event()

    def never() -> Iterator[bytes]:
        silence.wait(TIMEOUT_SECONDS)
        yield from ()

    try:
        for path in ("/shoplm.v1.RecommendationService/Recommend", "/shoplm.v1.ChatService/Chat"):
            call = scripted.server.channel.stream_stream(path, None, None)
            failed = failure(lambda: list(call(never(), timeout=TIMEOUT_SECONDS)))  # noqa: B023
            assert failed.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        silence.set()
    labels = {"service": "recommendation", "reason": "UNAUTHENTICATED"}
    assert sample(scripted, "shoplm_refusals_total", **labels) == 1


def test_reflection_describes_all_services(scripted_shop: Scripted) -> None:
    database = ProtoReflectionDescriptorDatabase(scripted_shop.server.channel)
    names = set(database.get_services())
    assert {method.grpc_service for method in METHODS.values()} <= names
    assert "grpc.health.v1.Health" in names
    file = database.FindFileContainingSymbol("shoplm.v1.ChatService")
    assert file.service[0].method[0].server_streaming


def test_raw_engine_access_is_off_unless_asked_for(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    failed = failure(lambda: scripted.server.raw("/shoplm.v1.EngineService/Search", b""))
    assert failed.code() is grpc.StatusCode.UNIMPLEMENTED


def test_calls_are_counted_by_both_families_of_names(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    list(scripted.server.chat.Chat(ASK))
    failure(lambda: scripted.server.recommendation.Recommend(recommendation_pb2.RecommendRequest(count=9999)))
    chat = {"grpc_type": "server_stream", "grpc_service": "shoplm.v1.ChatService", "grpc_method": "Chat"}
    recommend = {
        "grpc_type": "unary",
        "grpc_service": "shoplm.v1.RecommendationService",
        "grpc_method": "Recommend",
    }
    assert sample(scripted, "grpc_server_started_total", **chat) == 1
    assert sample(scripted, "grpc_server_msg_received_total", **chat) == 1
    assert sample(scripted, "grpc_server_msg_sent_total", **chat) == 4  # three deltas and the summary
    assert sample(scripted, "grpc_server_handled_total", **chat, grpc_code="OK") == 1
    assert sample(scripted, "grpc_server_handling_seconds_count", **chat) == 1
    assert sample(scripted, "grpc_server_handled_total", **recommend, grpc_code="InvalidArgument") == 1
    assert sample(scripted, "shoplm_requests_total", service="chat", method="Chat", code="OK") == 1
    assert sample(scripted, "shoplm_request_duration_seconds_count", service="chat", method="Chat") == 1
    assert sample(scripted, "shoplm_cached_prompt_tokens_total", service="chat") == 3
    assert sample(scripted, "shoplm_completion_tokens_total", service="chat") == 3
