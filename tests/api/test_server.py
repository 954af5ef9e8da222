"""The server as operators see it: health, probes, start, drain, exit codes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted_engine import ScriptedEngine
from served_shop import Scripted, Serve, ShopFolders
from server_thread import TIMEOUT_SECONDS, ServerThread, bad_fields, detail
from shoplm.api.grpc_server import GrpcServer
from shoplm.client import Client
from shoplm.config import ServerConfig
from shoplm.config_sources import load_config
from shoplm.errors import BundleChangedError, BundleError, ConfigurationError, TransientError
from shoplm.metrics import Metrics
from shoplm.model.origin import Origin
from shoplm.request import StepStats
from shoplm.server import Server, _in_daemon, ready_text, serve
from shoplm.v1 import chat_pb2, model_pb2, prediction_pb2, recommendation_pb2, recommendation_pb2_grpc, shop_pb2
from tiny_shop import DEMO_CUSTOMER, write_base

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
RECOMMEND = recommendation_pb2.RecommendRequest(customer=shop_pb2.Customer(customer_id=DEMO_CUSTOMER))
ASK = chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="user", content="hello")])
SERVICES = ("Recommendation", "Chat", "Prediction", "Model")


def health(server: ServerThread, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(server.channel)
    status: int = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
    return status


@pytest.fixture
def chat_only(shop_folders: ShopFolders) -> Iterator[Scripted]:
    """A base without a bundle."""
    engine = ScriptedEngine()
    flags = ["--base", str(shop_folders.base), "--port", "0", "--metrics-port", "0"]
    with ServerThread(load_config(flags, {}), lambda *_: engine) as server:
        yield Scripted(server, engine)


def test_each_service_has_a_health_status(scripted_shop: Scripted) -> None:
    for service in ("", *(f"shoplm.v1.{name}Service" for name in (*SERVICES, "Engine"))):
        assert health(scripted_shop.server, service) == SERVING
    with pytest.raises(grpc.RpcError) as raised:
        health(scripted_shop.server, "shoplm.v1.NoService")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_base_without_a_bundle_serves_chat_only(chat_only: Scripted) -> None:
    server = chat_only.server
    statuses = {name: health(server, f"shoplm.v1.{name}Service") for name in SERVICES}
    assert statuses == {"Chat": SERVING, "Model": SERVING, "Recommendation": NOT_SERVING, "Prediction": NOT_SERVING}
    assert health(server) == SERVING
    for call in (
        lambda: server.recommendation.Recommend(RECOMMEND),
        lambda: server.recommendation.Rank(recommendation_pb2.RankRequest(item_ids=["a"])),
        lambda: server.prediction.Predict(prediction_pb2.PredictRequest()),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert detail(raised.value, error_details_pb2.ErrorInfo).reason == "NOT_SERVING"
        assert "--bundle" in str(raised.value.details())
    grounded = chat_pb2.ChatRequest(messages=ASK.messages, grounding=chat_pb2.GROUNDING_ON)
    with pytest.raises(grpc.RpcError, match="GROUNDING_ON") as raised:
        list(server.chat.Chat(grounded))
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    grounded.temperature = -1.0
    with pytest.raises(grpc.RpcError) as raised:  # what is wrong with the request itself is told first
        list(server.chat.Chat(grounded))
    assert list(bad_fields(raised.value)) == ["temperature"]
    *_, last = server.chat.Chat(ASK)
    assert (last.summary.model.bundle, last.summary.model.base_model) == ("", "base")
    assert not last.summary.citations
    model = server.model.GetModel(model_pb2.GetModelRequest())
    assert model.item_count == 0
    assert model.limits.max_context_tokens > 0


def test_events_of_a_customer_are_unknown_without_a_bundle(chat_only: Scripted) -> None:
    request = chat_pb2.ChatRequest()
    request.CopyFrom(ASK)
    event = request.customer.events.add(item_id="a")
    event.time.GetCurrentTime()
    *_, last = chat_only.server.chat.Chat(request)
    assert [warning.code for warning in last.summary.warnings] == ["UNKNOWN_ITEM"]
    assert last.summary.usage.history_tokens == 0


def test_health_and_readiness_follow_the_engine(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    server = scripted.server

    async def set_state(serving: bool) -> None:
        scripted.engine.set_state(serving)

    assert server.get("/readyz")[0] == 200
    server.run(set_state(False))
    assert (health(server), server.get("/readyz")[0], server.get("/healthz")[0]) == (NOT_SERVING, 503, 200)
    server.run(set_state(True))
    assert (health(server), server.get("/readyz")[0]) == (SERVING, 200)
    assert "shoplm_engine_losses_total 1.0" in server.get("/metrics")[2]


def test_a_scrape_shows_the_process_of_the_engine(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    assert "shoplm_engine_process" not in scripted.server.get("/metrics")[2]  # it has none of its own
    scripted.engine.process_id = os.getpid()
    text = scripted.server.get("/metrics")[2]
    assert "shoplm_engine_process_resident_memory_bytes " in text
    assert "shoplm_engine_process_cpu_seconds_total " in text


def test_a_scrape_passes_promtool_and_negotiates_openmetrics(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    scripted.engine.process_id = os.getpid()
    scripted.server.recommendation.Recommend(RECOMMEND)
    list(scripted.server.chat.Chat(ASK))

    async def publish() -> None:
        scripted.engine.publish(StepStats(step_seconds=(0.1,), failures={"chat:cancelled": 1}))

    scripted.server.run(publish())
    status, kind, text = scripted.server.get("/metrics")
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    assert 'shoplm_model_info{backend="scripted",base_model="base",bundle="tiny-shop"' in text
    _, kind, openmetrics = scripted.server.get("/metrics", {"Accept": "application/openmetrics-text"})
    assert kind.startswith("application/openmetrics-text")
    assert openmetrics.endswith("# EOF\n")
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    checked = subprocess.run(["promtool", "check", "metrics"], input=text.encode(), capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_other_paths_and_noise_do_not_hurt_the_probes(scripted_shop: Scripted) -> None:
    assert scripted_shop.server.get("/")[0] == 404
    assert scripted_shop.server.get("/../../etc/passwd")[0] == 404

    async def send(data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", scripted_shop.server.server.metrics_port)
        writer.write(data)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer

    run = scripted_shop.server.run
    assert run(send(b"POST /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405")
    assert run(send(b"\x16\x03\x01 not http\r\n\r\n")).startswith(b"HTTP/1.1 405")
    assert run(send(b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n")).startswith(b"HTTP/1.1 431")
    assert run(send(b"GET /met")) == b""
    head = run(send(b"HEAD /healthz HTTP/1.1\r\n\r\n"))
    assert head.startswith(b"HTTP/1.1 200")
    assert head.endswith(b"\r\n\r\n")
    assert scripted_shop.server.get("/healthz")[0] == 200


def _drain_with_a_running_call(scripted: Scripted, lame_duck_seconds: float = 0.0) -> tuple[Any, Future[bool]]:
    """A call that runs until the engine is released, and the drain that waits for it."""
    server = scripted.server
    scripted.engine.holds = True
    running = server.recommendation.Recommend.future(RECOMMEND, timeout=TIMEOUT_SECONDS)

    async def started() -> None:
        await scripted.engine.started.wait()

    server.run(started())
    drain = server.server.drain(2 * TIMEOUT_SECONDS, lame_duck_seconds)
    draining = asyncio.run_coroutine_threadsafe(drain, server.loop)
    server.wait_until(lambda: server.server.draining)
    return running, draining


async def _release(scripted: Scripted) -> None:
    scripted.engine.released.set()


def test_a_draining_server_takes_calls_until_callers_have_seen_that_it_does_not_serve(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    server = scripted.server
    running, draining = _drain_with_a_running_call(scripted, lame_duck_seconds=TIMEOUT_SECONDS)
    assert (health(server), server.get("/readyz")[0], server.get("/healthz")[0]) == (NOT_SERVING, 503, 200)
    assert server.model.GetModel(model_pb2.GetModelRequest()).item_count
    server.run(_release(scripted))
    assert running.result().items
    assert not draining.done()
    draining.cancel()


@pytest.mark.parametrize("health_checks", [False, True])
def test_no_call_of_a_client_with_another_server_fails_while_one_drains(
    serve_scripted: Serve, *, health_checks: bool
) -> None:
    drained, other = serve_scripted(), serve_scripted()
    addresses = f"ipv4:{drained.server.address},{other.server.address}"
    with Client(addresses, round_robin=True, health_checks=health_checks) as client:
        for server in (drained.server, other.server):
            client.get_model()
            server.model.GetModel(model_pb2.GetModelRequest())
        closed = threading.Event()
        drained.server.channel.subscribe(lambda state: state is not grpc.ChannelConnectivity.READY and closed.set())
        running, draining = _drain_with_a_running_call(drained)
        while not closed.is_set():  # the port is open yet
            client.get_model()
        for _ in range(20):
            client.get_model()
        assert drained.server.get("/readyz")[0] == 503
        assert not draining.done()
        drained.server.run(_release(drained))
        assert running.result().items
        assert draining.result(TIMEOUT_SECONDS) is True
    assert 'shoplm_refusals_total{reason="DRAINING",service="model"} 0.0' in drained.server.get("/metrics")[2]


def test_a_drain_that_takes_too_long_ends_calls_and_says_why(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    scripted.engine.holds = True
    running = scripted.server.recommendation.Recommend.future(RECOMMEND, timeout=TIMEOUT_SECONDS)
    talking = scripted.server.chat.Chat(ASK, timeout=TIMEOUT_SECONDS)
    assert next(talking).delta

    async def drain() -> bool:
        while len(scripted.engine.requests) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        return await scripted.server.server.drain(0.01)

    assert scripted.server.run(drain()) is False
    with pytest.raises(grpc.RpcError) as cut:
        list(talking)
    for error in (running.exception(), cut.value):
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert detail(error, error_details_pb2.ErrorInfo).reason == "DRAINING"
        assert detail(error, error_details_pb2.RetryInfo).retry_delay.seconds == 1
        assert "drain_seconds (0.01)" in str(error.details())
    assert len(scripted.engine.cancelled) == 2


def test_a_drain_without_any_time_is_done_when_no_call_runs(serve_scripted: Serve) -> None:
    server = serve_scripted().server
    assert server.run(server.server.drain(0.0)) is True


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


def test_a_start_that_is_given_up_waits_for_no_download() -> None:
    released = threading.Event()
    ended: list[bool] = []

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await _in_daemon(lambda: ended.append(released.wait(20.0)))

    asyncio.run(give_up())
    assert ended == []
    released.set()


def test_what_a_daemon_thread_returns_or_raises_is_its_callers() -> None:
    def fail() -> None:
        raise BundleError("no bundle")

    assert asyncio.run(_in_daemon(lambda: 3)) == 3
    with pytest.raises(BundleError, match="no bundle"):
        asyncio.run(_in_daemon(fail))


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


def start(config: ServerConfig, engine: ScriptedEngine) -> None:
    """A server that is closed again; raises what its start raises."""

    async def starting() -> None:
        server = Server(config, lambda *_: engine)
        try:
            await server.start()
        finally:
            await server.close(0)

    asyncio.run(starting())


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(
    serve_scripted: Serve, shop_folders: ShopFolders
) -> None:
    taken = serve_scripted().server.server
    engine = ScriptedEngine()
    with pytest.raises(TransientError, match=rf"127\.0\.0\.1:{taken.port}.*--port"):
        start(shop_folders.config("--port", str(taken.port)), engine)
    with pytest.raises(TransientError, match=rf"127\.0\.0\.1:{taken.metrics_port}.*--metrics-port"):
        start(shop_folders.config("--metrics-port", str(taken.metrics_port)), engine)
    assert engine.ready is None


def test_a_port_that_is_taken_on_one_address_of_a_name_is_taken(
    shop_folders: ShopFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC would listen on the other ones, and callers would meet either server."""

    async def bind(config: ServerConfig) -> None:
        GrpcServer(config, Metrics())

    free = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = (socket.AF_INET, socket.SOCK_STREAM, 6, "", other.getsockname())
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [free, taken])
        port = other.getsockname()[1]
        with pytest.raises(TransientError, match=rf"cannot listen on 127\.0\.0\.1:{port}.*--port or --host"):
            asyncio.run(bind(shop_folders.config("--host", "a-name", "--port", str(port))))


