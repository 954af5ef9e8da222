"""`shoplm bench`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import grpc
import typer
from rich.console import Console
from shoplm.bench import offline, report
from shoplm.bench.calls import open_channel
from shoplm.bench.launch import LaunchError, RunningServer, own_server
from shoplm.bench.load import run_load
from shoplm.bench.observe import ServerWatch, listening_process
from shoplm.bench.plan import LoadService, LoadSettings, Targets, parse_mix, poisson_arrivals
from shoplm.bench.summary import distribution, judge, summarise
from shoplm.bench.workload import Shop, WorkloadError, get_model, make_customers, read_shop, request_for

RESULTS = Path("benchmarks/results")
CONNECT_SECONDS = 10.0


def bench(
    address: Annotated[
        str | None, typer.Option(help="A running server; left out: one is started on loopback and stopped at the end.")
    ] = None,
    metrics_url: Annotated[str | None, typer.Option(help="Its /metrics, for the composition of steps.")] = None,
    token: Annotated[str | None, typer.Option(envvar="SHOPLM_TOKEN", help="Its token.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model of the server that is started.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="The bundle: served, and source of real histories.")] = None,
    rate: Annotated[float, typer.Option(help="Requests per second, over all services.")] = 2.0,
    seconds: Annotated[float, typer.Option(help="Measured seconds of the mixed load.")] = 60.0,
    warmup_seconds: Annotated[float, typer.Option(help="Seconds of load before, not measured.")] = 10.0,
    mix: Annotated[str, typer.Option(help="Weights of the services.")] = "recommendation=4,chat=3,prediction=3",
    customers: Annotated[int, typer.Option(help="Different customers.")] = 64,
    new_customer_share: Annotated[float, typer.Option(help="Share of them whose history nobody shares.")] = 0.5,
    chat_tokens: Annotated[int, typer.Option(help="Longest chat answer.")] = 32,
    recommendation_target: Annotated[float, typer.Option(help="In time, in seconds.")] = 0.1,
    prediction_target: Annotated[float, typer.Option(help="In time, in seconds.")] = 0.05,
    chat_first_target: Annotated[float, typer.Option(help="First text in time, in seconds.")] = 0.5,
    chat_token_target: Annotated[float, typer.Option(help="Each token in time, in seconds.")] = 0.06,
    deadline: Annotated[float, typer.Option(help="gRPC deadline of every call, in seconds.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Of arrivals, customers and prompts.")] = 1,
    mixed: Annotated[bool, typer.Option(help="Run the mixed load.")] = True,
    throughput: Annotated[bool, typer.Option(help="Run the offline throughput; needs --engine-api.")] = True,
    throughput_runs: Annotated[int, typer.Option(min=1, max=20, help="Runs of each; the median counts.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes.", dir_okay=False)] = None,
) -> None:
    """Measure a server: an open-loop mixed load of the three services, then offline throughput.

    Exits with 1 when the verdict is INVALID or something could not be measured.
    """
    console = Console()
    machine = report.machine()
    with _errors_told():
        settings = LoadSettings(
            rate=rate,
            seconds=seconds,
            warmup_seconds=warmup_seconds,
            mix=parse_mix(mix),
            targets=Targets(recommendation_target, prediction_target, chat_first_target, chat_token_target),
            deadline_seconds=deadline,
            customers=customers,
            new_customer_share=new_customer_share,
            chat_tokens=chat_tokens,
            seed=seed,
        )
        shapes = (offline.PROMPTS, offline.OUTPUTS) if throughput else ()
        work = Work(settings if mixed else None, shapes, throughput_runs, bundle, token)
        with ExitStack() as stack:
            if address is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoplm-bench-")))
                console.print("starting a server …")
                server = stack.enter_context(own_server(_serve_arguments(base, bundle), folder / "server.log"))
            else:
                server = RunningServer(address, metrics_url, _local_process(address))
            measured = asyncio.run(measure(console, server, work))
    path = output or RESULTS / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    report.write_json(measured, machine, path)
    report.print_report(measured, console)
    console.print(f"[dim]written to {path}[/dim]")
    if measured.load is not None and measured.load.verdict.status == "INVALID":
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Work:
    """What one run of the command measures; `load` None leaves the mixed load out."""

    load: LoadSettings | None
    shapes: tuple[offline.OfflineShape, ...]
    runs: int
    bundle: Path | None
    token: str | None


async def measure(console: Console, server: RunningServer, work: Work) -> report.Report:
    """Do the work against a running server. Raises WorkloadError, OfflineError or a gRPC error."""
    metadata = () if work.token is None else (("authorization", f"Bearer {work.token}"),)
    async with open_channel(server.address) as channel:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        model = await get_model(channel, metadata)
        shop = None if work.load is None else await read_shop(channel, model, work.bundle, metadata)
    load = None
    if work.load is not None and shop is not None:
        console.print(f"mixed load: {work.load.warmup_seconds:g} s of warm-up, then {work.load.seconds:g} s …")
        load = await measure_load(server, work.token, shop, work.load)
    results = []
    for shape in work.shapes:
        console.print(f"offline: {shape.requests} x {shape.prompt_tokens} in, {shape.output_tokens} out …")
        results.append(await offline.run_offline(server.address, shape, runs=work.runs, token=work.token))
    version = model.model
    served = report.Served(version.bundle, version.version, version.base_model, model.server_version)
    return report.Report(served, load, tuple(results))


async def measure_load(
    server: RunningServer, token: str | None, shop: Shop, settings: LoadSettings
) -> report.LoadResult:
    """Run the mixed load of `settings` and sum it up."""
    watch = ServerWatch(server.metrics_url, server.pid)
    people = make_customers(shop, settings)
    arrivals = poisson_arrivals(settings, len(people))
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
        service: summarise(service, run, settings.targets)
        for service in LoadService
        if settings.mix.get(service, 0) > 0
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


@contextmanager
def _errors_told() -> Iterator[None]:
    """What can go wrong becomes one line on stderr and an exit code: 2 for a wrong option, 1 for the rest."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        typer.echo(f"shoplm bench: {error.code().name}: {error.details()}", err=True)
        raise typer.Exit(1) from error
    except TimeoutError as error:
        typer.echo(f"shoplm bench: no server accepted a connection within {CONNECT_SECONDS:g} s", err=True)
        raise typer.Exit(1) from error
    except (LaunchError, WorkloadError, offline.OfflineError) as error:
        typer.echo(f"shoplm bench: {error}", err=True)
        raise typer.Exit(1) from error
    except ValueError as error:
        typer.echo(f"shoplm bench: {error}", err=True)
        raise typer.Exit(2) from error


def _serve_arguments(base: str | None, bundle: Path | None) -> list[str]:
    arguments = [] if base is None else ["--base", base]
    return arguments if bundle is None else [*arguments, "--bundle", str(bundle)]


def _local_process(address: str) -> int | None:
    """The process that listens at an address of this machine, where it can be seen."""
    parts = urlsplit(f"//{address}")
    if parts.hostname not in ("127.0.0.1", "localhost", "::1") or parts.port is None:
        return None
    return listening_process(parts.port)
