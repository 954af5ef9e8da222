"""A base that was trained on a shop's log alone has no words: chat is refused, and everything else is served."""

from __future__ import annotations

import shutil
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served_shop import Serve, ShopFolders
from server_thread import detail
from shoplm.api.methods import CHAT, RECOMMENDATION
from shoplm.model.base import resolve_base
from shoplm.model.origin import Origin, write_origin
from shoplm.v1 import chat_pb2, recommendation_pb2, shop_pb2
from tiny_shop import DEMO_CUSTOMER


def test_chat_is_refused_and_recommendations_are_served(
    shop_folders: ShopFolders, serve_scripted: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(shop_folders.base, folder)
    write_origin(folder, Origin.SCRATCH)
    # Where a base comes from is not part of what it computes.
    assert resolve_base(str(folder)).fingerprint == resolve_base(str(shop_folders.base)).fingerprint
    server = serve_scripted("--base", str(folder)).server
    with pytest.raises(grpc.RpcError) as error:
        list(server.chat.Chat(chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="user", content="hello")])))
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "cannot chat" in error.value.details()
    assert detail(error.value, error_details_pb2.ErrorInfo).reason == "NOT_SERVING"
    health = health_pb2_grpc.HealthStub(server.channel)
    states = {
        name: health.Check(health_pb2.HealthCheckRequest(service=name)).status
        for name in (CHAT.full_name, RECOMMENDATION.full_name, "")
    }
    assert list(states.values()) == [2, 1, 1]  # NOT_SERVING, SERVING, SERVING
    customer = shop_pb2.Customer(customer_id=DEMO_CUSTOMER)
    server.recommendation.Recommend(recommendation_pb2.RecommendRequest(customer=customer))


def test_an_unknown_origin_is_refused(shop_folders: ShopFolders, tmp_path: Path) -> None:
    from shoplm.errors import BaseModelError

    folder = tmp_path / "base"
    shutil.copytree(shop_folders.base, folder)
    write_origin(folder, Origin.ADAPTED)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("adapted", "the moon"))
    with pytest.raises(BaseModelError, match="the moon"):
        resolve_base(str(folder))
