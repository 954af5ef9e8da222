"""Runs what the command asks for: one load, offline throughput, or a sweep over rates and policies."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from shoplm.bench import offline, report
from shoplm.bench.calls import bearer, open_channel
from shoplm.bench.launch import RunningServer, own_server
from shoplm.bench.load import run_load
from shoplm.bench.observe import ServerWatch, listening_process
from shoplm.bench.plan import LoadSettings, Targets, drawn_arrivals, replayed_arrivals
from shoplm.bench.summary import distribution, judge, summarise
from shoplm.bench.sweep import Sweep, find_knee, measure_rates, plot_page, print_sweeps
from shoplm.bench.workload import Shop, get_model, make_customers, read_shop, request_for
from shoplm.request import Service
from shoplm.simulate.trace import Arrival as TracedArrival

CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Work:
    """What one run of the command measures; `load` None leaves the mixed load out."""

    load: LoadSettings | None
    shapes: tuple[offline.OfflineShape, ...]
    runs: int
    bundle: Path | None
    token: str | None
    trace: Sequence[TracedArrival] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What to send a sweep to: a running server, or own ones of this base and bundle."""

    address: str | None
    metrics_url: str | None
    token: str | None
    base: str | None
    bundle: Path | None


def sweep_rates(
    console: Console,
    target: Target,
    settings: LoadSettings,
    trace: Sequence[TracedArrival] | None,
    rates: Sequence[float],
    policies: Sequence[str],
    max_points: int,
    path: Path,
) -> None:
    """Measure every policy at the same rates, the first one's where a knee is searched; write JSON and plots."""
    if policies and target.address is not None:
        raise ValueError("--policies starts servers of its own: leave --address out")
    sweeps: list[Sweep] = []
    machine_before = report.machine()
    for policy in policies or [""]:
        arguments = serve_arguments(target.base, target.bundle, settings.targets) + (
            ["--scheduling-policy", policy] if policy else []
        )
        with server(console, target.address, target.metrics_url, arguments) as running:
            points = asyncio.run(_sweep(console, running, target, settings, trace, rates, policy, max_points))
        rates = [point.settings.rate for point in points]
        sweeps.append(Sweep(policy, points))
    capacity = {each.policy or "server": each.capacity for each in sweeps}
    results = {"capacity": capacity, "sweeps": [asdict(each) for each in sweeps]}
    report.write_json_of(results, machine_before, path)
    note = f"{settings.seconds:g} s at each rate, seed {settings.seed}; see {path.name} for the numbers."
    path.with_suffix(".html").write_text(plot_page(sweeps, note), "utf-8")
    print_sweeps(sweeps, console)
    console.print(f"[dim]written to {path} and {path.with_suffix('.html').name}[/dim]")


async def _sweep(
    console: Console,
    server: RunningServer,
    target: Target,
    settings: LoadSettings,
    trace: Sequence[TracedArrival] | None,
    rates: Sequence[float],
    policy: str,
    max_points: int,
) -> tuple[report.LoadResult, ...]:
    metadata = bearer(target.token)
    async with open_channel(server.address) as channel:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        shop = await read_shop(channel, await get_model(channel, metadata), target.bundle, metadata)

    async def measure_one(rate: float) -> report.LoadResult:
        result = await measure_load(server, target.token, shop, replace(settings, rate=rate), trace)
        shares = ", ".join(f"{name} {s.in_time / max(s.offered, 1):.0%}" for name, s in result.services.items())
        console.print(f"{policy or 'server'} at {rate:.2f} requests/s: in time {shares}")
        return result

    if rates:
        return await measure_rates(measure_one, rates)
    return await find_knee(measure_one, settings.rate, max_points)


async def measure(console: Console, server: RunningServer, work: Work) -> report.Report:
    """Do the work against a running server. Raises WorkloadError, OfflineError or a gRPC error."""
    metadata = bearer(work.token)
    async with open_channel(server.address) as channel:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        model = await get_model(channel, metadata)
        shop = None if work.load is None else await read_shop(channel, model, work.bundle, metadata)
    load = None
    if work.load is not None and shop is not None:
        console.print(f"mixed load: {work.load.warmup_seconds:g} s of warm-up, then {work.load.seconds:g} s …")
        load = await measure_load(server, work.token, shop, work.load, work.trace)
    results = []
    for shape in work.shapes:
        console.print(f"offline: {shape.requests} x {shape.prompt_tokens} in, {shape.output_tokens} out …")
        results.append(await offline.run_offline(server.address, shape, runs=work.runs, token=work.token))
    version = model.model
    served = report.Served(version.bundle, version.version, version.base_model, model.server_version)
    return report.Report(served, load, tuple(results))


async def measure_load(
    server: RunningServer,
    token: str | None,
    shop: Shop,
    settings: LoadSettings,
    trace: Sequence[TracedArrival] | None = None,
) -> report.LoadResult:
    """Run the mixed load of `settings` and sum it up."""
    watch = ServerWatch(server.metrics_url, server.pid)
    people = make_customers(shop, settings)
    count = len(people)
    arrivals = drawn_arrivals(settings, count) if trace is None else replayed_arrivals(trace, settings, count)
    run = await run_load(
        server.address,
        settings,
        arrivals,
        lambda arrival: request_for(arrival, people, settings),
        token=token,
        window_starts=watch.start,
        window_ends=watch.stop,
    )
    services = {
        service: summarise(service, run, settings.targets) for service in Service if settings.mix.get(service, 0) > 0
    }
    return report.LoadResult(
        settings=settings,
        services=services,
        verdict=judge(settings, run, services),
        steps=watch.steps,
        use=watch.use,
        problems=tuple(watch.problems),
        send_lag=report.send_lag(run),
        pulse_lag=distribution(run.pulse_lags),
        client_cpu_seconds=run.client_cpu_seconds,
    )


def serve_arguments(base: str | None, bundle: Path | None, targets: Targets) -> list[str]:
    """Flags of `shoplm serve`, which orders its work by the same targets as the load is judged by."""
    arguments = [
        f"--recommendation-target-seconds={targets.recommendation_seconds}",
        f"--prediction-target-seconds={targets.prediction_seconds}",
        f"--chat-first-target-seconds={targets.chat_first_seconds}",
        f"--chat-token-target-seconds={targets.chat_token_seconds}",
    ]
    if base is not None:
        arguments += ["--base", base]
    return arguments if bundle is None else [*arguments, "--bundle", str(bundle)]


@contextmanager
def server(
    console: Console, address: str | None, metrics_url: str | None, arguments: Sequence[str]
) -> Iterator[RunningServer]:
    """The server at an address, or one of its own that is stopped at the end."""
    if address is not None:
        yield RunningServer(address, metrics_url, _local_process(address))
        return
    with tempfile.TemporaryDirectory(prefix="shoplm-bench-") as folder:
        console.print("starting a server …")
        with own_server(arguments, Path(folder) / "server.log") as running:
            yield running


def _local_process(address: str) -> int | None:
    """The process that listens at an address of this machine, where it can be seen."""
    parts = urlsplit(f"//{address}")
    if parts.hostname not in ("127.0.0.1", "localhost", "::1") or parts.port is None:
        return None
    return listening_process(parts.port)
