"""An engine of a tiny base in a process of its own, and requests to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from shoplm.engine.spec import EngineSpec
from shoplm.engine.supervisor import ProcessEngineClient
from shoplm.request import Generate, Request, Service, token_ids

TinyModel = Callable[[str], Path]
START_SECONDS = 90.0  # imports torch, on a machine that may be busy


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
