"""The engine as a process: killed, hanging, orphaned, unable to load."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
from shoplm.bundle import manifest_hash
from shoplm.engine import supervisor
from shoplm.engine.client import Cancel, Drain
from shoplm.engine.launch import EngineProcess
from shoplm.engine.load import check_bundle
from shoplm.engine.spec import EngineSpec
from shoplm.engine.supervisor import ProcessEngineClient
from shoplm.errors import BundleChangedError, ConfigurationError, EngineUnavailableError, TransientError
from shoplm.request import FinishedOutput, Generate, Request, Service, StepStats, TokensOutput, token_ids

TinyModel = Callable[[str], Path]
START_SECONDS = 90.0  # imports torch, on a machine that may be busy
CALLS = 12


def spec(folder: Path) -> EngineSpec:
    return EngineSpec(base_folder=str(folder), dtype="float32", threads=1, kv_cache_bytes=4 << 20)


def chat(name: str, tokens: int) -> Request:
    return Request(name, Service.CHAT, token_ids(range(3, 20)), Generate(tokens), arrival_seconds=time.monotonic())


@asynccontextmanager
async def running(
    folder: Path, hang_seconds: float = 0.0, kind: type[ProcessEngineClient] = ProcessEngineClient
) -> AsyncIterator[ProcessEngineClient]:
    client = kind(spec(folder), hang_seconds)
    async with asyncio.timeout(2 * START_SECONDS):
        await client.start()
        try:
            yield client
        finally:
            await client.close()


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


def test_an_engine_that_is_started_again_finds_the_same_bundle(tmp_path: Path) -> None:
    bundle = Path(__file__).parents[2] / "bundles" / "complete-journey"
    for name in ("shop.toml", "items.parquet", "types.parquet"):
        shutil.copy(bundle / name, tmp_path)
    asked = EngineSpec("", str(tmp_path), bundle_hash=manifest_hash(tmp_path))
    (tmp_path / "shop.toml").write_text((tmp_path / "shop.toml").read_text() + "\n# edited\n")
    with pytest.raises(BundleChangedError, match="is another bundle than when the server started"):
        check_bundle(asked)


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


@pytest.mark.parametrize("what", ["weights", "dtype", "cache"])
async def test_what_cannot_be_loaded_is_said_in_the_engine_s_words(
    tiny_model: TinyModel, tmp_path: Path, what: str
) -> None:
    folder = tiny_model("smollm2")
    if what == "weights":
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        bad, words = spec(tmp_path), "safetensors"
    elif what == "cache":
        bad = EngineSpec(base_folder=str(folder), kv_cache_bytes=1 << 60)
        words = "kv_cache_mib is 1,099,511,627,776, and this machine has "
    else:
        bad = EngineSpec(base_folder=str(folder), dtype="float64")
        words = "dtype 'float64' is not one of: bfloat16, float32"
    client = ProcessEngineClient(bad)
    async with asyncio.timeout(START_SECONDS):
        with pytest.raises(ConfigurationError, match=words):
            await client.start()
        await client.close()


LOGS_AND_FAILS = """
import logging, sys, warnings
from shoplm.engine import load, process

def load_backend(spec, **options):
    logging.getLogger("shoplm.engine").debug("loads")
    warnings.warn("of a library")
    raise RuntimeError("no memory")

load.load_backend = load_backend
sys.exit(process.main())
"""


class LogsAndFails(ProcessEngineClient):
    program = (sys.executable, "-c", LOGS_AND_FAILS)


async def test_an_engine_logs_as_its_server_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    client = LogsAndFails(msgspec.structs.replace(spec(tmp_path), log_format="json", log_level="debug"))
    async with asyncio.timeout(START_SECONDS):
        with pytest.raises(TransientError, match="the engine ended with code 1 while it was loading"):
            await client.start()
        await client.close()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    said = {line["logger"]: line for line in lines if line["level"] != "debug"}
    assert [line["message"] for line in lines if line["level"] == "debug"] == ["loads"]
    assert "of a library" in said["py.warnings"]["message"]
    assert "RuntimeError: no memory" in said["shoplm.engine"]["exception"]
    assert all(line["time"].endswith("Z") for line in lines)


async def test_the_working_directory_brings_no_modules(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("smollm2")
    (tmp_path / "msgspec.py").write_text("raise SystemExit('of the working directory')\n")
    monkeypatch.chdir(tmp_path)
    async with running(folder) as client:
        assert (await client.run(chat("r", 1))).completion_tokens == 1


async def test_an_engine_that_was_started_before_its_spec_was_known_serves_and_is_replaced(
    tiny_model: TinyModel,
) -> None:
    back = asyncio.Event()
    started = EngineProcess()
    client = ProcessEngineClient(spec(tiny_model("smollm2")), started=started)
    async with asyncio.timeout(2 * START_SECONDS):
        await client.start()
        assert client.process_id == started.id
        assert (await client.run(chat("first", 3))).completion_tokens == 3
        client.on_state(lambda serving: back.set() if serving else None)
        os.kill(started.id, signal.SIGKILL)
        await back.wait()
        assert client.process_id != started.id
        assert (await client.run(chat("next", 3))).completion_tokens == 3
        await client.close()
    started.discard()


def test_an_engine_that_nobody_wants_ends_at_once() -> None:
    started = EngineProcess()
    process = psutil.Process(started.id)
    begun = time.monotonic()
    started.discard()
    assert not process.is_running() and time.monotonic() - begun < 5.0


def test_an_engine_that_is_told_nothing_ends() -> None:
    started = EngineProcess()
    started.tell(b"")
    assert asyncio.run(started.wait()) == 0
    started.discard()


class NeverLoaded(ProcessEngineClient):
    program = (sys.executable, "-c", "import time; time.sleep(600)")


async def test_an_engine_that_is_loading_is_not_waited_for(tmp_path: Path) -> None:
    client = NeverLoaded(spec(tmp_path))
    starting = asyncio.create_task(client.start())
    while client.process_id is None:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.01)
    starting.cancel()
    process = psutil.Process(client.process_id)
    async with asyncio.timeout(5.0):  # one that was told to drain gets ten seconds
        await client.close()
    assert not process.is_running()


async def test_a_long_load_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "_LONG_LOAD_SECONDS", 0.01)
    client = NeverLoaded(spec(tmp_path))
    starting = asyncio.create_task(client.start())
    while caplog.text.count("the engine has been loading for 0 s") < 2:  # noqa: ASYNC110 - the log alone tells of it
        await asyncio.sleep(0.01)
    starting.cancel()
    await client.close()


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
