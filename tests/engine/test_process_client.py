"""The engine as a process: it dies, hangs, is orphaned, and is started again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from engine_process import START_SECONDS, TinyModel, chat, running, spec
from shoplm.engine import supervisor
from shoplm.engine.client import Cancel, Drain
from shoplm.engine.supervisor import ProcessEngineClient
from shoplm.errors import EngineUnavailableError, TransientError
from shoplm.request import FinishedOutput, StepStats, TokensOutput

CALLS = 12


async def test_a_killed_engine_fails_its_calls_at_once_and_comes_back(tiny_model: TinyModel) -> None:
    states: list[bool] = []
    reports: asyncio.Queue[StepStats] = asyncio.Queue()
    back = asyncio.Event()

    def on_state(serving: bool) -> None:
        states.append(serving)
        if serving:
            back.set()

    async with running(tiny_model("smollm2")) as client:
        client.on_state(on_state)
        # One request at a time ends, the others are in their midst or in the queue when the engine dies.
        started = client.generate(chat("started", 230))
        await anext(started)
        calls = [asyncio.create_task(client.run(chat(f"r{i}", 230))) for i in range(CALLS)]
        await asyncio.sleep(0)  # each of them submits
        assert client.in_flight == CALLS + 1
        first = client.process_id
        assert first is not None
        os.kill(first, signal.SIGKILL)
        killed = time.monotonic()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        with pytest.raises(EngineUnavailableError, match="the engine was lost"):
            async for _ in started:
                pass
        assert time.monotonic() - killed < 2.0
        assert [type(end) for end in ends] == [EngineUnavailableError] * CALLS
        assert (states, client.in_flight) == ([False], 0)
        client.on_stats(reports.put_nowait)  # of the next engine: the lost one is heard no more
        with pytest.raises(EngineUnavailableError, match="not running"):
            await client.run(chat("too early", 1))
        await back.wait()
        assert states == [False, True]
        assert client.process_id not in (first, None)
        told = await reports.get()  # before it has work
        assert (told.submitted, told.pages_used, told.pages_free > 0) == ({}, 0, True)
        ended = await client.run(chat("next", 5))
        assert isinstance(ended, FinishedOutput) and ended.completion_tokens == 5


async def test_an_error_of_the_watchers_own_is_logged_and_ends_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(ProcessEngineClient):
        async def _launch(self) -> None:
            """Starts nothing."""

        async def _watch(self) -> None:
            raise RuntimeError("odd")

    ended: asyncio.Queue[TransientError] = asyncio.Queue()
    client = Failing(spec(tmp_path))
    client.on_end(ended.put_nowait)
    await client.start()
    async with asyncio.timeout(START_SECONDS):
        assert str(await ended.get()) == "watching the engine failed: RuntimeError: odd"
    assert "the engine is watched no more" in caplog.text and "Traceback" in caplog.text
    await client.close()


async def test_who_closes_waits_for_no_answer(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    async with running(tiny_model("smollm2")) as client:
        send = client._send
        monkeypatch.setattr(client, "_send", lambda message: sent.append(message) or send(message))
        await anext(client.generate(chat("started", 230)))
    assert sent[1:] == [Cancel("started"), Drain()]


async def test_an_engine_that_hangs_is_killed_and_comes_back(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    states: asyncio.Queue[bool] = asyncio.Queue()
    async with running(tiny_model("smollm2"), hang_seconds=2.0) as client:
        client.on_state(states.put_nowait)
        started = client.generate(chat("started", 230))
        await anext(started)
        first = client.process_id
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        waiting = asyncio.create_task(client.run(chat("waiting", 5)))
        with pytest.raises(EngineUnavailableError, match="the engine was lost"):
            async for _ in started:
                pass
        with pytest.raises(EngineUnavailableError, match="the engine was lost"):
            await waiting
        assert "the engine hangs: it has said nothing for engine_hang_seconds (2)" in caplog.text
        assert [await states.get(), await states.get()] == [False, True]
        assert client.process_id not in (first, None)
        assert not psutil.pid_exists(first)
        assert (await client.run(chat("next", 5))).completion_tokens == 5


SLOW = """
import sys, time
from shoplm.engine import load, process

