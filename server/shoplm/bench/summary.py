"""Outcomes -> percentiles, goodput and the verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shoplm.bench.calls import Outcome
from shoplm.bench.load import LoadRun
from shoplm.bench.plan import LoadSettings, Targets
from shoplm.request import Service

QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
MIN_SECONDS = 10.0
MIN_REQUESTS = 20  # of a service; fewer do not even give a p95
MAX_LATE_SEND_SECONDS = 0.010
MAX_CLIENT_CPU_SHARE = 0.8  # of one core: the client's event loop has only one


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles in seconds; None where there are too few samples to tell: fewer than 1 / (1 - q)."""

    count: int
    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None
    p99_9: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class ServiceSummary:
    """One service over the measured window. `goodput` is requests in time per second."""

    offered: int
    completed: int
    in_time: int
    late: int  # completed, but after its target
    refused: int  # RESOURCE_EXHAUSTED or UNAVAILABLE
    expired: int  # DEADLINE_EXCEEDED
    errors: int  # anything else
    error_examples: tuple[str, ...]
    degraded: int
    offered_per_second: float
    completed_per_second: float
    goodput: float
    latency: Distribution
    first_text: Distribution | None  # of chat: time to first token
    inter_token: Distribution | None  # of chat: between two pieces of text
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the numbers may be quoted, and if not, why. `server_limited` says that the load was over capacity."""

    status: Literal["VALID", "INVALID"]
    reasons: tuple[str, ...]
    server_limited: bool


def percentile(ordered: Sequence[float], quantile: float) -> float | None:
    """Nearest-rank percentile of ascending samples: the smallest one that `quantile` of them do not exceed.

    None where fewer than `1 / (1 - quantile)` samples would make it the maximum by definition.
    """
    # 1 / (1 - 0.9) is 10.000000000000002 in floating point; rounding keeps ten samples enough.
    if len(ordered) < round(1 / (1 - quantile)):
        return None
    return ordered[max(math.ceil(round(quantile * len(ordered), 9)) - 1, 0)]


def distribution(samples: Sequence[float]) -> Distribution:
    """Percentiles of `samples`."""
    ordered = sorted(samples)
    values = {name: percentile(ordered, quantile) for name, quantile in QUANTILES.items()}
    mean = math.fsum(ordered) / len(ordered) if ordered else None
    return Distribution(count=len(ordered), mean=mean, max=ordered[-1] if ordered else None, **values)


def in_time(outcome: Outcome, targets: Targets) -> bool:
    """Whether a completed call met its targets."""
    if not outcome.completed:
        return False
    if outcome.service is Service.CHAT:
        # Fewer than one token came without text: the answer is then its end alone.
        first = (outcome.end if outcome.first is None else outcome.first) - outcome.intended
        allowed = targets.chat_first_seconds + outcome.completion_tokens * targets.chat_token_seconds
        return first <= targets.chat_first_seconds and outcome.latency <= allowed
    if outcome.service is Service.RECOMMENDATION:
        return outcome.latency <= targets.recommendation_seconds
    return outcome.latency <= targets.prediction_seconds


def summarise(service: Service, run: LoadRun, targets: Targets) -> ServiceSummary:
    """What the measured window says of one service."""
    offered = [outcome for outcome in run.outcomes if outcome.measured and outcome.service is service]
    completed = [outcome for outcome in offered if outcome.completed]
    timely = sum(in_time(outcome, targets) for outcome in completed)
    refused = sum(outcome.refused for outcome in offered)
    expired = sum(outcome.expired for outcome in offered)
    failed = [o for o in offered if not (o.completed or o.refused or o.expired)]
    chat = service is Service.CHAT
    firsts = [outcome.first - outcome.intended for outcome in completed if outcome.first is not None]
    examples = Counter(f"{outcome.code.name}: {outcome.message}" for outcome in failed)
    return ServiceSummary(
        offered=len(offered),
        completed=len(completed),
        in_time=timely,
        late=len(completed) - timely,
        refused=refused,
        expired=expired,
        errors=len(failed),
        error_examples=tuple(f"{count} x {text[:200]}" for text, count in examples.most_common(3)),
        degraded=sum(outcome.degraded for outcome in completed),
        offered_per_second=len(offered) / run.measured_seconds,
        completed_per_second=len(completed) / run.measured_seconds,
        goodput=timely / run.measured_seconds,
        latency=distribution([outcome.latency for outcome in completed]),
        first_text=distribution(firsts) if chat else None,
        inter_token=distribution([gap for outcome in completed for gap in outcome.gaps]) if chat else None,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in completed),
        cached_tokens=sum(outcome.cached_tokens for outcome in completed),
        completion_tokens=sum(outcome.completion_tokens for outcome in completed),
    )


def judge(settings: LoadSettings, run: LoadRun, services: dict[Service, ServiceSummary]) -> Verdict:
    """INVALID when the run was too short or the client, not the server, was the limit."""
    reasons = []
    if run.measured_seconds < MIN_SECONDS:
        reasons.append(f"too short: {run.measured_seconds:g} s measured, at least {MIN_SECONDS:g} s are needed")
    for service, summary in services.items():
        if settings.mix.get(service, 0) > 0 and summary.offered < MIN_REQUESTS:
            reasons.append(f"too short: {summary.offered} {service} requests, at least {MIN_REQUESTS} are needed")
    if run.dropped:
        reasons.append(
            f"client saturated: {run.dropped} requests over {settings.max_in_flight} in flight were not sent"
        )
    late_sends = distribution([o.sent - o.intended for o in run.outcomes if o.measured])
    if late_sends.p95 is not None and late_sends.p95 > MAX_LATE_SEND_SECONDS:
        reasons.append(
            f"client saturated: 5 % of the requests were sent {late_sends.p95 * 1e3:.0f} ms or more after their time, "
            f"{MAX_LATE_SEND_SECONDS * 1e3:.0f} ms are allowed; give the client a core of its own or lower the rate"
        )
    share = run.client_cpu_seconds / run.measured_seconds
    if share > MAX_CLIENT_CPU_SHARE:
        reasons.append(f"client saturated: it used {share:.0%} of its core, {MAX_CLIENT_CPU_SHARE:.0%} are allowed")
    failed = sum(summary.errors for summary in services.values())
    if failed:
        reasons.append(f"errors: {failed} calls failed; see the examples")
    lost = sum(summary.refused + summary.expired for summary in services.values())
    return Verdict("INVALID" if reasons else "VALID", tuple(reasons), server_limited=lost > 0)
