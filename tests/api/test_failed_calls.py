"""What the log says of calls that fail: their number, and never what was in them."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from served_shop import Serve
from shoplm.api.failed_calls import FailedCalls
from shoplm.errors import EngineUnavailableError
from shoplm.logs import request_id
from shoplm.v1 import chat_pb2, model_pb2, shop_pb2

CALLS = 20


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if (each.name, each.levelname) == ("shoplm.api", "WARNING")]


def test_many_lost_calls_are_one_line_and_all_in_the_metric(
    serve_scripted: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    scripted = serve_scripted()
    scripted.engine.error = EngineUnavailableError("the engine is not running", retry_seconds=0.0)
    ask = chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="user", content="hello")])
    for _ in range(CALLS):
        with pytest.raises(grpc.RpcError) as raised:
            list(scripted.server.chat.Chat(ask))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    said = warnings(caplog)
    assert said[0] == "calls end with UNAVAILABLE: the engine is not running"
    assert len(said) < CALLS / 2  # on a machine that is slow, also a number every five seconds
    assert f'reason="ENGINE_UNAVAILABLE",service="chat"}} {CALLS}.0' in scripted.server.get("/metrics")[2]


def test_a_strangers_line_has_its_request_id(serve_scripted: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str | None]] = []
    monkeypatch.setattr(FailedCalls, "add", lambda _, why, **__: said.append((why, request_id.get())))
    scripted = serve_scripted("--auth-tokens", "one")
    with pytest.raises(grpc.RpcError):
        scripted.server.model.GetModel(model_pb2.GetModelRequest(), metadata=(("x-request-id", "mine"),))
    assert [identifier for _, identifier in said] == ["mine"]


def test_many_strangers_are_one_line(serve_scripted: Serve, caplog: pytest.LogCaptureFixture) -> None:
    scripted = serve_scripted("--auth-tokens", "one")
    for _ in range(CALLS):
        with pytest.raises(grpc.RpcError) as raised:
            list(scripted.server.chat.Chat(chat_pb2.ChatRequest()))
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    said = [line for line in warnings(caplog) if "UNAUTHENTICATED" in line]
    assert said[0].startswith("calls end with UNAUTHENTICATED: send a valid token")
    assert len(said) < CALLS / 2


def test_many_wrong_calls_are_one_line_with_the_first_ones_field(
    serve_scripted: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    scripted = serve_scripted()
    wrong = chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="nobody", content="secret")])
    with caplog.at_level(logging.INFO, "shoplm.api"):
        for _ in range(CALLS):
            with pytest.raises(grpc.RpcError) as raised:
                list(scripted.server.chat.Chat(wrong, metadata=(("x-request-id", "page-17"),)))
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    said = [each for each in caplog.records if "INVALID_ARGUMENT" in each.getMessage()]
    assert said[0].getMessage() == "calls end with INVALID_ARGUMENT: refused because of messages[0].role"
    assert (said[0].levelname, vars(said[0])["service"], vars(said[0])["method"]) == ("INFO", "chat", "Chat")
    assert len(said) < CALLS / 2
    assert f'service="chat"}} {CALLS}.0' in scripted.server.get("/metrics")[2]


async def test_the_number_of_the_others_is_told_once_and_then_it_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    async def until_told(lines: int) -> None:
        async with asyncio.timeout(30.0):
            while len(warnings(caplog)) < lines:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.01)

    lost = FailedCalls("UNAVAILABLE", seconds=0.05)
    with caplog.at_level(logging.WARNING, "shoplm.api"):
        for _ in range(3):
            lost.add("gone")
        await until_told(2)
        assert warnings(caplog) == ["calls end with UNAVAILABLE: gone", "2 more calls ended with UNAVAILABLE"]
        lost.add("gone again")
        assert warnings(caplog)[2:] == ["calls end with UNAVAILABLE: gone again"]


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
