"""The load generator over loopback: open loop, real calls, the command and what it writes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import typer
from shoplm.bench import run
from shoplm.bench.cli import bench
from shoplm.bench.launch import LaunchError, RunningServer, own_server
from shoplm.bench.load import run_load
from shoplm.bench.observe import listening_process
from shoplm.bench.offline import OfflineError, OfflineShape, run_offline
from shoplm.bench.plan import Arrival, LoadSettings, drawn_arrivals
from shoplm.bench.workload import Shop, request_for
from shoplm.request import Service
from shoplm.v1 import shop_pb2
from typer.testing import CliRunner

# Test modules are imported one by one (importlib mode); the canned server lies beside the clients' tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "clients"))

from canned_server import ANSWER, CannedServer

application = typer.Typer()
application.command()(bench)

EVEN = dict.fromkeys(Service, 1.0)


@pytest.fixture
def server() -> Iterator[CannedServer]:
    """A fresh server on a free port of loopback."""
    with CannedServer() as running:
        yield running


def settings_of(
    seconds: float = 1.0, rate: float = 60.0, deadline: float = 5.0, max_in_flight: int = 100
) -> LoadSettings:
    return LoadSettings(
        rate=rate,
        seconds=seconds,
        warmup_seconds=0.2,
        mix=EVEN,
        customers=2,
        deadline_seconds=deadline,
        max_in_flight=max_in_flight,
    )


async def test_every_arrival_becomes_one_outcome(server: CannedServer) -> None:
    settings = settings_of()
    arrivals = drawn_arrivals(settings, 2)
    customers = (shop_pb2.Customer(customer_id="7"), shop_pb2.Customer(customer_id="refused"))
    windows: list[str] = []

    async def note(name: str) -> None:
        windows.append(name)

    run = await run_load(
        server.address,
        settings,
        arrivals,
        lambda arrival: request_for(arrival, customers, settings),
        window_starts=lambda: note("start"),
        window_ends=lambda: note("end"),
    )
    assert windows == ["start", "end"]
    assert [(o.service, o.measured) for o in run.outcomes] == [(a.service, a.measured) for a in arrivals]
    for made, arrival in zip(run.outcomes, arrivals, strict=True):
        refused = arrival.customer == 1
        assert made.code is (grpc.StatusCode.RESOURCE_EXHAUSTED if refused else grpc.StatusCode.OK)
        # The canned server takes something wherever it may; predictions without reasons have nothing to take.
        assert made.degraded == (not refused and arrival.service is not Service.PREDICTION)
        assert made.intended <= made.sent <= made.end
        if arrival.service is Service.CHAT and not refused:
            assert made.completion_tokens == len(ANSWER)
            assert len(made.gaps) == len(ANSWER) - 1
            assert made.first is not None and made.sent < made.first <= made.end


async def test_a_server_that_stalls_does_not_slow_the_arrivals(server: CannedServer) -> None:
    settings = settings_of(rate=40, deadline=1.5)
    arrivals = drawn_arrivals(settings, 1)
    slow = (shop_pb2.Customer(customer_id="slow"),)
    run = await run_load(server.address, settings, arrivals, lambda arrival: request_for(arrival, slow, settings))
    # A closed loop would have sent one; here all are out long before the first deadline ends.
    assert len(run.outcomes) == len(arrivals) > 20
    assert all(made.expired for made in run.outcomes)
    assert max(made.sent for made in run.outcomes) < min(made.end for made in run.outcomes)


async def test_a_client_over_its_bound_says_so(server: CannedServer) -> None:
    settings = settings_of(rate=40, deadline=1.5, max_in_flight=3)
    arrivals = [Arrival(0.3 + 0.01 * number, Service.PREDICTION, 0, True) for number in range(10)]
    slow = (shop_pb2.Customer(customer_id="slow"),)
    run = await run_load(server.address, settings, arrivals, lambda arrival: request_for(arrival, slow, settings))
    assert (len(run.outcomes), run.dropped) == (3, 7)


async def test_offline_counts_tokens_and_says_what_failed(server: CannedServer) -> None:
    result = await run_offline(server.address, OfflineShape("small", 4, 8, 5), runs=2)
    assert len(result.seconds) == 2
    assert result.prompt_tokens_per_second == pytest.approx(result.output_tokens_per_second * 8 / 5)
    with pytest.raises(OfflineError, match="DEADLINE_EXCEEDED"):
        await run_offline(server.address, OfflineShape("endless", 1, 8, 1_000_000), timeout_seconds=0.01)


def test_the_command_measures_writes_and_judges(server: CannedServer, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    arguments = ["--address", server.address, "--seconds", "1.5", "--warmup-seconds", "0.3", "--rate", "60"]
    result = CliRunner().invoke(
        application,
        [*arguments, "--throughput-runs", "1", "--customers", "6", "--output", str(output)],
        env={"COLUMNS": "160"},
    )
    assert result.exit_code == 1, result.output  # too short to be quoted
    assert "INVALID too short" in result.output
    content = json.loads(output.read_text())
    assert content["served"]["bundle"] == "canned"
    assert content["machine"]["cores"] >= 1
    assert {"python", "grpcio"} <= set(content["versions"])
    services = content["load"]["services"]
    assert set(services) == {"recommendation", "chat", "prediction"}
    for summary in services.values():
        assert summary["offered"] == summary["completed"] > 0
        assert summary["latency"]["p50"] > 0
    assert services["chat"]["first_text"]["count"] == services["chat"]["completed"]
    assert content["load"]["use"]["cpu_seconds"] > 0  # of this process, which hosts the canned server
    assert [part["shape"]["prompt_tokens"] for part in content["offline"]] == [512, 128]
    assert "offline 32 x 512 in, 1 out" in result.output


def test_the_command_explains_what_it_cannot_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(application, ["--mix", "search=1"])
    assert result.exit_code == 2
    assert "'search' is not one of" in result.stderr
    log = tmp_path / "log"
    with pytest.raises(LaunchError, match="ended with exit code"), own_server(["--no-such-option"], log):
        pass


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(application, arguments, env={"COLUMNS": "160"})


def test_the_command_sweeps_rates_with_every_flag_of_the_load(server: CannedServer, tmp_path: Path) -> None:
    output, trace = tmp_path / "sweep.json", tmp_path / "trace.jsonl"
    trace.write_text("\n".join(f'{{"seconds": {at}, "service": "prediction", "customer": {at}}}' for at in range(1, 5)))
    flags = ["--trace", str(trace), "--burstiness", "3", "--deadline-at-target", "--no-allow-degraded"]
    load = ["--seconds", "0.5", "--warmup-seconds", "0.2", "--mix", "prediction=1", "--prediction-target", "0.9"]
    result = invoke("--address", server.address, "--rates", "40,20", *load, *flags, "--output", str(output))
    assert result.exit_code == 1, result.output  # so short a run is INVALID
    written = json.loads(output.read_text())
    assert written["capacity"] == {"server": 40.0}
    (sweep,) = written["sweeps"]
    assert [point["settings"]["rate"] for point in sweep["points"]] == [20.0, 40.0]
    for point in sweep["points"]:
        assert point["settings"]["burstiness"] == 3.0
        assert set(point["services"]) == {"prediction"}
        # The trace's even gaps, not drawn ones.
        assert point["services"]["prediction"]["offered"] == pytest.approx(point["settings"]["rate"] / 2, abs=1)
    assert server.record.last_request.allow_degraded is False
    given = [seconds for seconds in server.record.remaining_seconds.values() if seconds is not None]
    assert 0.5 < max(given) < 0.95  # gRPC rounds what is left up
    assert "<svg" in output.with_suffix(".html").read_text()


def test_the_command_searches_the_knee_within_the_minutes_that_it_is_given(
    server: CannedServer, tmp_path: Path
) -> None:
    load = ["--seconds", "0.3", "--warmup-seconds", "0", "--mix", "prediction=1", "--prediction-target", "2"]
    output = tmp_path / "knee.json"
    result = invoke(
        *(
            "--address",
            server.address,
            "--find-knee",
            "--minutes",
            "0.01",
            "--rate",
            "20",
            "--output",
            str(output),
            *load,
        )
    )
    assert result.exit_code == 1, result.output  # so short a run is INVALID
    (sweep,) = json.loads(output.read_text())["sweeps"]
    # No time to double the rate: the first one, and those beyond it.
    assert [point["settings"]["rate"] for point in sweep["points"]] == [20.0, 30.0, 40.0]


def test_the_command_starts_a_server_for_each_policy(
    server: CannedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    @contextmanager
    def stand_in(arguments: list[str], log: Path) -> Iterator[RunningServer]:
        started.append(arguments[arguments.index("--scheduling-policy") + 1])
        yield RunningServer(server.address, None, None)

    monkeypatch.setattr("shoplm.bench.run.own_server", stand_in)
    output = tmp_path / "policies.json"
    load = ["--seconds", "0.3", "--warmup-seconds", "0", "--mix", "prediction=1", "--prediction-target", "2"]
    result = invoke("--policies", "slack,fcfs", "--rates", "20", *load, "--output", str(output))
    assert result.exit_code == 1, result.output  # so short a run is INVALID
    assert started == ["slack", "fcfs"]
    assert json.loads(output.read_text())["capacity"] == {"slack": 20.0, "fcfs": 20.0}


def test_rounds_of_a_rate_are_taken_in_turns_and_count_as_one(
    server: CannedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, int]] = []
    offered: dict[int, int] = {}

    @contextmanager
    def stand_in(arguments: list[str], log: Path) -> Iterator[RunningServer]:
        policy = arguments[arguments.index("--scheduling-policy") + 1]
        yield RunningServer(server.address, f"http://127.0.0.1:1/{policy}", None)

    async def noted(
        running: RunningServer, token: str | None, shop: Shop, settings: LoadSettings, trace: None
    ) -> run.Window:
        sent.append((str(running.metrics_url).rpartition("/")[2], settings.seed))
        window = await observed(running, token, shop, settings, trace)
        offered[settings.seed] = sum(outcome.measured for outcome in window.run.outcomes)
        return window

    observed = run.observe_load
    monkeypatch.setattr(run, "own_server", stand_in)
    monkeypatch.setattr(run, "observe_load", noted)
    output = tmp_path / "rounds.json"
    load = ["--seconds", "0.3", "--warmup-seconds", "0", "--mix", "prediction=1", "--prediction-target", "2"]
    flags = ["--policies", "slack,fcfs", "--rates", "20", "--rounds", "3", "--seed", "5"]
    result = invoke(*flags, *load, "--output", str(output))
    assert result.exit_code == 1, result.output  # so short a run is INVALID
    assert sent == [(policy, seed) for seed in (6, 7, 8) for policy in ("slack", "fcfs")]
    for sweep in json.loads(output.read_text())["sweeps"]:
        (point,) = sweep["points"]
        prediction = point["services"]["prediction"]
        assert point["windows"] == 3
        assert prediction["in_time"] == prediction["offered"] == sum(offered[seed] for seed in (6, 7, 8))
        assert prediction["offered_per_second"] == pytest.approx(prediction["offered"] / 0.9)
        assert len(point["problems"]) == 2  # no metrics, no process: each is told once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "2"], "--rounds needs --rates or --find-knee"),
        (["--policies", "slack,fcfs"], "--policies needs --rates or --find-knee"),
        (["--policies", "slack", "--rates", "1", "--address", "127.0.0.1:1"], "leave --address out"),
        (["--rates", "1,fast"], "--rates '1,fast': expected requests a second above 0, such as 3,6,9"),
        (["--rates", "0"], "--rates '0': expected"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


async def test_the_listening_process_is_found(server: CannedServer) -> None:
    port = int(server.address.rpartition(":")[2])
    assert await asyncio.to_thread(listening_process, port) == os.getpid()


def test_a_terminated_bench_leaves_no_server_behind(tmp_path: Path) -> None:
    """A stand-in for the bench: it starts a server that is never ready, and is told to end meanwhile."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from shoplm.bench import launch\n"
        "stand_in = [sys.executable, '-c', 'print(1, flush=True); import time; time.sleep(60)']\n"
        "popen = launch.subprocess.Popen\n"
        "def start(command, **rest):\n"
        "    process = popen(stand_in, **rest)\n"
        "    print(process.pid, flush=True)\n"
        "    return process\n"
        "launch.subprocess.Popen = start\n"
        f"with launch.own_server([], Path({str(tmp_path / 'log')!r})):\n"
        "    pass\n"
    )
    bench_process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert bench_process.stdout is not None
    server_pid = int(bench_process.stdout.readline())
    bench_process.terminate()
    assert bench_process.wait(30) == 128 + signal.SIGTERM
    bench_process.stdout.close()
    assert not psutil.pid_exists(server_pid)
