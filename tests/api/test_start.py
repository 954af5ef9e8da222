"""The start of a server: what it refuses, and that it waits for no download."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from pathlib import Path

import msgspec
import pytest
from scripted_engine import ScriptedEngine
from served_shop import Serve, ShopFolders
from shoplm.api.grpc_server import GrpcServer
from shoplm.config import ServerConfig
from shoplm.config_sources import load_config
from shoplm.errors import BundleError, ConfigurationError, TransientError
from shoplm.metrics import Metrics
from shoplm.server import Server, run_in_daemon_thread
from tiny_shop import write_base


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


def test_a_start_that_is_given_up_waits_for_no_download() -> None:
    released = threading.Event()
    ended: list[bool] = []

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await run_in_daemon_thread(lambda: ended.append(released.wait(20.0)))

    asyncio.run(give_up())
    assert ended == []
    released.set()


def test_what_a_daemon_thread_returns_or_raises_is_its_callers() -> None:
    def fail() -> None:
        raise BundleError("no bundle")

    assert asyncio.run(run_in_daemon_thread(lambda: 3)) == 3
    with pytest.raises(BundleError, match="no bundle"):
        asyncio.run(run_in_daemon_thread(fail))
