"""Every Prometheus metric of the server, in one place. Names are described in docs/operations.md.

Two kinds of source: calls, as `api.calls` sees them, and the engine's `StepStats`, folded in as they arrive. Both
run on the event loop; a scrape reads from another thread, which prometheus-client allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from shoplm.call_metrics import CallMetrics
from shoplm.errors import DrainingError, EngineFailureError, EngineUnavailableError, ShopLMError
from shoplm.histograms import Histogram
from shoplm.request import FailureKind, Service, StepStats

# Fine where the latencies of the three services are promised: between 50 and 200 ms.
LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.09, 0.1, 0.12, 0.15, 0.175, 0.2),
    *(0.25, 0.35, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
# The services of `shoplm.request.Service` and those that the engine knows nothing of.
MODEL_SERVICE = "model"
ENGINE_SERVICE = "engine"
# Of INTERNAL and UNAVAILABLE, which alerts read.
_REASONS = tuple(kind.reason for kind in (ShopLMError, EngineFailureError, EngineUnavailableError, DrainingError))


@dataclass(frozen=True)
class ModelInfo:
    """Labels of `shoplm_model_info`."""

    bundle: str
    version: str
    base_model: str
    backend: str
    server_version: str


class Metrics:
    """The registry and its metrics. One per server, so that tests can run several servers in a process."""

    def __init__(self, *, process: bool = True) -> None:
        """`process` adds memory, CPU, open files and collector pauses of this process."""
        # `_created` series are gauges that no counter of the format asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        if process:
            for collector in (ProcessCollector, PlatformCollector, GCCollector):
                collector(registry=self.registry)
        self._define_calls()
        self._define_engine()
        self._define_model()
        self._engine_was_up = False
        self._in_engine = dict.fromkeys(map(str, Service), 0)  # requests that its reports have not told the end of

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, label: str = "", *, buckets: tuple[float, ...] = LATENCY_BUCKETS
    ) -> Histogram:
        histogram = Histogram(name, text, buckets, label)
        self.registry.register(histogram)
        return histogram

    def _define_calls(self) -> None:
        self.calls = CallMetrics([service.value for service in Service], LATENCY_BUCKETS)
        self.registry.register(self.calls)
        self.refusals = self._counter(
            "shoplm_refusals", "Calls that ended with an error, by its reason.", "service", "reason"
        )
        self.warnings = self._counter(
            "shoplm_warnings", "Answers that say that something was ignored or changed.", "service", "warning"
        )

    def _define_engine(self) -> None:
        self.queue_seconds = self._histogram(
            "shoplm_queue_time_seconds",
            "From arrival to the planning of the first step that computed something of it.",
            "service",
        )
        self.first_seconds = self._histogram(
            "shoplm_time_to_first_token_seconds", "From arrival to the first token or the result.", "service"
        )
        self.inter_token_seconds = self._histogram("shoplm_inter_token_seconds", "Between two tokens of a chat answer.")
        self.engine_seconds = self._histogram(
            "shoplm_engine_time_seconds", "From arrival to the last token or the result.", "service"
        )
        self.step_seconds = self._histogram(
            "shoplm_step_duration_seconds", "Forward passes, with what they read.", buckets=STEP_BUCKETS
        )
        self.step_tokens = self._counter("shoplm_step_tokens", "Tokens that forward passes computed.", "service")
        self.step_rows = self._counter("shoplm_step_rows", "Requests in forward passes, summed over these.", "service")
        self.mixed_steps = self._counter("shoplm_mixed_steps", "Forward passes that served more than one service.")
        self.prefix_queries = self._counter("shoplm_prefix_query_tokens", "Prompt tokens looked up.")
        self.prefix_hits = self._counter("shoplm_prefix_hit_tokens", "Those of them that were found.")
        self.evicted_pages = self._counter("shoplm_kv_evicted_pages", "Cached pages given to other requests.")
        self.engine_failures = self._counter(
            "shoplm_engine_failures",
            "Requests that ended without an answer: cancelled, expired, overloaded, unavailable (engine lost), ….",
            "service",
            "kind",
        )
        self.engine_submitted = self._counter(
            "shoplm_engine_submitted",
            "Requests that reached the engine; each ends in shoplm_engine_time_seconds or shoplm_engine_failures.",
            "service",
        )
        self.engine_refusals = self._counter(
            "shoplm_engine_refusals",
            "Requests that the engine refused or gave up because of load.",
            "service",
            "reason",
        )
        self.degraded = self._counter(
            "shoplm_degraded", "Answers made smaller so that they came in time.", "service", "degradation"
        )
        self.draft_tokens = self._counter("shoplm_draft_tokens", "Guessed tokens of answers that passes checked.")
        self.draft_tokens_accepted = self._counter("shoplm_draft_tokens_accepted", "Those of them that were right.")
        self.preemptions = self._counter(
            "shoplm_preemptions",
            "Requests that lost their pages to one that came before them, and are computed again.",
        )
        self.cost_error = self._histogram(
            "shoplm_cost_error_ratio", "|predicted - measured| / measured step time.", buckets=RATIO_BUCKETS
        )
        self.wait_correction = self._gauge(
            "shoplm_wait_correction_ratio", "Factor on predicted waits that fits those observed.", "service"
        )
        self.queued = self._gauge("shoplm_requests_queued", "Requests that wait for their first step.", "service")
        self.running = self._gauge("shoplm_requests_running", "Requests that hold pages.", "service")
        self.queued_tokens = self._gauge("shoplm_queued_tokens", "Prompt tokens that wait.")
        self.kv_pages = self._gauge("shoplm_kv_pages", "Pages of the key-value pool.", "state")
        self.engine_up = self._gauge("shoplm_engine_up", "Whether the engine is loaded and serving.")
        self.engine_losses = self._counter("shoplm_engine_losses", "How often the engine was lost while it served.")

    def _define_model(self) -> None:
        self.model_info = self._gauge(
            "shoplm_model_info",
            "What is served; always 1.",
            *(each.name for each in fields(ModelInfo)),
        )
        self.start_seconds = self._gauge("shoplm_start_duration_seconds", "From the start of the server to ready.")
        # Series that exist from the start: a rate over a series that appears with its first error misses that error.
        for service in Service:
            self.step_tokens.labels(service.value)
            self.step_rows.labels(service.value)
            self.engine_submitted.labels(service.value)
            self.queued.labels(service.value)
            self.running.labels(service.value)
            for histogram in (self.queue_seconds, self.first_seconds, self.engine_seconds):
                histogram.of(service.value)
            for kind in FailureKind:
                self.engine_failures.labels(service.value, kind.value)
        for name in (*map(str, Service), MODEL_SERVICE, ENGINE_SERVICE):
            for reason in _REASONS:
                self.refusals.labels(name, reason)

    def describe(self, info: ModelInfo) -> None:
        """Set `shoplm_model_info` to what is served now."""
        self.model_info.clear()
        self.model_info.labels(*astuple(info)).set(1)

    def watch_engine(self, process_id: Callable[[], int | None]) -> None:
        """Add memory, CPU and open files of the process that is the engine at the time of a scrape."""
        # None is the name of no process, and what cannot be read has no series.
        ProcessCollector("shoplm_engine", lambda: str(process_id()), registry=self.registry)

    def engine_state(self, serving: bool) -> None:
        """The engine came up or was lost."""
        self.engine_up.set(serving)
        if self._engine_was_up and not serving:
            self.engine_losses.inc()
            self._forget_engine()
        self._engine_was_up = serving

    def _forget_engine(self) -> None:
        """Count the requests that a lost engine held as failed."""
        for service, count in self._in_engine.items():
            if count > 0:
                self.engine_failures.labels(service, FailureKind.UNAVAILABLE.value).inc(count)
            self._in_engine[service] = 0
        self._set_gauges(StepStats())
        self.kv_pages.clear()

    def observe_step_stats(self, stats: StepStats) -> None:
        """Fold in what the engine counted since its last message, and set its gauges."""
        self.step_seconds.of().extend(stats.step_seconds)
        self.cost_error.of().extend(stats.cost_errors)
        for gap, count in stats.inter_token_seconds:
            self.inter_token_seconds.of().add(gap, count)
        for histogram, by_service in (
            (self.queue_seconds, stats.queue_seconds),
            (self.first_seconds, stats.first_seconds),
            (self.engine_seconds, stats.total_seconds),
        ):
            for service, values in by_service.items():
                histogram.of(service).extend(values)
        for counter, counts in (
            (self.step_tokens, stats.tokens),
            (self.step_rows, stats.rows),
            (self.engine_submitted, stats.submitted),
        ):
            for service, count in counts.items():
                counter.labels(service).inc(count)
        for counter, counts in (
            (self.engine_failures, stats.failures),
            (self.engine_refusals, stats.refusals),
            (self.degraded, stats.degraded),
        ):
            for key, count in counts.items():
                service, _, what = key.partition(":")
                counter.labels(service, what).inc(count)
        self._follow_requests(stats)
        self.preemptions.inc(stats.preemptions)
        self.draft_tokens.inc(stats.drafted_tokens)
        self.draft_tokens_accepted.inc(stats.accepted_tokens)
        self.mixed_steps.inc(stats.mixed_steps)
        self.prefix_queries.inc(stats.prefix_query_tokens)
        self.prefix_hits.inc(stats.prefix_hit_tokens)
        self.evicted_pages.inc(stats.evicted_pages)
        self._set_gauges(stats)

    def _follow_requests(self, stats: StepStats) -> None:
        """Keep count of the requests that are in the engine."""
        for service, count in stats.submitted.items():
            self._in_engine[service] += count
        for service, values in stats.total_seconds.items():
            self._in_engine[service] -= len(values)
        for key, count in stats.failures.items():
            self._in_engine[key.partition(":")[0]] -= count

    def _set_gauges(self, stats: StepStats) -> None:
        for service in Service:
            self.queued.labels(service.value).set(stats.queued_requests.get(service.value, 0))
            self.running.labels(service.value).set(stats.running_requests.get(service.value, 0))
            self.wait_correction.labels(service.value).set(stats.wait_corrections.get(service.value, 1.0))
        self.queued_tokens.set(stats.queued_tokens)
        for state, pages in (("used", stats.pages_used), ("cached", stats.pages_cached), ("free", stats.pages_free)):
            self.kv_pages.labels(state).set(pages)
