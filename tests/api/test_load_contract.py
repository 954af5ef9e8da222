"""Under load: who asks, what may be made smaller, and what a refusal tells the caller."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
import pytest
from google.rpc import error_details_pb2
from served_shop import Scripted, Serve
from server_thread import bad_fields, detail, details
from shoplm.api.caller import Caller, read_caller
from shoplm.client.channel import service_config
from shoplm.config_sources import load_config
from shoplm.errors import ConfigurationError, EngineUnavailableError, InvalidRequestError, OverloadedError
from shoplm.request import Degradation, StepStats
from shoplm.v1 import chat_pb2, prediction_pb2, recommendation_pb2, shop_pb2
from shoplm.v1.recommendation_pb2_grpc import RecommendationServiceStub
from tiny_shop import DEMO_CUSTOMER

DEMO = shop_pb2.Customer(customer_id=DEMO_CUSTOMER)
RECOMMEND = recommendation_pb2.RecommendRequest(customer=DEMO)
ASK = chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="user", content="hello")], allow_degraded=True)


def test_tenant_and_priority_reach_the_scheduler_from_every_service(scripted_shop: Scripted) -> None:
    server, requests = scripted_shop.server, scripted_shop.engine.requests
    metadata = (("x-tenant-id", "gold"), ("x-priority", "-3"))
    calls: list[Callable[[], object]] = [
        lambda: server.recommendation.Recommend(RECOMMEND, metadata=metadata),
        lambda: server.prediction.Predict(prediction_pb2.PredictRequest(customer=DEMO), metadata=metadata),
        lambda: list(server.chat.Chat(ASK, metadata=metadata)),
    ]
    for call in calls:
        call()
        assert (requests[-1].tenant, requests[-1].priority) == ("gold", -3)
    server.recommendation.Recommend(RECOMMEND)
    assert (requests[-1].tenant, requests[-1].priority) == ("", 0)
    # Nothing is shared in the cache between tenants, whose timing would tell one what another has asked.
    assert requests[-1].cache_root != requests[-2].cache_root


def test_the_tenants_key_is_a_setting(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--tenant-metadata-key", "x-shop")
    metadata = (("x-shop", "north"), ("x-tenant-id", "not read"))
    scripted.server.recommendation.Recommend(RECOMMEND, metadata=metadata)
    assert scripted.engine.requests[-1].tenant == "north"
    nobody = serve_scripted("--tenant-metadata-key", "")
    nobody.server.recommendation.Recommend(RECOMMEND, metadata=metadata)
    assert nobody.engine.requests[-1].tenant == ""
    for key in ("X-Tenant", "a b", "tenant-bin"):
        with pytest.raises(ConfigurationError, match="--tenant-metadata-key"):
            load_config(["--tenant-metadata-key", key], {})


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        (("x-tenant-id", ""), "metadata[x-tenant-id]"),
        (("x-tenant-id", "a b"), "metadata[x-tenant-id]"),
        (("x-tenant-id", "t" * 129), "metadata[x-tenant-id]"),
        (("x-priority", "high"), "metadata[x-priority]"),
        (("x-priority", "101"), "metadata[x-priority]"),
        (("x-priority", "1_0"), "metadata[x-priority]"),
        (("x-priority", "+5"), "metadata[x-priority]"),
        (("x-priority", ""), "metadata[x-priority]"),
        (("x-priority", "1" * 5000), "metadata[x-priority]"),
    ],
)
def test_a_caller_that_cannot_be_read_is_refused_by_key(
    scripted_shop: Scripted, metadata: tuple[str, str], field: str
) -> None:
    with pytest.raises(InvalidRequestError):
        read_caller((metadata,), "x-tenant-id")
    with pytest.raises(grpc.RpcError) as raised:
        scripted_shop.server.recommendation.Recommend(RECOMMEND, metadata=(metadata,))
    assert list(bad_fields(raised.value)) == [field]


def test_other_metadata_are_no_caller() -> None:
    assert read_caller((("x-other", b"\xff"), ("authorization", "Bearer x")), "x-tenant-id") == Caller()


def test_what_was_degraded_is_named(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    answer = scripted.server.recommendation.Recommend(RECOMMEND)
    assert not answer.degradations
    assert scripted.engine.requests[-1].allow_degraded is False
    scripted.engine.degraded = (Degradation.NARROWER_BEAMS,)
    answer = scripted.server.recommendation.Recommend(
        recommendation_pb2.RecommendRequest(customer=DEMO, allow_degraded=True)
    )
    assert list(answer.degradations) == [shop_pb2.DEGRADATION_NARROWER_BEAMS]
    assert scripted.engine.requests[-1].allow_degraded is True
    scripted.engine.degraded = (Degradation.FEWER_TOKENS,)
    *_, last = scripted.server.chat.Chat(ASK)
    assert list(last.summary.degradations) == [shop_pb2.DEGRADATION_FEWER_TOKENS]
    assert scripted.engine.requests[-1].allow_degraded is True


def test_every_degradation_has_a_name_on_the_wire(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    scripted.engine.degraded = tuple(Degradation)
    names = [
        shop_pb2.Degradation.Name(value) for value in scripted.server.recommendation.Recommend(RECOMMEND).degradations
    ]
    assert names == [f"DEGRADATION_{degradation.name}" for degradation in Degradation]


def pushbacks(error: grpc.RpcError) -> list[str]:
    return [value for key, value in error.trailing_metadata() if key == "grpc-retry-pushback-ms"]


@pytest.mark.parametrize(
    ("error", "pushback"),
    [
        (OverloadedError("full", reason="QUEUE_FULL", retry_seconds=2.5), ["2500"]),
        (OverloadedError("full", reason="QUEUE_FULL", retry_seconds=0.0001), ["1"]),
        (EngineUnavailableError("died", retry_seconds=0.5), ["500"]),
        (OverloadedError("never", reason="DEADLINE_UNREACHABLE", retry_seconds=0.0), ["-1"]),
        (InvalidRequestError(("tokens", "bad")), []),
    ],
)
def test_a_refusal_tells_grpcs_own_retries_when(serve_scripted: Serve, error: Exception, pushback: list[str]) -> None:
    scripted = serve_scripted()
    scripted.engine.error = error
    for call in (
        lambda: scripted.server.recommendation.Recommend(RECOMMEND),
        lambda: list(scripted.server.chat.Chat(ASK)),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert pushbacks(raised.value) == pushback
        has_advice = any(each.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for each in details(raised.value).details)
        assert has_advice == bool(pushback and pushback != ["-1"])


def retrying(scripted: Scripted) -> RecommendationServiceStub:
    options = [
        ("grpc.service_config", service_config(retries=True, round_robin=False, health_checks=False)),
        ("grpc.enable_retries", 1),
    ]
    return RecommendationServiceStub(grpc.insecure_channel(scripted.server.address, options))


def test_a_client_waits_as_long_as_the_server_says_and_then_succeeds(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    scripted.engine.errors = [OverloadedError("full", reason="QUEUE_FULL", retry_seconds=0.4)]
    started = time.monotonic()
    assert retrying(scripted).Recommend(RECOMMEND, timeout=10).items
    assert time.monotonic() - started >= 0.4  # its own first back-off is at most 0.12 s
    assert len(scripted.engine.requests) == 2


def test_a_client_does_not_repeat_what_no_idle_engine_could_do(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    scripted.engine.error = OverloadedError("never", reason="DEADLINE_UNREACHABLE", retry_seconds=0.0)
    with pytest.raises(grpc.RpcError) as raised:
        retrying(scripted).Recommend(RECOMMEND, timeout=10)
    assert detail(raised.value, error_details_pb2.ErrorInfo).reason == "DEADLINE_UNREACHABLE"
    assert len(scripted.engine.requests) == 1


def test_what_the_scheduler_counts_becomes_metrics(serve_scripted: Serve) -> None:
    scripted = serve_scripted()

    async def publish() -> None:
        scripted.engine.publish(
            StepStats(
                submitted={"chat": 5},
                refusals={"chat:QUEUE_FULL": 2},
                failures={"chat:overloaded": 2},
                degraded={"recommendation:narrower_beams": 3},
                preemptions=4,
                cost_errors=(0.04, 0.6),
                wait_corrections={"chat": 1.25},
            )
        )

    scripted.server.run(publish())

    def value(name: str, **labels: str) -> float | None:
        return scripted.server.server.metrics.registry.get_sample_value(name, labels)

    assert value("shoplm_engine_submitted_total", service="chat") == 5
    assert value("shoplm_engine_refusals_total", service="chat", reason="QUEUE_FULL") == 2
    assert value("shoplm_degraded_total", service="recommendation", degradation="narrower_beams") == 3
    assert value("shoplm_preemptions_total") == 4
    assert value("shoplm_cost_error_ratio_bucket", le="0.05") == 1
    assert value("shoplm_cost_error_ratio_count") == 2
    assert value("shoplm_wait_correction_ratio", service="chat") == 1.25
    assert value("shoplm_wait_correction_ratio", service="prediction") == 1.0


def test_a_message_over_what_grpc_reads_is_refused_in_words(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--max-message-bytes", "1024")
    ours = recommendation_pb2.RecommendRequest(customer=shop_pb2.Customer(customer_id="x" * 2000))
    with pytest.raises(grpc.RpcError) as raised:
        scripted.server.recommendation.Recommend(ours)
    assert "at most 1024 are allowed (max_message_bytes)" in bad_fields(raised.value)["customer.customer_id"]
    transport = recommendation_pb2.RecommendRequest(customer=shop_pb2.Customer(customer_id="x" * 5000))
    with pytest.raises(grpc.RpcError) as raised:
        scripted.server.recommendation.Recommend(transport)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in str(raised.value.details()) and "4096" in str(raised.value.details())
    assert scripted.server.recommendation.Recommend(RECOMMEND).items
