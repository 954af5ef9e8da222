"""A server that drains: no call fails that could have been answered."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from served_shop import ASK, RECOMMEND, Scripted, Serve
from server_thread import NOT_SERVING, TIMEOUT_SECONDS, detail
from shoplm.client import Client
from shoplm.v1 import model_pb2


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
    assert (server.health(), server.get("/readyz")[0], server.get("/healthz")[0]) == (NOT_SERVING, 503, 200)
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
