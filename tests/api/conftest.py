"""A tiny shop, and servers of it on loopback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# Test modules are imported one by one (importlib mode); what they share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from scripted_engine import ScriptedEngine
from served_shop import Scripted, Serve, ShopFolders
from server_thread import ServerThread
from shoplm.engine.client import ThreadEngineClient
from tiny_shop import write_base, write_bundle


@pytest.fixture(scope="session")
def shop_folders(tmp_path_factory: pytest.TempPathFactory) -> ShopFolders:
    root = tmp_path_factory.mktemp("tiny-shop")
    base = write_base(root / "base")
    write_bundle(root / "bundle", base)
    return ShopFolders(base.folder, root / "bundle")


@pytest.fixture
def serve_scripted(shop_folders: ShopFolders) -> Iterator[Serve]:
    """`serve_scripted("--max-events", "10")`: a server with these flags on a scripted engine."""
    with ExitStack() as stack:

        def serve(*flags: str) -> Scripted:
            engine = ScriptedEngine()
            thread = ServerThread(shop_folders.config(*flags), lambda *_: engine)
            return Scripted(stack.enter_context(thread), engine)

        yield serve


@pytest.fixture(scope="module")
def scripted_shop(shop_folders: ShopFolders) -> Iterator[Scripted]:
    """One server on a scripted engine for tests that only read from it."""
    engine = ScriptedEngine()
    with ServerThread(shop_folders.config("--engine-api"), lambda *_: engine) as server:
        yield Scripted(server, engine)


@pytest.fixture(scope="module")
def real_shop(shop_folders: ShopFolders) -> Iterator[ServerThread]:
    """One server on a real engine, which runs in a thread."""
    small = ["--dtype", "float32", "--kv-cache-mib", "16", "--threads", "1"]
    config = shop_folders.config("--engine-api", "--synthetic-tries", "toy=50:4x4x4", *small)
    make = lambda config, base, _: ThreadEngineClient(config.engine_spec(base.folder))  # noqa: E731
    with ServerThread(config, make) as server:
        yield server
