"""The engine as a process, until it is loaded: what it is told, what it cannot load, and that it is not waited for."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from engine_process import START_SECONDS, TinyModel, chat, running, spec
from shoplm.bundle import manifest_hash
from shoplm.engine import supervisor
from shoplm.engine.launch import EngineProcess
from shoplm.engine.load import check_bundle
from shoplm.engine.spec import EngineSpec
from shoplm.engine.supervisor import ProcessEngineClient
from shoplm.errors import BundleChangedError, ConfigurationError, TransientError


def test_an_engine_that_is_started_again_finds_the_same_bundle(tmp_path: Path) -> None:
    bundle = Path(__file__).parents[2] / "bundles" / "complete-journey"
    for name in ("shop.toml", "items.parquet", "types.parquet"):
        shutil.copy(bundle / name, tmp_path)
    asked = EngineSpec("", str(tmp_path), bundle_hash=manifest_hash(tmp_path))
    (tmp_path / "shop.toml").write_text((tmp_path / "shop.toml").read_text() + "\n# edited\n")
    with pytest.raises(BundleChangedError, match="is another bundle than when the server started"):
        check_bundle(asked)


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
    started.send_shop_texts(b"")
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
