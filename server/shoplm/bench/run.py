"""Runs what the command asks for: one load, offline throughput, or a sweep over rates and policies."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from shoplm.bench import offline, report
from shoplm.bench.calls import bearer, open_channel
from shoplm.bench.launch import RunningServer, own_server
from shoplm.bench.load import LoadRun, run_load
from shoplm.bench.observe import ProcessUse, ServerWatch, StepComposition, listening_process
from shoplm.bench.plan import LoadSettings, Targets, drawn_arrivals, replayed_arrivals
from shoplm.bench.summary import distribution, judge, summarise
from shoplm.bench.sweep import Sweep, comparison, find_knees, is_carried, measure_rates, plot_page, print_sweeps
from shoplm.bench.workload import Shop, get_model, make_customers, read_shop, request_for
from shoplm.request import Service
from shoplm.simulate.trace import Arrival as TracedArrival

CONNECT_SECONDS = 10.0
PROBE_SECONDS = 12.0  # of a rate that only brackets the knee


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
class Window:
    """A load that was sent once, and what the server said of it; None where it could not be observed."""

    run: LoadRun
    steps: StepComposition | None
    use: ProcessUse | None
    problems: tuple[str, ...]


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
    rounds: int,
    most_seconds: float,
    path: Path,
) -> Sequence[Sweep]:
    """Measure every policy at the same rates, in so many rounds at each, in turns; without `rates`, those around the
    knees. Write JSON and plots."""
    if policies and target.address is not None:
        raise ValueError("--policies starts servers of its own: leave --address out")
    machine_before = report.machine()
    names = list(policies or [""])
    with ExitStack() as stack:
        servers = []
        for policy in names:
            arguments = serve_arguments(target.base, target.bundle, settings.targets)
            arguments += ["--scheduling-policy", policy] if policy else []
            servers.append(stack.enter_context(server(console, target.address, target.metrics_url, arguments)))
        points = asyncio.run(_sweep(console, servers, names, target, settings, trace, rates, rounds, most_seconds))
    sweeps = [Sweep(policy, each) for policy, each in zip(names, points, strict=True)]
    capacity = {each.policy or "server": each.capacity for each in sweeps}
    results = {"capacity": capacity, "comparison": comparison(sweeps), "sweeps": [asdict(each) for each in sweeps]}
    print_sweeps(sweeps, console)
    report.write_json_of(results, machine_before, path)
    note = f"{rounds * settings.seconds:g} s at each rate, seed {settings.seed}; see {path.name} for the numbers."
    path.with_suffix(".html").write_text(plot_page(sweeps, note), "utf-8")
    console.print(f"[dim]written to {path} and {path.with_suffix('.html').name}[/dim]")
    return sweeps


async def _sweep(
    console: Console,
    servers: Sequence[RunningServer],
    policies: Sequence[str],
    target: Target,
    settings: LoadSettings,
    trace: Sequence[TracedArrival] | None,
    rates: Sequence[float],
    rounds: int,
    most_seconds: float,
) -> tuple[tuple[report.LoadResult, ...], ...]:
    started, longest, runs = time.monotonic(), 0.0, 0
    metadata = bearer(target.token)
    async with open_channel(servers[0].address) as channel:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        shop = await read_shop(channel, await get_model(channel, metadata), target.bundle, metadata)

    async def one(index: int, load: LoadSettings) -> Window:
        return await observe_load(servers[index], target.token, shop, load, trace)

    def summary(index: int, settings: LoadSettings, windows: Sequence[Window]) -> report.LoadResult:
        result = load_result(settings, windows)
        shares = ", ".join(f"{name} {s.in_time / max(s.offered, 1):.0%}" for name, s in result.services.items())
        shown = (
            f"{policies[index] or 'server'} at {settings.rate:.2f} requests/s for {settings.seconds * len(windows):g} s"
        )
        console.print(f"{shown}: in time {shares}")
        return result

    def next_load(rate: float) -> LoadSettings:
        nonlocal runs
        runs += 1
        # Other arrivals and customers each time: new customers are new to servers that have been measured before.
        return replace(settings, rate=rate, seed=settings.seed + runs)

    async def measure_all(rate: float) -> tuple[report.LoadResult, ...]:
        nonlocal longest
        begun = time.monotonic()
        windows: list[list[Window]] = [[] for _ in servers]
        for _ in range(rounds):  # a slow spell of the machine is every policy's
            load = next_load(rate)
            for index, found in enumerate(windows):
                found.append(await one(index, load))
        longest = max(longest, time.monotonic() - begun)
        return tuple(summary(index, replace(settings, rate=rate), found) for index, found in enumerate(windows))

    async def probe(rate: float) -> bool:
        load = replace(next_load(rate), seconds=min(PROBE_SECONDS, settings.seconds))
        return is_carried(summary(0, load, [await one(0, load)]))

    def has_time(more: int) -> bool:
        each = longest or rounds * len(servers) * (settings.warmup_seconds + 1.5 * settings.seconds)
        return time.monotonic() - started + more * each <= most_seconds

    if rates:
        return await measure_rates(measure_all, rates)
    return await find_knees(measure_all, probe, settings.rate, has_time)


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
        load = load_result(work.load, [await observe_load(server, work.token, shop, work.load, work.trace)])
    results = []
    for shape in work.shapes:
        console.print(f"offline: {shape.requests} x {shape.prompt_tokens} in, {shape.output_tokens} out …")
        results.append(await offline.run_offline(server.address, shape, runs=work.runs, token=work.token))
    version = model.model
    served = report.Served(version.bundle, version.version, version.base_model, model.server_version)
    return report.Report(served, load, tuple(results))


async def observe_load(
    server: RunningServer,
    token: str | None,
    shop: Shop,
    settings: LoadSettings,
    trace: Sequence[TracedArrival] | None = None,
) -> Window:
    """Run the mixed load of `settings` once."""
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
    return Window(run, watch.steps, watch.use, tuple(watch.problems))


def load_result(settings: LoadSettings, windows: Sequence[Window]) -> report.LoadResult:
    """All `windows` of a load, summed up as one."""
    run = LoadRun.joined([window.run for window in windows])
    steps, uses = [window.steps for window in windows], [window.use for window in windows]
    services = {
        service: summarise(service, run, settings.targets) for service in Service if settings.mix.get(service, 0) > 0
    }
    return report.LoadResult(
        settings=settings,
        windows=len(windows),
        services=services,
        verdict=judge(settings, run, services),
        steps=None if None in steps else StepComposition.joined([part for part in steps if part is not None]),
        use=None if None in uses else ProcessUse.joined([part for part in uses if part is not None]),
        problems=tuple(dict.fromkeys(problem for window in windows for problem in window.problems)),
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