def test_an_engine_too_small_for_the_bundles_histories_is_refused(shop_folders: ShopFolders) -> None:
    class Small(ScriptedEngine):
        async def start(self) -> None:
            await super().start()
            assert self.ready is not None
            self.ready = msgspec.structs.replace(self.ready, max_context_tokens=100)

    with pytest.raises(
        ConfigurationError, match=r"at most 100 tokens, .* raise max_context_tokens \(0\) or kv_cache_mib"
    ):
        start(shop_folders.config(), Small())


def test_a_bundle_of_another_base_is_refused(shop_folders: ShopFolders, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other")
    config = json.loads((other.folder / "config.json").read_text())
    (other.folder / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))
    flags = ("--base", str(other.folder), "--bundle", str(shop_folders.bundle), "--port", "0", "--metrics-port", "0")
    with pytest.raises(BundleError, match=r"was trained on base .* not on other"):
        start(load_config(flags, {}), ScriptedEngine())


def test_the_ready_text_is_three_calls_to_copy(serve_scripted: Serve) -> None:
    server = serve_scripted().server.server
    lines = ready_text(server, 1.25).splitlines()
    assert lines[0].endswith("is ready after 1.2 s: Tiny Shop (tiny-shop 1) on base")
    verbs = [line.split()[:2] for line in lines[3:]]
    assert verbs == [["shoplm", "recommend"], ["shoplm", "predict"], ["shoplm", "chat"]]
    assert all(f"--customer {DEMO_CUSTOMER} --address 127.0.0.1:{server.port}" in line for line in lines[3:])


