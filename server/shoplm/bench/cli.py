"""`shoplm bench`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.console import Console
from shoplm.bench import offline, report
from shoplm.bench.launch import LaunchError
from shoplm.bench.plan import LoadSettings, Targets
from shoplm.bench.run import CONNECT_SECONDS, Target, Work, measure, serve_arguments, server, sweep_rates
from shoplm.bench.sweep import read_rates
from shoplm.bench.workload import WorkloadError
from shoplm.simulate.trace import parse_mix, read_trace

RESULTS = Path("benchmarks/results")


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
    deadline_at_target: Annotated[
        bool, typer.Option(help="Give each call the deadline that its target is, so that the server can refuse it.")
    ] = False,
    burstiness: Annotated[float, typer.Option(help="Of the gaps between arrivals; 1 is Poisson, 3 is bursty.")] = 1.0,
    trace: Annotated[
        Path | None, typer.Option(help="Replay this trace (see `shoplm simulate`), brought to the rate.")
    ] = None,
    allow_degraded: Annotated[bool, typer.Option(help="Let the server make answers smaller.")] = True,
    rates: Annotated[str | None, typer.Option(help="Several rates, such as 1,2,4; replaces --rate.")] = None,
    find_knee: Annotated[bool, typer.Option(help="Search for the capacity, from --rate on.")] = False,
    minutes: Annotated[float, typer.Option(min=0.01, help="That the search may take.")] = 30.0,
    policies: Annotated[
        str, typer.Option(help="Scheduling policies to compare at the same rates: slack,fcfs; a server for each.")
    ] = "",
    rounds: Annotated[
        int,
        typer.Option(
            min=1, max=20, help="Windows of --seconds at each rate, the policies in turns; they count as one."
        ),
    ] = 1,
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
    with _errors_as_exit_codes():
        settings = LoadSettings(
            rate=rate,
            seconds=seconds,
            warmup_seconds=warmup_seconds,
            mix=parse_mix(mix),
            targets=Targets(recommendation_target, prediction_target, chat_first_target, chat_token_target),
            deadline_seconds=deadline,
            deadline_at_target=deadline_at_target,
            burstiness=burstiness,
            allow_degraded=allow_degraded,
            customers=customers,
            new_customer_share=new_customer_share,
            chat_tokens=chat_tokens,
            seed=seed,
        )
        traced = None if trace is None else read_trace(trace)
        sweeping = bool(rates) or find_knee
        path = output or RESULTS / f"{'sweep-' * sweeping}{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
        _check_writable(path)
        if sweeping:
            targets = Target(address, metrics_url, token, base, bundle)
            chosen = [] if rates is None else read_rates(rates)
            chosen_policies = policies.split(",") if policies else []
            sweeps = sweep_rates(
                console, targets, settings, traced, chosen, chosen_policies, rounds, 60 * minutes, path
            )
            if any(point.verdict.status == "INVALID" for sweep in sweeps for point in sweep.points):
                raise typer.Exit(1)
            return
        if policies:
            raise ValueError("--policies needs --rates or --find-knee")
        if rounds > 1:
            raise ValueError("--rounds needs --rates or --find-knee")
        shapes = (offline.PROMPTS, offline.OUTPUTS) if throughput else ()
        work = Work(settings if mixed else None, shapes, throughput_runs, bundle, token, traced)
        with server(console, address, metrics_url, serve_arguments(base, bundle, settings.targets)) as running:
            measured = asyncio.run(measure(console, running, work))
    report.print_report(measured, console)
    report.write_json(measured, machine, path)
    console.print(f"[dim]written to {path}[/dim]")
    if measured.load is not None and measured.load.verdict.status == "INVALID":
        raise typer.Exit(1)


def _check_writable(path: Path) -> None:
    """Raises ValueError before anything is measured."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if path.is_dir() or not os.access(there, os.W_OK) or not (there.is_dir() or there == path):
        raise ValueError(f"--output {path} cannot be written")


@contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
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
