"""Ten times too much, callers who leave, callers who do not read, one who floods, a lost engine, and noise."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter

import grpc
from ordeal import Client, Ordeal, ending, for_seconds

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# CANCELLED is how gRPC ends a call whose deadline passes before the server has taken it: see README.md.
EXPECTED = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"}


def test_ten_times_the_load_is_refused_and_forgotten(ordeal: Ordeal, soaks: bool) -> None:
    async def load() -> Counter[str]:
        clients = [Client(ordeal.address) for _ in range(8)]

        async def call(number: int) -> grpc.StatusCode:
            client = clients[number % 8]
            return await (client.talk(1.0) if number % 3 == 0 else client.recommend(0.3))

        codes = await for_seconds(120.0 if soaks else 4.0, 160, call)
        for client in clients:
            await client.channel.close()
        return codes

    codes = ordeal.run(load())
    assert set(codes) <= EXPECTED, codes
    assert codes["OK"] > 0 and codes["RESOURCE_EXHAUSTED"] > 0, codes
    ordeal.check()


def test_callers_who_leave_mid_stream_cost_nothing_more(ordeal: Ordeal, soaks: bool) -> None:
    before = ordeal.value("shoplm_engine_failures_total", service="chat", kind="cancelled")

    async def load() -> int:
        left = 0
        for _ in range(100 if soaks else 6):
            client = Client(ordeal.address)

            async def leave(client: Client = client) -> bool:
                call = client.chat()
                code = await ending(call.read())
                call.cancel()
                return code is grpc.StatusCode.OK

            left += sum(await asyncio.gather(*(leave() for _ in range(50))))
            await client.channel.close()
        return left

    assert ordeal.run(load()) > 0
    ordeal.check()
    assert ordeal.value("shoplm_engine_failures_total", service="chat", kind="cancelled") > before


def test_callers_who_do_not_read_hold_no_page_and_no_other_caller(ordeal: Ordeal) -> None:
    async def load() -> float:
        silent = Client(ordeal.address)
        calls = [silent.chat() for _ in range(20)]
        for call in calls:
            await call.read()  # it runs; nothing more is read
        other = Client(ordeal.address)
        started = time.monotonic()
        assert await other.recommend(30.0) is grpc.StatusCode.OK
        seconds = time.monotonic() - started
        end = time.monotonic() + 30.0
        # The engine finishes all answers although nobody takes them, and gives their pages back.
        while ordeal.engine.in_flight or ordeal.value("shoplm_kv_pages", state="used"):
            assert time.monotonic() < end, "an answer that nobody reads holds the engine"
            await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await silent.channel.close()
        await other.channel.close()
        return seconds

    assert ordeal.run(load()) < 10.0
    ordeal.check()


def test_a_tenant_that_floods_leaves_room_for_another(ordeal: Ordeal, soaks: bool) -> None:
    async def load() -> tuple[Counter[str], Counter[str]]:
        flood, quiet = (Client(ordeal.address, **{"x-tenant-id": name}) for name in ("flood", "quiet"))
        seconds = 60.0 if soaks else 3.0
        calm = asyncio.create_task(for_seconds(seconds, 2, lambda _: quiet.recommend(10.0)))
        await quiet.recommend(10.0)  # the calm ones are there when the flood comes, which no queue can hold
        flooded = await for_seconds(seconds, 400, lambda _: flood.talk(10.0))
        codes = await calm
        await flood.channel.close()
        await quiet.channel.close()
        return codes, flooded

    codes, flooded = ordeal.run(load())
    assert flooded["RESOURCE_EXHAUSTED"] > 0, flooded
    assert codes["OK"] >= 0.9 * codes.total() > 0, (codes, flooded)
    ordeal.check()


def test_noise_on_the_port_is_no_call_and_stops_no_other(ordeal: Ordeal, soaks: bool) -> None:
    generator = random.Random(7)
    host, port = ordeal.address.split(":")

    def frame(kind: int, payload: bytes, stream: int = 1) -> bytes:
        flags = bytes([generator.randrange(256)])
        return len(payload).to_bytes(3, "big") + bytes([kind]) + flags + stream.to_bytes(4, "big") + payload

    async def send(data: bytes) -> None:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.close()

    async def load() -> None:
        client = Client(ordeal.address)
        for _ in range(60 if soaks else 6):
            noise = [generator.randbytes(generator.randrange(1, 4000)) for _ in range(16)]
            settings = frame(4, b"")
            await asyncio.gather(
                *(send(data) for data in noise[:4]),
                *(send(PREFACE + data) for data in noise[4:8]),
                *(send(PREFACE + settings + frame(generator.randrange(12), data)) for data in noise[8:12]),
                *(send(PREFACE + settings + frame(1, data) + frame(0, data)) for data in noise[12:]),
            )
            assert await client.recommend(30.0) is grpc.StatusCode.OK
        await client.channel.close()

    ordeal.run(load())
    ordeal.check()


def test_a_lost_engine_takes_no_call_with_it_silently(ordeal: Ordeal, soaks: bool) -> None:
    async def load() -> Counter[str]:
        client = Client(ordeal.address)
        codes: Counter[str] = Counter()
        for _ in range(5 if soaks else 1):
            calls = [asyncio.create_task(client.talk(30.0)) for _ in range(20)]
            await ending(client.chat().read())
            assert ordeal.engine.process_id is not None
            os.kill(ordeal.engine.process_id, signal.SIGKILL)
            codes.update([code.name for code in await asyncio.gather(*calls)])
            end = time.monotonic() + 90.0
            while await client.recommend(30.0) is not grpc.StatusCode.OK:
                assert time.monotonic() < end, "the engine does not come back"
                await asyncio.sleep(0.1)
        await client.channel.close()
        return codes

    codes = ordeal.run(load())
    assert set(codes) <= {"OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED"}, codes
    assert codes["UNAVAILABLE"] > 0
    ordeal.check(engine_was_lost=True)
