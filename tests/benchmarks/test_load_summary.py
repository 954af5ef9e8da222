"""Percentiles, goodput and verdicts from known outcomes."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from shoplm.bench.calls import Outcome
from shoplm.bench.load import LoadRun
from shoplm.bench.observe import composition, parse_metrics
from shoplm.bench.plan import LoadSettings, Targets
from shoplm.bench.summary import distribution, in_time, judge, percentile, summarise
from shoplm.metrics import Metrics
from shoplm.request import Service, StepStats

TARGETS = Targets(recommendation_seconds=0.1, chat_first_seconds=0.5, chat_token_seconds=0.1)


def outcome(latency: float, service: Service = Service.RECOMMENDATION, **changes: object) -> Outcome:
    made = Outcome(service, measured=True, intended=100.0, sent=100.001, end=100.0 + latency)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def run_of(*outcomes: Outcome, seconds: float = 60.0, dropped: int = 0, cpu: float = 1.0) -> LoadRun:
    return LoadRun(outcomes, seconds, dropped, (0.0,), cpu)


def test_percentiles_are_nearest_rank_and_absent_when_unknowable() -> None:
    samples = [float(number) for number in range(1, 101)]
    found = distribution(samples[::-1])
    assert (found.p50, found.p95, found.p99, found.p99_9, found.max) == (50.0, 95.0, 99.0, None, 100.0)
    assert found.mean == 50.5
    assert distribution([]).p50 is None
    assert distribution([]).max is None
    assert distribution(samples[:19]).p95 is None
    assert distribution(samples[:20]).p95 == 19.0


@given(st.lists(st.floats(0, 1e6), min_size=100, max_size=300), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_a_percentile_splits_the_samples(samples: list[float], quantile: float) -> None:
    value = percentile(sorted(samples), quantile)
    assert value is not None
    assert sum(sample <= value for sample in samples) >= quantile * len(samples) - 1e-9
    assert sum(sample < value for sample in samples) < quantile * len(samples)


def test_latency_counts_from_the_intended_moment() -> None:
    # Sent three seconds late and answered in 50 ms: the customer waited for both.
    late = outcome(3.05, sent=103.0)
    assert late.latency == pytest.approx(3.05)
    assert not in_time(late, TARGETS)


def test_chat_has_a_target_for_its_first_text_and_for_its_end() -> None:
    def chat(first: float, end: float) -> bool:
        made = outcome(end, Service.CHAT, first=100.0 + first, completion_tokens=10)
        return in_time(made, TARGETS)

    assert chat(0.4, 1.4)
    assert not chat(0.6, 1.4)
    assert not chat(0.4, 1.6)


def test_every_offered_request_is_counted_once() -> None:
    outcomes = [
        outcome(0.05),
        outcome(0.5),
        outcome(0.01, code=grpc.StatusCode.RESOURCE_EXHAUSTED),
        outcome(0.01, code=grpc.StatusCode.UNAVAILABLE),
        outcome(30.0, code=grpc.StatusCode.DEADLINE_EXCEEDED),
        outcome(0.01, code=grpc.StatusCode.INTERNAL, message="boom"),
        outcome(0.05, measured=False),
        outcome(0.05, Service.PREDICTION),
    ]
    summary = summarise(Service.RECOMMENDATION, run_of(*outcomes, seconds=10.0), TARGETS)
    counts = (summary.in_time, summary.late, summary.refused, summary.expired, summary.errors)
    assert counts == (1, 1, 2, 1, 1)
    assert summary.offered == sum(counts)
    assert summary.completed == summary.in_time + summary.late
    assert summary.goodput == pytest.approx(0.1)
    assert summary.latency.count == 2  # of the completed ones only
    assert summary.error_examples == ("1 x INTERNAL: boom",)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (run_of(*[outcome(0.05)] * 30, seconds=5.0), "too short: 5 s"),
        (run_of(*[outcome(0.05)] * 19), "too short: 19 recommendation requests"),
        (run_of(*[outcome(0.05)] * 30, dropped=2), "client saturated: 2 requests"),
        (run_of(*[outcome(0.05, sent=100.2)] * 30), "sent 200 ms or more after"),
        (run_of(*[outcome(0.05)] * 30, cpu=59.0), "98% of its core"),
        (run_of(*[outcome(0.05)] * 30, outcome(0.1, code=grpc.StatusCode.INTERNAL)), "errors: 1"),
    ],
)
def test_a_run_that_proves_nothing_is_invalid(run: LoadRun, reason: str) -> None:
    settings = LoadSettings(mix={Service.RECOMMENDATION: 1.0})
    services = {Service.RECOMMENDATION: summarise(Service.RECOMMENDATION, run, TARGETS)}
    verdict = judge(settings, run, services)
    assert verdict.status == "INVALID"
    assert [text for text in verdict.reasons if reason in text], verdict.reasons


def test_a_good_run_is_valid_even_over_the_server_s_capacity() -> None:
    settings = LoadSettings(mix={Service.RECOMMENDATION: 1.0})
    refusals = [outcome(0.01, code=grpc.StatusCode.RESOURCE_EXHAUSTED)] * 10
    for extra in ([], refusals):
        run = run_of(*[outcome(0.05)] * 30, *extra)
        verdict = judge(settings, run, {Service.RECOMMENDATION: summarise(Service.RECOMMENDATION, run, TARGETS)})
        assert (verdict.status, verdict.reasons) == ("VALID", ())
        assert verdict.server_limited == bool(extra)


def test_step_composition_is_the_difference_of_two_scrapes() -> None:
    def exposition(chat: int, recommendation: int, steps: int) -> str:
        return (
            "# TYPE shoplm_step_tokens_total counter\n"
            f'shoplm_step_tokens_total{{service="chat"}} {chat}\n'
            f'shoplm_step_tokens_total{{service="recommendation"}} {recommendation}\n'
            "# TYPE shoplm_step_duration_seconds histogram\n"
            f'shoplm_step_duration_seconds_bucket{{le="+Inf"}} {steps}\n'
            f"shoplm_step_duration_seconds_count {steps}\nshoplm_step_duration_seconds_sum {steps * 0.5}\n"
            "# TYPE shoplm_mixed_steps_total counter\nshoplm_mixed_steps_total 3\n"
            "# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total 1\n"
        )

    found = composition(parse_metrics(exposition(10, 100, 4)), parse_metrics(exposition(25, 400, 10)))
    assert found.tokens == {"chat": 15, "recommendation": 300}
    assert (found.steps, found.mixed_steps, found.step_seconds) == (6, 0, 3.0)


def test_the_metrics_that_are_read_are_those_that_the_server_has() -> None:
    metrics = Metrics(process=False)
    before = parse_metrics(generate_latest(metrics.registry).decode())
    metrics.observe_step_stats(
        StepStats(
            step_seconds=(0.25, 0.5),
            tokens={"chat": 3, "prediction": 40},
            rows={"chat": 3, "prediction": 1},
            mixed_steps=1,
            prefix_query_tokens=50,
            prefix_hit_tokens=20,
        )
    )
    found = composition(before, parse_metrics(generate_latest(metrics.registry).decode()))
    assert (found.steps, found.mixed_steps, found.step_seconds) == (2, 1, 0.75)
    assert (found.tokens["chat"], found.tokens["prediction"]) == (3, 40)
    assert (found.rows["chat"], found.rows["prediction"]) == (3, 1)
    assert (found.prefix_query_tokens, found.prefix_hit_tokens) == (50, 20)