load_backend = load.load_backend

def load_slow(spec, **options):
    backend = load_backend(spec, **options)
    submit = backend.submit

    def submit_late(batch):
        time.sleep(1.0)
        return submit(batch)

    backend.submit = submit_late
    return backend

load.load_backend = load_slow
sys.exit(process.main())
"""


class Slow(ProcessEngineClient):
    """Each step takes a second."""

    program = (sys.executable, "-c", SLOW)


async def test_steps_shorter_than_a_hang_are_left_alone(tiny_model: TinyModel) -> None:
    states: list[bool] = []
    async with running(tiny_model("smollm2"), 3.0, Slow) as client:
        client.on_state(states.append)
        first, started = client.process_id, time.monotonic()
        assert (await client.run(chat("long", 4))).completion_tokens == 4
        assert time.monotonic() - started > 3.0  # it took longer than the engine may be silent
        assert (client.process_id, states) == (first, [])


HANGS_AGAIN = """
import os, signal, sys
from shoplm.engine import process

with open(os.environ["SHOPLM_TEST_STARTS"], "a+") as starts:
    starts.write("x")
    starts.seek(0)
    if len(starts.read()) == 2:
        signal.pause()
sys.exit(process.main())
"""


class HangsAgain(ProcessEngineClient):
    """The second engine never loads."""

    program = (sys.executable, "-c", HANGS_AGAIN)


async def test_an_engine_that_hangs_while_it_is_loaded_again_is_killed(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SHOPLM_TEST_STARTS", str(tmp_path / "starts"))
    monkeypatch.setattr(supervisor, "_TIMES_FIRST_LOAD", 3.0)
    back = asyncio.Event()
    async with running(tiny_model("smollm2"), 2.0, HangsAgain) as client:
        client.on_state(lambda serving: back.set() if serving else None)
        assert client.process_id is not None
        os.kill(client.process_id, signal.SIGKILL)
        await back.wait()
        assert "the engine does not start: it has not loaded in" in caplog.text
        assert (await client.run(chat("next", 5))).completion_tokens == 5
    assert len((tmp_path / "starts").read_text()) >= 3


async def test_an_idle_engine_owes_nothing(tiny_model: TinyModel) -> None:
    async with running(tiny_model("smollm2"), hang_seconds=0.05) as client:
        assert client.process_id is not None
        await asyncio.sleep(0.5)
        assert psutil.Process(client.process_id).status() == psutil.STATUS_SLEEPING


async def test_a_terminal_s_signals_are_left_to_the_parent(tiny_model: TinyModel) -> None:
    async with running(tiny_model("smollm2")) as client:
        assert client.process_id is not None
        stream = client.generate(chat("long", 100))
        first = await anext(stream)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            os.kill(client.process_id, number)
        *tokens, end = [first, *[output async for output in stream]]
        assert sum(len(output.tokens) for output in tokens if isinstance(output, TokensOutput)) == 100
        assert isinstance(end, FinishedOutput) and end.completion_tokens == 100
        process = psutil.Process(client.process_id)
    assert not process.is_running()  # closing ends it


PARENT = """
import asyncio, sys, time
from shoplm.engine.supervisor import ProcessEngineClient
from shoplm.engine.spec import EngineSpec
from shoplm.request import Generate, Request, Service, token_ids

async def main():
    client = ProcessEngineClient(EngineSpec(sys.argv[1], dtype="float32", threads=1, kv_cache_bytes=4 << 20))
    await client.start()
    if sys.argv[2] == "busy":
        request = Request("r", Service.CHAT, token_ids([3, 4, 5]), Generate(240), time.monotonic())
        await anext(client.generate(request))
    print(client.process_id, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("load", ["idle", "busy"])
def test_an_orphaned_engine_ends(tiny_model: TinyModel, load: str) -> None:
    command = [sys.executable, "-c", PARENT, str(tiny_model("smollm2")), load]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        assert engine.ppid() == parent.pid
        parent.kill()
    # Its new parent may never collect it: a zombie has ended, too.
    deadline = time.monotonic() + 10.0
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine outlives its parent"
        time.sleep(0.05)
