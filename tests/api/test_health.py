"""What health, probes and scrapes say of a server, with a bundle and without."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from scripted_engine import ScriptedEngine
from served_shop import ASK, RECOMMEND, Scripted, Serve, ShopFolders
from server_thread import NOT_SERVING, SERVING, ServerThread, bad_fields, detail
from shoplm.config_sources import load_config
from shoplm.request import StepStats
from shoplm.v1 import chat_pb2, model_pb2, prediction_pb2, recommendation_pb2

SERVICES = ("Recommendation", "Chat", "Prediction", "Model")


@pytest.fixture
def chat_only(shop_folders: ShopFolders) -> Iterator[Scripted]:
    """A base without a bundle."""
    engine = ScriptedEngine()
    flags = ["--base", str(shop_folders.base), "--port", "0", "--metrics-port", "0"]
    with ServerThread(load_config(flags, {}), lambda *_: engine) as server:
        yield Scripted(server, engine)


def test_each_service_has_a_health_status(scripted_shop: Scripted) -> None:
    for service in ("", *(f"shoplm.v1.{name}Service" for name in (*SERVICES, "Engine"))):
        assert scripted_shop.server.health(service) == SERVING
    with pytest.raises(grpc.RpcError) as raised:
        scripted_shop.server.health("shoplm.v1.NoService")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_base_without_a_bundle_serves_chat_only(chat_only: Scripted) -> None:
    server = chat_only.server
    statuses = {name: server.health(f"shoplm.v1.{name}Service") for name in SERVICES}
    assert statuses == {"Chat": SERVING, "Model": SERVING, "Recommendation": NOT_SERVING, "Prediction": NOT_SERVING}
    assert server.health() == SERVING
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
    assert (server.health(), server.get("/readyz")[0], server.get("/healthz")[0]) == (NOT_SERVING, 503, 200)
    server.run(set_state(True))
    assert (server.health(), server.get("/readyz")[0]) == (SERVING, 200)
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
