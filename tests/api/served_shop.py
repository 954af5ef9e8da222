"""What the fixtures of these tests hand out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scripted_engine import ScriptedEngine
from server_thread import ServerThread
from shoplm.config import ServerConfig
from shoplm.config_sources import load_config
from shoplm.v1 import chat_pb2, recommendation_pb2, shop_pb2
from tiny_shop import DEMO_CUSTOMER

RECOMMEND = recommendation_pb2.RecommendRequest(customer=shop_pb2.Customer(customer_id=DEMO_CUSTOMER))
ASK = chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="user", content="hello")])


@dataclass(frozen=True)
class ShopFolders:
    """Where a tiny base and its bundle are."""

    base: Path
    bundle: Path

    def config(self, *flags: str) -> ServerConfig:
        """Settings for a server of them on free ports."""
        fixed = ["--base", str(self.base), "--bundle", str(self.bundle), "--port", "0", "--metrics-port", "0"]
        return load_config([*fixed, *flags], environment={})


@dataclass(frozen=True)
class Scripted:
    """A server and the scripted engine behind it."""

    server: ServerThread
    engine: ScriptedEngine


class Serve(Protocol):
    """Starts a server with these flags on a scripted engine."""

    def __call__(self, *flags: str) -> Scripted: ...