def test_the_ready_text_calls_no_service_that_has_no_words(serve_scripted: Serve) -> None:
    server = serve_scripted().server.server
    assert server.served is not None
    server.served = replace(server.served, base=replace(server.served.base, origin=Origin.SCRATCH))
    verbs = [line.split()[1] for line in ready_text(server, 1.0).splitlines()[3:]]
    assert verbs == ["recommend", "predict"]


def test_all_addresses_of_ipv6_are_those_of_ipv4_too(serve_scripted: Serve) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = serve_scripted("--metrics-host", "::", "--host", "::").server.server
    for host in ("[::1]", "127.0.0.1"):
        with urllib.request.urlopen(f"http://{host}:{server.metrics_port}/readyz", timeout=TIMEOUT_SECONDS) as answer:
            assert answer.status == 200
    _, line, *_ = ready_text(server, 1.0).splitlines()
    assert line == f"  gRPC [::]:{server.port}   metrics http://[::]:{server.metrics_port}/metrics"


def test_of_a_request_the_log_names_the_refused_fields_and_nothing_else(
    serve_scripted: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    scripted = serve_scripted()
    secret, path = "my secret words", "/shoplm.v1.ChatService/Chat"
    said = [chat_pb2.Message(role="user", content=secret)]
    refused = [
        chat_pb2.ChatRequest(messages=[chat_pb2.Message(role=f"a\nFAKE LINE\x1b[2J{secret}", content=secret)]),
        chat_pb2.ChatRequest(messages=said, customer=shop_pb2.Customer(customer_id=secret * 100)),
        chat_pb2.ChatRequest(messages=said, customer=shop_pb2.Customer(attributes={"age": secret * 100})),
        chat_pb2.ChatRequest(messages=said, stop=[secret * 100]),
    ]
    sent = [request.SerializeToString() for request in refused]
    sent.append(chat_pb2.ChatRequest(messages=said).SerializeToString().replace(b"my", b"\xff\xfe"))
    with caplog.at_level(logging.DEBUG, "shoplm"):
        for data in sent:
            with pytest.raises(grpc.RpcError) as raised:
                scripted.server.raw(path, data)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        list(scripted.server.chat.Chat(chat_pb2.ChatRequest(messages=said)))
    messages = [record.getMessage() for record in caplog.records]
    assert "refused because of messages[0].role" in messages
    assert "refused because of messages[0].content" in messages
    assert all(message.isprintable() for message in messages)
    assert not any("secret" in message for message in messages)
    assert {record.name for record in caplog.records} >= {"shoplm.api"}


def test_the_api_process_never_imports_torch() -> None:
    code = (
        "import sys, shoplm.server, shoplm.api.grpc_server, shoplm.model.tokenizer, bm25s\n"
        "print([name for name in ('torch', 'transformers', 'triton') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
