"""Metrics: what the engine reports is what a scrape shows, and Prometheus' own linter has nothing to say."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys

import grpc
import pytest
from prometheus_client import generate_latest
from shoplm.metrics import Metrics, ModelInfo
from shoplm.request import FailureKind, StepStats

STATS = StepStats(
    step_seconds=(0.02, 0.07),
    tokens={"chat": 5, "recommendation": 300},
    rows={"chat": 5, "recommendation": 2},
    mixed_steps=1,
    drafted_tokens=6,
    accepted_tokens=4,
    queue_seconds={"chat": (0.001,)},
    first_seconds={"chat": (0.03,), "prediction": (0.01, 0.02)},
    inter_token_seconds=((0.01, 1), (0.02, 2)),
    total_seconds={"chat": (0.3,)},
    prefix_query_tokens=100,
    prefix_hit_tokens=80,
    evicted_pages=4,
    failures={"chat:cancelled": 2, "recommendation:overloaded": 1},
    queued_requests={"chat": 3},
    running_requests={"chat": 2},
    queued_tokens=77,
    pages_used=10,
    pages_cached=20,
    pages_free=30,
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(process=False)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_step_stats_are_folded_in(metrics: Metrics) -> None:
    metrics.observe_step_stats(STATS)
    assert value(metrics, "shoplm_step_duration_seconds_count") == 2
    assert value(metrics, "shoplm_step_duration_seconds_sum") == pytest.approx(0.09)
    assert value(metrics, "shoplm_step_tokens_total", service="recommendation") == 300
    assert value(metrics, "shoplm_step_rows_total", service="chat") == 5
    assert value(metrics, "shoplm_mixed_steps_total") == 1
    assert value(metrics, "shoplm_draft_tokens_total") == 6
    assert value(metrics, "shoplm_draft_tokens_accepted_total") == 4
    assert value(metrics, "shoplm_queue_time_seconds_count", service="chat") == 1
    assert value(metrics, "shoplm_time_to_first_token_seconds_count", service="prediction") == 2
    assert value(metrics, "shoplm_inter_token_seconds_count") == 3
    assert value(metrics, "shoplm_engine_time_seconds_sum", service="chat") == pytest.approx(0.3)
    assert value(metrics, "shoplm_prefix_query_tokens_total") == 100
    assert value(metrics, "shoplm_prefix_hit_tokens_total") == 80
    assert value(metrics, "shoplm_kv_evicted_pages_total") == 4
    assert value(metrics, "shoplm_engine_failures_total", service="chat", kind="cancelled") == 2
    assert [value(metrics, "shoplm_kv_pages", state=state) for state in ("used", "cached", "free")] == [10, 20, 30]


def test_counters_add_up_and_gauges_follow(metrics: Metrics) -> None:
    metrics.observe_step_stats(STATS)
    metrics.observe_step_stats(STATS)
    assert value(metrics, "shoplm_step_tokens_total", service="chat") == 10
    assert value(metrics, "shoplm_requests_queued", service="chat") == 3
    metrics.observe_step_stats(StepStats())
    assert value(metrics, "shoplm_step_tokens_total", service="chat") == 10
    assert value(metrics, "shoplm_requests_queued", service="chat") == 0  # absent from the message: none are queued
    assert value(metrics, "shoplm_queued_tokens") == 0


def test_what_a_lost_engine_held_is_not_shown_any_more(metrics: Metrics) -> None:
    metrics.engine_state(True)
    metrics.observe_step_stats(STATS)
    metrics.engine_state(False)
    metrics.engine_state(True)
    assert value(metrics, "shoplm_requests_queued", service="chat") == 0
    assert value(metrics, "shoplm_requests_running", service="chat") == 0
    assert value(metrics, "shoplm_queued_tokens") == 0
    # No page is neither free nor used, which an alert would take for a full cache.
    assert value(metrics, "shoplm_kv_pages", state="free") is None
    assert value(metrics, "shoplm_step_tokens_total", service="chat") == 5


def test_requests_that_are_lost_with_the_engine_end(metrics: Metrics) -> None:
    metrics.engine_state(True)
    metrics.observe_step_stats(
        StepStats(submitted={"chat": 5, "prediction": 2}, total_seconds={"chat": (0.3,), "prediction": (0.1, 0.1)})
    )
    metrics.observe_step_stats(StepStats(submitted={"chat": 1}, failures={"chat:expired": 2}))
    metrics.engine_state(False)
    assert value(metrics, "shoplm_engine_failures_total", service="chat", kind="unavailable") == 3
    for service, submitted in (("chat", 6), ("prediction", 2), ("recommendation", 0)):
        served = value(metrics, "shoplm_engine_time_seconds_count", service=service)
        failed = [value(metrics, "shoplm_engine_failures_total", service=service, kind=kind) for kind in FailureKind]
        assert value(metrics, "shoplm_engine_submitted_total", service=service) == submitted
        assert sum(each or 0.0 for each in (served, *failed)) == submitted
    metrics.engine_state(True)
    metrics.engine_state(False)  # with nothing in it
    assert value(metrics, "shoplm_engine_failures_total", service="chat", kind="unavailable") == 3


def test_the_process_of_the_engine_is_followed_from_one_to_the_next(metrics: Metrics) -> None:
    engine: subprocess.Popen[bytes] | None = None
    metrics.watch_engine(lambda: engine.pid if engine is not None else None)
    memory = "shoplm_engine_process_resident_memory_bytes"
    assert value(metrics, memory) is None
    for _ in range(2):
        engine = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert engine.stdout is not None
        engine.stdout.readline()
        assert (value(metrics, memory) or 0.0) > 1e6
        assert (value(metrics, "shoplm_engine_process_open_fds") or 0.0) >= 3
        assert value(metrics, "shoplm_engine_process_cpu_seconds_total") is not None
        engine.communicate()
        assert value(metrics, memory) is None


def test_losing_the_engine_is_counted_once_per_loss(metrics: Metrics) -> None:
    for serving in (False, True, False, False, True):
        metrics.engine_state(serving)
    assert value(metrics, "shoplm_engine_losses_total") == 1
    assert value(metrics, "shoplm_engine_up") == 1


def test_calls_add_up_and_a_bound_is_within_its_bucket(metrics: Metrics) -> None:
    names = {"grpc_type": "unary", "grpc_service": "shoplm.v1.PredictionService", "grpc_method": "Predict"}
    counts = metrics.calls.method("prediction", *names.values())
    for _ in range(4):
        counts.start()
    for code, seconds in ((grpc.StatusCode.OK, 0.05), (grpc.StatusCode.OK, 99.0), (grpc.StatusCode.NOT_FOUND, 0.051)):
        counts.end(code, seconds)
    assert value(metrics, "grpc_server_started_total", **names) == 4
    assert value(metrics, "grpc_server_handled_total", **names, grpc_code="OK") == 2
    assert value(metrics, "grpc_server_handled_total", **names, grpc_code="NotFound") == 1
    assert value(metrics, "shoplm_requests_in_flight", service="prediction") == 1
    ours = {"service": "prediction", "method": "Predict"}
    assert value(metrics, "shoplm_requests_total", **ours, code="OK") == 2
    for name, labels in (("shoplm_request_duration_seconds", ours), ("grpc_server_handling_seconds", names)):
        within = [value(metrics, f"{name}_bucket", **labels, le=bound) for bound in ("0.04", "0.05", "0.06", "+Inf")]
        assert within == [0, 1, 2, 3]
        assert value(metrics, f"{name}_sum", **labels) == pytest.approx(99.101)
        assert value(metrics, f"{name}_count", **labels) == 3


def test_the_model_info_has_one_series_after_a_change(metrics: Metrics) -> None:
    metrics.describe(ModelInfo("shop", "1", "base", "torch", "0.1"))
    metrics.describe(ModelInfo("shop", "2", "base", "torch", "0.1"))
    series = [
        sample for family in metrics.registry.collect() for sample in family.samples if "model_info" in sample.name
    ]
    assert [(sample.labels["version"], sample.value) for sample in series] == [("2", 1.0)]


def test_latency_buckets_are_fine_where_latencies_are_promised(metrics: Metrics) -> None:
    metrics.observe_step_stats(STATS)
    bounds = [
        float(sample.labels["le"])
        for family in metrics.registry.collect()
        if family.name == "shoplm_time_to_first_token_seconds"
        for sample in family.samples
        if sample.name.endswith("_bucket") and sample.labels["service"] == "chat"
    ]
    assert bounds[0] == 0.001
    inside = [bound for bound in bounds if 0.05 <= bound <= 0.2]
    assert all(high / low <= 1.26 for low, high in itertools.pairwise(inside))


def test_errors_have_a_series_before_the_first_error(metrics: Metrics) -> None:
    assert value(metrics, "shoplm_engine_failures_total", service="chat", kind="expired") == 0
    for service in ("recommendation", "chat", "prediction", "model", "engine"):
        for reason in ("INTERNAL", "ENGINE_FAILURE", "ENGINE_UNAVAILABLE", "DRAINING"):
            assert value(metrics, "shoplm_refusals_total", service=service, reason=reason) == 0
    names = ("server_stream", "shoplm.v1.ChatService", "Chat")
    metrics.calls.method("chat", *names)
    for code in ("OK", "INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"):
        assert value(metrics, "shoplm_requests_total", service="chat", method="Chat", code=code) == 0


def test_promtool_finds_nothing_to_complain_about() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    metrics = Metrics()
    metrics.observe_step_stats(STATS)
    metrics.describe(ModelInfo("shop", "1", "base", "torch", "0.1"))
    counts = metrics.calls.method("chat", "server_stream", "shoplm.v1.ChatService", "Chat")
    counts.start()
    counts.end(grpc.StatusCode.OK, 0.3)
    metrics.refusals.labels("chat", "OVERLOADED").inc()
    metrics.warnings.labels("chat", "UNKNOWN_ITEM").inc()
    scrape = generate_latest(metrics.registry)
    checked = subprocess.run(["promtool", "check", "metrics"], input=scrape, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
