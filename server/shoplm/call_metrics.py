"""What calls count: plain numbers of the event loop that serves them, which a scrape makes into series.

A prometheus-client counter takes a lock to count; a call counts a dozen times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import grpc
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from shoplm.histograms import Buckets

# Series that exist from the start: a rate over a series that appears with its first error misses that error.
_FROM_THE_START = (
    grpc.StatusCode.OK,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
_GRPC_LABELS = ("grpc_type", "grpc_service", "grpc_method")


class MethodCounts:
    """One gRPC method."""

    def __init__(self, service: str, grpc_names: tuple[str, str, str], bounds: Sequence[float]) -> None:
        """`grpc_names`: type, service and method as gRPC's own metrics name them. `bounds` of the histograms, in
        seconds."""
        self.service = service
        self.grpc_names = grpc_names
        self.started = self.received = self.sent = 0
        self.ended: dict[grpc.StatusCode, int] = dict.fromkeys(_FROM_THE_START, 0)
        self.seconds = Buckets(bounds)

    def start(self) -> None:
        """A call arrived."""
        self.started += 1

    def end(self, code: grpc.StatusCode, seconds: float) -> None:
        """It ended."""
        self.ended[code] = self.ended.get(code, 0) + 1
        self.seconds.add(seconds)

    def in_flight(self) -> int:
        """Calls that have not ended."""
        return self.started - sum(tuple(self.ended.values()))


class CallMetrics(Collector):
    """The methods of a server, and what its answers used."""

    def __init__(self, services: Sequence[str], bounds: Sequence[float]) -> None:
        """`services` whose answers use tokens; `bounds` of the histograms, in seconds."""
        self._bounds = bounds
        self._methods: list[MethodCounts] = []
        self._tokens = {service: [0, 0, 0] for service in services}  # of prompts, cached ones, completions

    def method(self, service: str, *grpc_names: *tuple[str, str, str]) -> MethodCounts:
        """The counts of a method from now on."""
        counts = MethodCounts(service, grpc_names, self._bounds)
        self._methods.append(counts)
        return counts

    def used(self, service: str, prompt: int, cached: int, completion: int) -> None:
        """Tokens of a call that was answered."""
        tokens = self._tokens[service]
        tokens[0] += prompt
        tokens[1] += cached
        tokens[2] += completion

    def collect(self) -> Iterator[Metric]:
        yield from self._calls()
        yield from self._grpc()
        for index, (name, text) in enumerate(
            (
                ("shoplm_prompt_tokens", "Prompt tokens of answered calls."),
                ("shoplm_cached_prompt_tokens", "Those of them that came from the prefix cache."),
                ("shoplm_completion_tokens", "Tokens of finished answers."),
            )
        ):
            family = CounterMetricFamily(name, text, labels=("service",))
            for service, tokens in self._tokens.items():
                family.add_metric((service,), tokens[index])
            yield family

    def _calls(self) -> Iterator[Metric]:
        ended = CounterMetricFamily(
            "shoplm_requests", "Calls that ended, by gRPC status code.", labels=("service", "method", "code")
        )
        seconds = HistogramMetricFamily(
            "shoplm_request_duration_seconds", "From a call's arrival to its last byte.", labels=("service", "method")
        )
        in_flight: dict[str, int] = {}
        for each in self._methods:
            names = (each.service, each.grpc_names[2])
            for code, count in tuple(each.ended.items()):
                ended.add_metric((*names, code.name), count)
            seconds.add_metric(names, each.seconds.cumulative(), each.seconds.total)
            in_flight[each.service] = in_flight.get(each.service, 0) + each.in_flight()
        running = GaugeMetricFamily("shoplm_requests_in_flight", "Calls that are being served.", labels=("service",))
        for service, count in in_flight.items():
            running.add_metric((service,), count)
        yield from (ended, seconds, running)

    def _grpc(self) -> Iterator[Metric]:
        yield self._grpc_counter("grpc_server_started", "Calls that were started.", lambda each: each.started)
        yield self._grpc_counter("grpc_server_msg_received", "Messages received.", lambda each: each.received)
        yield self._grpc_counter("grpc_server_msg_sent", "Messages sent.", lambda each: each.sent)
        handled = CounterMetricFamily("grpc_server_handled", "Calls that ended.", labels=(*_GRPC_LABELS, "grpc_code"))
        text = "From a call's arrival to its end in the application."
        seconds = HistogramMetricFamily("grpc_server_handling_seconds", text, labels=_GRPC_LABELS)
        for each in self._methods:
            for code, count in tuple(each.ended.items()):
                handled.add_metric((*each.grpc_names, _camel(code)), count)
            seconds.add_metric(each.grpc_names, each.seconds.cumulative(), each.seconds.total)
        yield from (handled, seconds)

    def _grpc_counter(self, name: str, text: str, count: Callable[[MethodCounts], int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=_GRPC_LABELS)
        for each in self._methods:
            family.add_metric(each.grpc_names, count(each))
        return family


def _camel(code: grpc.StatusCode) -> str:
    """The code as gRPC's own metrics write it: OK, InvalidArgument, …"""
    return "OK" if code is grpc.StatusCode.OK else "".join(part.capitalize() for part in code.name.split("_"))
