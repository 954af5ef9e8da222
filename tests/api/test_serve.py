"""`shoplm serve`: signals, exit codes, and what it says once it is ready."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted_engine import ScriptedEngine
from served_shop import RECOMMEND, Serve, ShopFolders
from server_thread import SERVING, TIMEOUT_SECONDS
from shoplm.config import ServerConfig
from shoplm.errors import BundleChangedError
from shoplm.model.origin import Origin
from shoplm.serve import ready_text, serve
from shoplm.v1 import recommendation_pb2_grpc
from tiny_shop import DEMO_CUSTOMER


def _signalled(capsys: pytest.CaptureFixture[str], config: ServerConfig, *signals: signal.Signals) -> int:
    """Exit code of a server that gets these once it is ready."""

    async def run() -> int:
        serving = asyncio.create_task(serve(config, lambda *_: ScriptedEngine()))
        while "is ready" not in capsys.readouterr().out:  # noqa: ASYNC110 - it says so on standard output only
            await asyncio.sleep(0)
        for number in signals:
            os.kill(os.getpid(), number)
        return await asyncio.wait_for(serving, TIMEOUT_SECONDS)

    return asyncio.run(run())


def test_a_server_whose_ready_line_cannot_be_written_serves(
    shop_folders: ShopFolders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> int:
        serving = asyncio.create_task(
            serve(shop_folders.config("--lame-duck-seconds", "0"), lambda *_: ScriptedEngine())
        )
        while "cannot be written: No space left" not in caplog.text:
            assert not serving.done()
            await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        return await asyncio.wait_for(serving, TIMEOUT_SECONDS)

    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert asyncio.run(run()) == 0


@pytest.fixture
def hangups_count() -> Iterator[None]:
    """Also where the tests run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_count")
@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGHUP, signal.SIGHUP)], ids=["term", "hangup"])
def test_a_signal_ends_the_server_with_exit_code_zero(
    shop_folders: ShopFolders, capsys: pytest.CaptureFixture[str], signals: tuple[signal.Signals, ...]
) -> None:
    assert _signalled(capsys, shop_folders.config("--lame-duck-seconds", "0"), *signals) == 0


@pytest.mark.usefixtures("hangups_count")
def test_a_hangup_that_nohup_ignores_is_ignored(shop_folders: ShopFolders, capsys: pytest.CaptureFixture[str]) -> None:
    config = shop_folders.config("--lame-duck-seconds", "0")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert _signalled(capsys, config, signal.SIGHUP, signal.SIGTERM) == 0  # a second one's is 130


@pytest.mark.usefixtures("hangups_count")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_terminal_waits_for_no_balancer(
    shop_folders: ShopFolders, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    patient = shop_folders.config("--drain-seconds", "600", "--lame-duck-seconds", "300")
    assert _signalled(capsys, patient, number) == 0


def test_a_server_without_hope_of_an_engine_drains_and_ends_to_be_started_again(shop_folders: ShopFolders) -> None:
    engine = ScriptedEngine()
    patient = shop_folders.config("--drain-seconds", "600", "--lame-duck-seconds", "300")

    async def run() -> int:
        serving = asyncio.create_task(serve(patient, lambda *_: engine))
        while engine.ready is None:  # noqa: ASYNC110 - the server says that it is ready on standard output only
            await asyncio.sleep(0)
        engine.end(BundleChangedError("another bundle"))
        return await asyncio.wait_for(serving, TIMEOUT_SECONDS)

    assert asyncio.run(run()) == 75


def test_a_second_signal_stops_at_once_although_a_call_runs(shop_folders: ShopFolders) -> None:
    engine = ScriptedEngine()
    engine.holds = True

    async def run() -> tuple[int, grpc.StatusCode, float]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = ("--port", str(port), "--drain-seconds", "600")
        serving = asyncio.create_task(serve(shop_folders.config(*flags), lambda *_: engine))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = recommendation_pb2_grpc.RecommendationServiceStub(channel).Recommend(RECOMMEND, wait_for_ready=True)
            await engine.started.wait()
            os.kill(os.getpid(), signal.SIGINT)
            health = health_pb2_grpc.HealthStub(channel)
            while (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert not serving.done()  # it drains: the call runs
            second = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
            code = await asyncio.wait_for(serving, TIMEOUT_SECONDS)
            return code, await call.code(), time.monotonic() - second

    code, status, seconds = asyncio.run(run())
    assert (code, status) == (130, grpc.StatusCode.UNAVAILABLE)  # which the caller may try elsewhere
    assert seconds < 5.0
    assert engine.cancelled


def test_the_ready_text_is_three_calls_to_copy(serve_scripted: Serve) -> None:
    server = serve_scripted().server.server
    lines = ready_text(server, 1.25).splitlines()
    assert lines[0].endswith("is ready after 1.2 s: Tiny Shop (tiny-shop 1) on base")
    verbs = [line.split()[:2] for line in lines[3:]]
    assert verbs == [["shoplm", "recommend"], ["shoplm", "predict"], ["shoplm", "chat"]]
    assert all(f"--customer {DEMO_CUSTOMER} --address 127.0.0.1:{server.port}" in line for line in lines[3:])


def test_the_ready_text_calls_no_service_that_has_no_words_or_foretells_nothing(serve_scripted: Serve) -> None:
    server = serve_scripted().server.server
    assert server.served is not None
    server.served = replace(server.served, base=replace(server.served.base, origin=Origin.SCRATCH))
    verbs = [line.split()[1] for line in ready_text(server, 1.0).splitlines()[3:]]
    assert verbs == ["recommend", "predict"]
    shop = server.served.shop
    assert shop is not None
    silent = replace(shop, manifest=msgspec.structs.replace(shop.manifest, targets=()))
    server.served = replace(server.served, shop=silent)
    assert [line.split()[1] for line in ready_text(server, 1.0).splitlines()[3:]] == ["recommend"]


def test_all_addresses_of_ipv6_are_those_of_ipv4_too(serve_scripted: Serve) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = serve_scripted("--metrics-host", "::", "--host", "::").server.server
    for host in ("[::1]", "127.0.0.1"):
        with urllib.request.urlopen(f"http://{host}:{server.metrics_port}/readyz", timeout=TIMEOUT_SECONDS) as answer:
            assert answer.status == 200
    _, line, *_ = ready_text(server, 1.0).splitlines()
    assert line == f"  gRPC [::]:{server.port}   metrics http://[::]:{server.metrics_port}/metrics"


def test_the_api_process_never_imports_torch() -> None:
    code = (
        "import sys, shoplm.serve, shoplm.api.grpc_server, shoplm.model.tokenizer, bm25s\n"
        "print([name for name in ('torch', 'transformers', 'triton') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
