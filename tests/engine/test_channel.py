"""Messages across the process boundary: cut anywhere, many at once, and an engine of which nobody is left."""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import closing

import pytest
from shoplm.engine.channel import EngineEnd, Frames, encode, frame, socket_pair
from shoplm.engine.client import EngineClient
from shoplm.engine.spec import EngineSpec
from shoplm.request import (
    Cancel,
    Drain,
    EngineOutput,
    FinishedOutput,
    Generate,
    ReadyOutput,
    Request,
    Service,
    Submit,
    Timings,
    TokensOutput,
    token_ids,
)

MESSAGES = [b"", b"a", bytes(range(256)) * 40, b"bc", b"", b"d" * 70_000]


@pytest.mark.parametrize("most", [1, 3, 4, 5, 1000, 1 << 20])
def test_messages_come_out_as_they_went_in_however_they_are_cut(most: int) -> None:
    stream = b"".join(map(frame, MESSAGES * 2))
    generator, frames, start = random.Random(most), Frames(), 0
    got: list[bytes] = []
    while start < len(stream):
        size = generator.randint(1, most)
        got += map(bytes, frames.feed(stream[start : start + size]))
        start += size
    assert got == MESSAGES * 2


def request(name: str, tokens: int = 3) -> Request:
    return Request(name, Service.CHAT, token_ids(range(tokens)), Generate(8), arrival_seconds=0.0)


def test_the_engine_takes_everything_that_came_and_then_the_end() -> None:
    mine, its = socket_pair()
    with closing(EngineEnd(its)) as engine:
        assert engine.receive() == [] and not engine.wait(0.0)
        sent = [Submit(request("a")), Cancel("a"), Submit(request("b", 100_000)), Drain()]
        stream = b"".join(frame(encode(message)) for message in sent)
        got = []
        for part in (stream[:10], stream[10:90_000], stream[90_000:]):
            mine.sendall(part)
            assert engine.wait(None)
            got += engine.receive() or ()
        assert got == sent
        mine.close()
        assert engine.wait(None) and engine.receive() is None
        with pytest.raises(OSError, match="Broken pipe"):
            engine.send([])


class Puppet(EngineClient):
    """A client whose engine is the test."""

    def __init__(self) -> None:
        super().__init__(EngineSpec("none"))
        self.engine: socket.socket | None = None

    def _open_channel(self) -> socket.socket:
        mine, self.engine = socket_pair()
        return mine

    async def _start_engine(self) -> None:
        self.say(ReadyOutput(1, 16, 64, "puppet", {}, {}))

    async def _stop_engine(self) -> None:
        assert self.engine is not None
        self.engine.close()

    def say(self, *outputs: EngineOutput) -> None:
        assert self.engine is not None
        self.engine.sendall(frame(encode(list(outputs))))


def end(name: str, tokens: int) -> FinishedOutput:
    return FinishedOutput(name, Timings(0.0, 0.0, 0.0), 3, 0, tokens)


async def test_a_slow_reader_gets_tokens_together_and_a_quick_one_each_at_once() -> None:
    client = Puppet()
    await client.start()
    slow, quick = client.generate(request("slow")), client.generate(request("quick"))
    first = [asyncio.ensure_future(anext(each)) for each in (slow, quick)]
    await asyncio.sleep(0)  # both submit
    client.say(TokensOutput("slow", (1,)), TokensOutput("quick", (5,)))
    assert [await each for each in first] == [TokensOutput("slow", (1,)), TokensOutput("quick", (5,))]
    for token in (6, 7):
        client.say(TokensOutput("slow", (token,), 2), TokensOutput("quick", (token,)))
        assert await anext(quick) == TokensOutput("quick", (token,))
    client.say(TokensOutput("slow", (8,), 2), end("slow", 4), end("quick", 3))
    assert [output async for output in quick] == [end("quick", 3)]
    assert [output async for output in slow] == [TokensOutput("slow", (6, 7, 8), 2), end("slow", 4)]
    assert client.in_flight == 0
    await client.close()
