"""A benchmark's result: JSON with machine and versions, and a readable table."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from shoplm.bench.load import LoadRun
from shoplm.bench.observe import ProcessUse, StepComposition
from shoplm.bench.offline import OfflineResult
from shoplm.bench.plan import LoadSettings
from shoplm.bench.summary import Distribution, ServiceSummary, Verdict, distribution
from shoplm.request import Service

PACKAGES = ("shoplm", "torch", "grpcio", "numpy", "triton")


@dataclass(frozen=True, slots=True)
class Served:
    """What was measured."""

    bundle: str
    version: str
    base_model: str
    server_version: str


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The mixed load and what the server said of it; None where it could not be observed."""

    settings: LoadSettings  # of each window
    windows: int
    services: dict[Service, ServiceSummary]
    verdict: Verdict
    steps: StepComposition | None
    use: ProcessUse | None
    problems: tuple[str, ...]
    send_lag: Distribution
    pulse_lag: Distribution
    client_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a run of `shoplm bench` found."""

    served: Served
    load: LoadResult | None
    offline: tuple[OfflineResult, ...]


def send_lag(run: LoadRun) -> Distribution:
    """How many seconds after their time requests were sent."""
    return distribution([outcome.sent - outcome.intended for outcome in run.outcomes if outcome.measured])


def machine() -> dict[str, Any]:
    """CPU, cores, memory and system of this machine."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        model = found.group(1) if found else model
    return {
        "cpu": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Python and the packages that matter for speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_json(report: Report, machine_before: dict[str, Any], path: Path) -> None:
    """Write the report; times in seconds, sizes in bytes."""
    write_json_of(asdict(report), machine_before, path)


def write_json_of(results: dict[str, Any], machine_before: dict[str, Any], path: Path) -> None:
    """Write results with the moment, the machine and the versions."""
    content = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_before,
        "versions": versions(),
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_report(report: Report, console: Console) -> None:
    """The table for people."""
    served = report.served
    console.print(f"[bold]{served.base_model}[/bold], bundle {served.bundle or 'none'} {served.version}")
    if report.load is not None:
        _print_load(report.load, console)
    for result in report.offline:
        shape = result.shape
        console.print(
            f"offline {shape.requests} x {shape.prompt_tokens} in, {shape.output_tokens} out: "
            f"[bold]{result.prompt_tokens_per_second:,.0f}[/bold] prompt tokens/s, "
            f"[bold]{result.output_tokens_per_second:,.0f}[/bold] output tokens/s "
            f"(median of {len(result.seconds)}, {min(result.seconds):.2f} to {max(result.seconds):.2f} s)"
        )
        if result.cached_tokens:
            console.print(f"[yellow]{result.cached_tokens} prompt tokens came from the cache[/yellow]")


def _print_load(load: LoadResult, console: Console) -> None:
    settings = load.settings
    numbers = ("req/s", "done", "in time", "late", "refused", "expired", "errors", "degraded", "goodput/s")
    table = Table("service", *numbers, "p50", "p95", "p99", "p99.9", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for service, summary in load.services.items():
        ended = (summary.completed, summary.in_time, summary.late, summary.refused, summary.expired, summary.errors)
        counts = (*ended, summary.degraded)
        rates = f"{summary.offered_per_second:.2f}", f"{summary.goodput:.2f}"
        table.add_row(service, rates[0], *map(str, counts), rates[1], *_milliseconds(summary.latency))
        for name, part in (("first text", summary.first_text), ("between texts", summary.inter_token)):
            if part is not None:
                table.add_row(f"  {name}", *[""] * len(numbers), *_milliseconds(part))
    console.print(f"offered {settings.rate:g} requests/s for {settings.seconds:g} s, open loop; times in ms")
    console.print(table)
    completed = sum(summary.completed for summary in load.services.values())
    prompt = sum(summary.prompt_tokens for summary in load.services.values())
    cached = sum(summary.cached_tokens for summary in load.services.values())
    output = sum(summary.completion_tokens for summary in load.services.values())
    console.print(
        f"{completed / settings.seconds:.2f} requests/s, {prompt / settings.seconds:,.0f} prompt tokens/s "
        f"({cached / max(prompt, 1):.0%} cached), {output / settings.seconds:,.1f} chat tokens/s"
    )
    if load.steps is not None and load.steps.steps:
        steps = load.steps
        shares = ", ".join(f"{name} {count:,}" for name, count in sorted(steps.tokens.items()) if count)
        console.print(
            f"{steps.steps} steps, {steps.mixed_steps / steps.steps:.0%} of them mixed, "
            f"{1e3 * steps.step_seconds / steps.steps:.0f} ms each; tokens: {shares}"
        )
    if load.use is not None:
        console.print(
            f"server: {load.use.cpu_seconds / settings.seconds:.2f} cores, "
            f"{load.use.peak_rss_bytes / 2**20:,.0f} MiB in {load.use.processes} processes"
        )
    for problem in load.problems:
        console.print(f"not observed: {problem}", style="yellow", markup=False, highlight=False)
    for summary in load.services.values():
        for example in summary.error_examples:
            console.print(example, style="red", markup=False, highlight=False)
    colour = "green" if load.verdict.status == "VALID" else "red"
    limited = "; the load was over the server's capacity" if load.verdict.server_limited else ""
    console.print(f"[bold {colour}]{load.verdict.status}[/bold {colour}] {'; '.join(load.verdict.reasons)}{limited}")


def _milliseconds(values: Distribution) -> tuple[str, ...]:
    quantiles = (values.p50, values.p95, values.p99, values.p99_9)
    return tuple("-" if value is None else f"{value * 1e3:,.0f}" for value in quantiles)
