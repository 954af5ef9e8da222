"""`shoplm simulate`: size a fleet before it is bought."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from shoplm.request import Service
from shoplm.scheduler.config import SchedulerConfig, SchedulingPolicy
from shoplm.simulate.backend import Capacity
from shoplm.simulate.curve import CurveError, read_curve
from shoplm.simulate.fleet import IN_TIME_SHARE, Fleet, FleetResult, find_capacity
from shoplm.simulate.plot import Chart, page
from shoplm.simulate.trace import Arrival, Shape, TraceError, draw, faster, parse_mix, read_trace, write_trace

DRAWN = "drawn"
_TIMES = ("p50", "p95", "p99", "first95")


def simulate(
    cost: Annotated[str, typer.Option(help="File of benchmarks/cost_curve.py, or step=S,token=S,kv=S,row=S.")],
    trace: Annotated[str, typer.Option(help="File of JSON lines; `drawn`: a seeded one as the options say.")] = DRAWN,
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 1,
    sample: Annotated[int | None, typer.Option(min=1, help="Simulate only so many of them.")] = None,
    load: Annotated[str, typer.Option(help="Multiples of the trace's rate, each one run.")] = "0.5,0.75,1,1.25,1.5,2",
    policy: Annotated[str, typer.Option(help="slack or fcfs.")] = "slack",
    deadlines: Annotated[bool, typer.Option(help="Callers set their targets as deadlines.")] = True,
    recommendation_target: Annotated[float, typer.Option(help="Seconds.")] = 0.1,
    prediction_target: Annotated[float, typer.Option(help="Seconds.")] = 0.05,
    chat_first_target: Annotated[float, typer.Option(help="Seconds to the first token.")] = 0.5,
    chat_token_target: Annotated[float, typer.Option(help="Seconds for each token.")] = 0.06,
    rate: Annotated[float, typer.Option(help="Drawn: requests per second and replica.")] = 5.0,
    seconds: Annotated[float, typer.Option(help="Drawn: how long.")] = 300.0,
    mix: Annotated[str, typer.Option(help="Drawn: weights.")] = "recommendation=4,chat=3,prediction=3",
    burstiness: Annotated[float, typer.Option(help="Drawn: variation of the gaps; 1: Poisson.")] = 1.0,
    customers: Annotated[int, typer.Option(help="Drawn: returning customers of a replica.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the trace and of the steps' noise.")] = 1,
    warm_up: Annotated[float, typer.Option(help="Seconds at the start that do not count.")] = 20.0,
    pages: Annotated[int, typer.Option(help="Cache of an engine, in pages of 16 tokens.")] = 4096,
    max_step_tokens: Annotated[int, typer.Option(help="As the server's setting.")] = 512,
    max_mixed_prompt_tokens: Annotated[int, typer.Option(help="As the server's setting.")] = 128,
    trie_depth: Annotated[int, typer.Option(min=1, help="Codes per item.")] = 1,
    capacity: Annotated[bool, typer.Option(help="Find the highest rate that each service holds.")] = False,
    compare: Annotated[bool, typer.Option(help="The same for fcfs and for one engine per service.")] = False,
    plot: Annotated[Path | None, typer.Option(help="HTML file with curves over load.", dir_okay=False)] = None,
    save_trace: Annotated[Path | None, typer.Option(help="Write the trace that was drawn.", dir_okay=False)] = None,
) -> None:
    """Run the real scheduler on simulated time, over a trace, with the costs of a machine.

    Prints for each load what each service gets in time, its latencies, and what an answer in time costs.
    """
    with _errors_as_exit_codes():
        targets = {
            Service.RECOMMENDATION: recommendation_target,
            Service.PREDICTION: prediction_target,
            Service.CHAT: chat_first_target,
        }
        rules = SchedulingPolicy(_order(policy), targets, chat_token_target)
        config = SchedulerConfig(
            max_step_tokens=max_step_tokens,
            max_mixed_prompt_tokens=min(max_mixed_prompt_tokens, max_step_tokens),
            policy=rules,
        )
        fleet = Fleet(
            config, read_curve(cost), Capacity(pages=pages, trie_depth=trie_depth), replicas, sample, seed=seed
        )
        shape = Shape(rate * replicas, seconds, parse_mix(mix), burstiness, customers * replicas, seed=seed)
        arrivals = list(draw(shape)) if trace == DRAWN else read_trace(Path(trace))
        if save_trace is not None:
            write_trace(arrivals, save_trace)
        if deadlines:
            arrivals = [with_deadline(each, rules) for each in arrivals]
        if not arrivals:
            raise ValueError("nothing arrives: raise the rate or the seconds")
        if not 0.0 <= warm_up < arrivals[-1].seconds:
            raise ValueError(
                f"--warm-up {warm_up:g}: expected seconds from 0 to the last arrival, at {arrivals[-1].seconds:.4g}"
            )
        loads = _loads(load)
        results = _sweep(fleet, arrivals, loads, warm_up)
        if capacity or compare:
            _capacities(fleet, arrivals, warm_up, compare)
        if plot is not None:
            plot.write_text(_page(results, _rate(arrivals), warm_up), "utf-8")
            typer.echo(f"written to {plot}")


def with_deadline(arrival: Arrival, policy: SchedulingPolicy) -> Arrival:
    """The arrival with its target as its deadline, unless it has one: for a chat, that of its last token."""
    if arrival.deadline_seconds is not None:
        return arrival
    allowed = policy.target_seconds[arrival.service] + arrival.output_tokens * policy.token_target_seconds
    return msgspec.structs.replace(arrival, deadline_seconds=allowed)


def _loads(text: str) -> list[float]:
    """`0.5,1,2` as numbers. ValueError names the part that is wrong."""
    loads = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 0.0 < value < float("inf"):
            raise ValueError(f"load {part!r} is no number above 0")
        loads.append(value)
    return loads


def _order(policy: str) -> Literal["slack", "fcfs"]:
    orders: dict[str, Literal["slack", "fcfs"]] = {"slack": "slack", "fcfs": "fcfs"}
    if policy not in orders:
        raise ValueError(f"policy {policy!r} is neither slack nor fcfs")
    return orders[policy]


def _rate(arrivals: Sequence[Arrival]) -> float:
    return len(arrivals) / max(arrivals[-1].seconds, 1e-9)


def _sweep(
    fleet: Fleet, arrivals: Sequence[Arrival], loads: Sequence[float], warm_up: float
) -> dict[float, FleetResult]:
    rate = _rate(arrivals)
    typer.echo(f"{fleet.replicas} replicas, {fleet.simulated} simulated; {len(arrivals)} requests; milliseconds")
    typer.echo(_line("load", "rate", "service", "in time", "refused", "expired", "degraded", "late", "per s", *_TIMES))
    results: dict[float, FleetResult] = {}
    for load in loads:
        result = results[load] = fleet.run(faster(arrivals, load))
        for service, each in result.services(warm_up / load).items():
            counts = map(str, (each.refused, each.expired, each.degraded, each.late))
            times = (each.latency["p50"], each.latency["p95"], each.latency["p99"], each.first["p95"])
            shown = ("-" if value is None else f"{1e3 * value:.0f}" for value in times)
            share = "-" if each.in_time_share is None else f"{each.in_time_share:.1%}"
            goodput = f"{each.goodput:.4g}"
            typer.echo(_line(f"{load:g}", f"{load * rate:.4g}", service.value, share, *counts, goodput, *shown))
        cost = result.replica_seconds_per_answer()
        typer.echo(f"        busy {result.utilisation:.0%}; an answer in time costs {cost:.3g} replica-seconds")
    return results


def _line(load: str, rate: str, service: str, *numbers: str) -> str:
    return f"{load:>5} {rate:>8} {service:15}" + "".join(f" {number:>8}" for number in numbers)


def _capacities(fleet: Fleet, arrivals: Sequence[Arrival], warm_up: float, compare: bool) -> None:
    """The highest rate at which each service has 90 % in time: this fleet, and what it is compared with."""
    rate = _rate(arrivals)

    def capacity_of(each: Fleet, split: bool = False) -> float:
        def holds(load: float) -> bool:
            run = each.run_split if split else each.run
            return run(faster(arrivals, load)).holds(warm_up / load)

        return find_capacity(holds, 1.0)

    own = capacity_of(fleet)
    typer.echo(f"capacity ({IN_TIME_SHARE:.0%} of each service in time): {own * rate:.4g} requests/s")
    if not compare:
        return
    other = replace(fleet, config=replace(fleet.config, policy=replace(fleet.config.policy, order="fcfs")))
    theirs = capacity_of(other)
    typer.echo(f"  first come, first served: {theirs * rate:.4g} requests/s{_ratio(own, theirs)}")
    above = faster(arrivals, 1.5 * own)
    here, there = (each.run(above).goodput(warm_up / own / 1.5) for each in (fleet, other))
    typer.echo(f"  in time at 1.5 x capacity: {here:.4g}/s, fcfs {there:.4g}/s{_ratio(here, there)}")
    if own:
        at, twice = (fleet.run(faster(arrivals, load)).services(warm_up / load) for load in (own, 2 * own))
        kept = (f"{s.value} {twice[s].goodput / each.goodput:.0%}" for s, each in at.items() if each.goodput)
        typer.echo(f"  of each service's answers in time at capacity, at 2 x capacity: {', '.join(kept)}")
    if fleet.replicas == 1:
        split = capacity_of(fleet, split=True)
        typer.echo(f"  three engines with a third each: {split * rate:.4g} requests/s{_ratio(own, split)}")


def _ratio(own: float, other: float) -> str:
    return f" (x {own / other:.2f})" if other else " (not at any rate)"


def _page(results: dict[float, FleetResult], rate: float, warm_up: float) -> str:
    loads = sorted(results)
    rates = [load * rate for load in loads]
    services = [results[load].services(warm_up / load) for load in loads]
    axis = "offered requests per second"
    goodput = {service.value: [each[service].goodput for each in services] for service in Service}
    latency = {service.value: [each[service].latency["p95"] for each in services] for service in Service}
    share = {service.value: [each[service].in_time_share for each in services] for service in Service}
    costs = [results[load].replica_seconds_per_answer() for load in loads]
    return page(
        "shoplm simulate",
        "The real scheduler on simulated time. In time: by the targets that were given.",
        (
            Chart("Goodput", axis, "answers in time per second", rates, goodput),
            Chart("In time", axis, "share of the offered", rates, share),
            Chart("Latency", axis, "95th percentile, seconds", rates, latency),
            Chart("Cost", axis, "replica-seconds per answer in time", rates, {"all": costs}),
        ),
    )


@contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    """What the caller can mend becomes one line and exit code 2."""
    try:
        yield
    except (TraceError, CurveError, ValueError, OSError) as error:
        typer.echo(f"shoplm simulate: {error}", err=True)
        raise typer.Exit(2) from error
