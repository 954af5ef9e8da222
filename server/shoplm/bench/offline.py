"""Offline throughput: all requests at once, raw token ids through the engine API."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import grpc
from shoplm.bench.calls import bearer, open_channel
from shoplm.v1 import engine_pb2, engine_pb2_grpc

# Ids that every supported base model has and that are ordinary text in all of them.
TOKEN_IDS = range(1_000, 30_000)


@dataclass(frozen=True, slots=True)
class OfflineShape:
    """`requests` prompts of `prompt_tokens` random tokens each, `output_tokens` to produce for each."""

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        for field in ("requests", "prompt_tokens", "output_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"OfflineShape.{field}={getattr(self, field)} must be at least 1")


PROMPTS = OfflineShape("prompts", requests=32, prompt_tokens=512, output_tokens=1)
OUTPUTS = OfflineShape("outputs", requests=32, prompt_tokens=128, output_tokens=64)


@dataclass(frozen=True, slots=True)
class OfflineResult:
    """Throughput of one shape over its runs: from the first request sent to the last token received.

    Rates are of the median run; prompt time is included in the output rate, as is usual.
    """

    shape: OfflineShape
    seconds: tuple[float, ...]  # of each run
    prompt_tokens_per_second: float
    output_tokens_per_second: float
    cached_tokens: int  # over all runs; not 0 means that prompts were repeated, and the rates are too good


class OfflineError(Exception):
    """The throughput could not be measured; the message says why."""


async def run_offline(
    address: str,
    shape: OfflineShape,
    *,
    runs: int = 3,
    seed: int = 1,
    timeout_seconds: float = 600.0,
    token: str | None = None,
) -> OfflineResult:
    """Measure `shape`; every prompt of every run is a different one. Raises OfflineError when a call fails."""
    generator = random.Random(seed)
    metadata = bearer(token)
    seconds: list[float] = []
    cached = 0
    async with open_channel(address) as channel:
        stub: Any = engine_pb2_grpc.EngineServiceStub(channel)
        await _generate(stub, _prompt(generator, 16), 4, timeout_seconds, metadata)  # opens the connection
        for _ in range(runs):
            prompts = [_prompt(generator, shape.prompt_tokens) for _ in range(shape.requests)]
            start = time.perf_counter()
            ends = await asyncio.gather(
                *(_generate(stub, prompt, shape.output_tokens, timeout_seconds, metadata) for prompt in prompts)
            )
            seconds.append(time.perf_counter() - start)
            cached += sum(ends)
    median = statistics.median(seconds)
    return OfflineResult(
        shape=shape,
        seconds=tuple(seconds),
        prompt_tokens_per_second=shape.requests * shape.prompt_tokens / median,
        output_tokens_per_second=shape.requests * shape.output_tokens / median,
        cached_tokens=cached,
    )


def _prompt(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(TOKEN_IDS.start, TOKEN_IDS.stop) for _ in range(length)]


async def _generate(
    stub: Any, prompt: list[int], tokens: int, timeout_seconds: float, metadata: tuple[tuple[str, str], ...]
) -> int:
    """Returns the cached prompt tokens; checks that exactly `tokens` tokens came."""
    request = engine_pb2.GenerateRequest(token_ids=prompt, max_tokens=tokens, ignore_eos=True)
    received, cached, finished = 0, 0, False
    try:
        async for answer in stub.Generate(request, timeout=timeout_seconds, metadata=metadata):
            received += len(answer.token_ids)
            if answer.finished:
                cached, finished = answer.cached_tokens, True
    except grpc.aio.AioRpcError as error:
        advice = "; start the server with --engine-api" if error.code() is grpc.StatusCode.UNIMPLEMENTED else ""
        raise OfflineError(f"EngineService.Generate: {error.code().name}: {error.details()}{advice}") from error
    if not finished or received != tokens:
        raise OfflineError(f"EngineService.Generate returned {received} tokens of {tokens}, finished: {finished}")
    return cached
