"""The asyncio client over loopback."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from canned_server import ANSWER, CannedServer
from shoplm.client import (
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    InvalidArgumentError,
    OverloadedError,
    Target,
    TargetKind,
    UnavailableError,
)


async def test_all_services_answer(server: CannedServer) -> None:
    async with AsyncClient(server.address) as client:
        await client.wait_until_ready()
        recommended, ranked, predicted, model = await asyncio.gather(
            client.recommend("7", count=3),
            client.rank("7", ["milk"]),
            client.predict("7", [Target(TargetKind.PURCHASE, 7)]),
            client.get_model(),
        )
        chat = client.chat("Hello")
        deltas = [delta async for delta in chat]
    assert len(recommended.items) == 3
    assert ranked.items[0].title == "Milk"
    assert predicted.predictions[0].probability == 0.75
    assert model.item_count == 5
    assert deltas == list(ANSWER)
    assert chat.summary.usage.completion_tokens == len(ANSWER)


async def test_errors_are_mapped_as_in_the_blocking_client(server: CannedServer) -> None:
    async with AsyncClient(server.address) as client:
        await client.wait_until_ready()  # else a busy machine's deadline passes before there is a connection
        with pytest.raises(InvalidArgumentError) as caught:
            await client.recommend("7", count=101)
        with pytest.raises(OverloadedError):
            await client.chat("hi", customer="refused").text()
        with pytest.raises(DeadlineExceededError):
            await client.recommend("slow", timeout=0.5)
        assert await asyncio.to_thread(server.record.cancelled.wait, 10)
    assert caught.value.violations[0].field == "count"


async def test_unavailable_is_retried(server: CannedServer) -> None:
    async with AsyncClient(server.address) as client:
        await client.recommend("flaky-3", request_id="again")
        with pytest.raises(UnavailableError):
            await client.recommend("flaky-4", request_id="too-often")
    assert server.record.attempts == {"again": 4, "too-often": 4}


async def test_cancelling_the_task_cancels_the_call(server: CannedServer) -> None:
    async with AsyncClient(server.address) as client:
        task = asyncio.create_task(client.recommend("slow"))
        assert await asyncio.to_thread(server.record.slow_running.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.record.cancelled.wait, 10)


async def test_cancelling_a_chat_is_an_error_of_the_client(server: CannedServer) -> None:
    async with AsyncClient(server.address) as client:
        chat = client.chat("hang", request_id="left")
        assert await anext(chat) == ANSWER[0]
        chat.cancel()
        with pytest.raises(CancelledError) as cancelled:
            await chat.text()
        assert cancelled.value.request_id == "left"
        async with client.chat("hang") as left:
            pass
        with pytest.raises(CancelledError):
            await anext(left)


async def test_closing_the_client_cancels_its_calls(server: CannedServer) -> None:
    client = AsyncClient(server.address)
    call = asyncio.create_task(client.recommend("slow"))
    assert await asyncio.to_thread(server.record.slow_running.wait, 10)
    await client.close()
    with pytest.raises(CancelledError):
        await call


async def test_a_cancelled_task_stays_cancelled_while_it_reads_a_chat(server: CannedServer) -> None:
    async with AsyncClient(server.address) as client:
        chat = client.chat("hang")
        assert await anext(chat) == ANSWER[0]
        with pytest.raises(TimeoutError):  # asyncio's own, by cancelling the task
            async with asyncio.timeout(0):
                await chat.text()
        task = asyncio.create_task(client.chat("hang").text())
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_the_priority_of_a_call_is_sent(server: CannedServer) -> None:
    async with AsyncClient(server.address) as client:
        await client.recommend("7", priority=-100, request_id="recommend")
        await client.rank("7", ["milk"], priority=0, allow_degraded=True, request_id="rank")
        assert server.record.last_request.allow_degraded
        await client.predict("7", priority=7, request_id="predict")
        await client.chat("hi", priority=100, request_id="chat").text()
    sent = {name: metadata.get("x-priority") for name, metadata in server.record.metadata.items()}
    assert sent == {"recommend": "-100", "rank": "0", "predict": "7", "chat": "100"}


async def test_leaving_a_chat_cancels_it_on_the_server(server: CannedServer) -> None:
    async with AsyncClient(server.address) as client:
        async with client.chat("hang") as chat:
            assert await anext(chat) == ANSWER[0]
            with pytest.raises(RuntimeError, match="has not ended"):
                _ = chat.summary
        assert await asyncio.to_thread(server.record.cancelled.wait, 10)


async def test_round_robin_leaves_out_a_server_that_does_not_serve() -> None:
    with CannedServer() as one, CannedServer() as other:
        one.set_serving(False)
        async with AsyncClient(f"ipv4:{one.address},{other.address}", round_robin=True, retries=False) as client:
            for _ in range(20):
                await client.get_model()
        assert not one.record.attempts


def test_a_client_may_be_made_before_its_event_loop(server: CannedServer) -> None:
    client = AsyncClient(server.address)

    async def use() -> int:
        async with client:
            return (await client.get_model()).item_count

    assert asyncio.run(use()) == 5


def test_both_clients_have_the_same_methods_and_arguments() -> None:
    for name, method in inspect.getmembers(Client, inspect.isfunction):
        if name.startswith("_") and name != "__init__":
            continue
        other = inspect.signature(getattr(AsyncClient, name))
        assert list(inspect.signature(method).parameters.values()) == list(other.parameters.values()), name
