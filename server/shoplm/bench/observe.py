"""The server's own view of a load: its metrics before and after, and its processes' CPU and memory."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from prometheus_client.parser import text_string_to_metric_families

SAMPLE_SECONDS = 0.5
SCRAPE_TIMEOUT_SECONDS = 5.0
# (name of the sample, its labels) -> value
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(frozen=True, slots=True)
class StepComposition:
    """What the engine's steps held in the measured window: tokens and rows (requests in a step) by service."""

    steps: int
    mixed_steps: int  # steps that served more than one service
    tokens: dict[str, int]
    rows: dict[str, int]
    step_seconds: float  # sum over the steps
    prefix_query_tokens: int
    prefix_hit_tokens: int

    @classmethod
    def joined(cls, parts: Sequence[StepComposition]) -> StepComposition:
        """The sum over all windows."""
        tokens: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for part in parts:
            tokens.update(part.tokens)
            rows.update(part.rows)
        return cls(
            steps=sum(part.steps for part in parts),
            mixed_steps=sum(part.mixed_steps for part in parts),
            tokens=dict(tokens),
            rows=dict(rows),
            step_seconds=sum(part.step_seconds for part in parts),
            prefix_query_tokens=sum(part.prefix_query_tokens for part in parts),
            prefix_hit_tokens=sum(part.prefix_hit_tokens for part in parts),
        )


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """The server's processes over the measured window. Peak memory is the sum of their resident sets, in bytes."""

    processes: int
    cpu_seconds: float
    peak_rss_bytes: int

    @classmethod
    def joined(cls, parts: Sequence[ProcessUse]) -> ProcessUse:
        """The sum over all windows."""
        return cls(
            processes=max(part.processes for part in parts),
            cpu_seconds=sum(part.cpu_seconds for part in parts),
            peak_rss_bytes=max(part.peak_rss_bytes for part in parts),
        )


def parse_metrics(text: str) -> Samples:
    """Every `shoplm_` sample of a Prometheus exposition."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("shoplm_")
    }


def scrape(url: str) -> Samples:
    """The metrics at `url`; OSError when nothing answers there."""
    with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_SECONDS) as answer:
        return parse_metrics(answer.read().decode("utf-8"))


def composition(before: Samples, after: Samples) -> StepComposition:
    """What happened between two scrapes."""

    def by_service(name: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        for (sample, labels), value in after.items():
            if sample == name:
                service = dict(labels).get("service", "")
                difference = value - before.get((sample, labels), 0.0)
                counts[service] = counts.get(service, 0) + round(difference)
        return counts

    def total(name: str) -> float:
        return sum(
            value - before.get((sample, labels), 0.0) for (sample, labels), value in after.items() if sample == name
        )

    return StepComposition(
        steps=round(total("shoplm_step_duration_seconds_count")),
        mixed_steps=round(total("shoplm_mixed_steps_total")),
        tokens=by_service("shoplm_step_tokens_total"),
        rows=by_service("shoplm_step_rows_total"),
        step_seconds=total("shoplm_step_duration_seconds_sum"),
        prefix_query_tokens=round(total("shoplm_prefix_query_tokens_total")),
        prefix_hit_tokens=round(total("shoplm_prefix_hit_tokens_total")),
    )


def listening_process(port: int) -> int | None:
    """The id of the process of this user that listens on a TCP port; None where there is none to be seen."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return int(process.pid)
    return None


class ServerWatch:
    """Measures between `start` and `stop`: scrapes the metrics and samples the process tree under `pid`.

    What cannot be observed (no metrics there, a server on another machine) stays None, and `problems` says so.
    """

    def __init__(self, metrics_url: str | None, pid: int | None) -> None:
        self._metrics_url = metrics_url
        self._pid = pid
        self._before: Samples | None = None
        self._cpu: dict[int, float] = {}
        self._cpu_at_start: dict[int, float] = {}
        self._peak_rss = 0
        self._sampler: asyncio.Task[None] | None = None
        self.steps: StepComposition | None = None
        self.use: ProcessUse | None = None
        self.problems: list[str] = []

    async def start(self) -> None:
        """Begin the window."""
        self._before = await self._scrape()
        if self._pid is None:
            self.problems.append("CPU and memory: the server's process is not to be seen from here")
            return
        await asyncio.to_thread(self._sample)
        self._cpu_at_start = dict(self._cpu)
        self._sampler = asyncio.create_task(self._keep_sampling())

    async def stop(self) -> None:
        """End the window and fill `steps` and `use`."""
        after = await self._scrape()
        if self._before is not None and after is not None:
            self.steps = composition(self._before, after)
        if self._sampler is not None:
            self._sampler.cancel()
            await asyncio.to_thread(self._sample)
            cpu = sum(seconds - self._cpu_at_start.get(pid, 0.0) for pid, seconds in self._cpu.items())
            self.use = ProcessUse(len(self._cpu), cpu, self._peak_rss)

    async def _scrape(self) -> Samples | None:
        if self._metrics_url is None:
            return None
        try:
            return await asyncio.to_thread(scrape, self._metrics_url)
        except OSError as error:
            self.problems.append(f"steps: no metrics at {self._metrics_url}: {error}")
            return None

    async def _keep_sampling(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            await asyncio.to_thread(self._sample)

    def _sample(self) -> None:
        rss = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    self._cpu[process.pid] = float(times.user + times.system)
                    rss += process.memory_info().rss
        self._peak_rss = max(self._peak_rss, rss)
