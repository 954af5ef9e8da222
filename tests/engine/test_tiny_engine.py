"""A whole engine on tiny models: its answers do not depend on company, cache, chunks or memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from greedy_reference import greedy_answers
from real_engine import Answer, answer, answers, assert_same, request, running, tasks
from shoplm.engine.client import EngineClient
from shoplm.engine.spec import EngineSpec
from shoplm.errors import (
    EngineUnavailableError,
    ExpiredError,
    InvalidRequestError,
    OverloadedError,
)
from shoplm.request import Embed, Generate, Request, Select, StepStats, TokensOutput, token_ids

TinyModel = Callable[[str], Path]
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 64, 90, 150)
NEW_TOKENS = 16


@lru_cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """Some of them continue others, so that they share pages."""
    generator = np.random.default_rng(11)
    history = generator.integers(3, 448, 200).tolist()
    own = [tuple(generator.integers(3, 448, length).tolist()) for length in LENGTHS]
    return (*own, *((*history[: 20 * index], *own[index % len(own)][:9]) for index in range(1, 9)))


@lru_cache
def reference(folder: Path) -> tuple[tuple[int, ...], ...]:
    return tuple(greedy_answers(folder, prompts(), NEW_TOKENS))


def spec(folder: Path, **fields: object) -> EngineSpec:
    bounds = {"dtype": "float32", "kv_cache_bytes": 4 << 20, "page_size": 16, "max_step_tokens": 96}
    return EngineSpec(base_folder=str(folder), **{**bounds, "max_mixed_prompt_tokens": 40, **fields})  # type: ignore[arg-type]


def chats(root: str = "") -> list[Request]:
    return [request(f"chat {i} {root}", prompt, Generate(NEW_TOKENS), root=root) for i, prompt in enumerate(prompts())]


def others(root: str = "") -> list[Request]:
    asked = [request(f"task {i} {root}", prompts()[i], task, root=root) for i, task in enumerate(tasks(len(prompts())))]
    return [*asked, request(f"state {root}", prompts()[5], Embed(), root=root)]


class Reports:
    """The engine's reports, which come a few times a second."""

    def __init__(self, client: EngineClient) -> None:
        self.seen: list[StepStats] = []
        self._came = asyncio.Event()
        client.on_stats(self._take)

    def _take(self, stats: StepStats) -> None:
        self.seen.append(stats)
        self._came.set()

    async def until(self, tells: Callable[[StepStats], bool]) -> None:
        """Wait for a report that tells it."""
        async with asyncio.timeout(10):
            while not any(map(tells, self.seen)):
                await self._came.wait()
                self._came.clear()


async def alone(folder: Path, asked: list[Request], **fields: object) -> list[Answer]:
    """One after another; an engine with room for nothing but one of them at a time."""
    async with running(spec(folder, max_running_requests=1, **fields)) as client:
        return [await answer(client, each) for each in asked]


@pytest.mark.parametrize("family", ["smollm2", "mistral", "qwen3"])
async def test_greedy_equals_transformers_alone_in_company_and_warm(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    one_by_one = await alone(folder, chats())
    assert tuple(got.tokens for got in one_by_one) == reference(folder)
    async with running(spec(folder)) as client:
        for temperature in ("cold", "warm"):
            names = [f"{temperature} {index}" for index in range(len(prompts()))]
            asked = [request(name, prompt, Generate(NEW_TOKENS)) for name, prompt in zip(names, prompts(), strict=True)]
            company = [request(f"{temperature} {each.request_id}", each.tokens, each.task) for each in others()]
            got = (await answers(client, [*asked, *company]))[: len(asked)]
            assert tuple(each.tokens for each in got) == reference(folder)
        cached = [each.end.cached_tokens for each in got]
    assert cached == [min(len(prompt) // 16 * 16, len(prompt) - 1) for prompt in prompts()]


@pytest.mark.parametrize("family", ["smollm2", "mistral"])
async def test_recommendations_and_predictions_do_not_depend_on_company_or_cache(
    tiny_model: TinyModel, family: str
) -> None:
    folder = tiny_model(family)
    expected = await alone(folder, others())
    async with running(spec(folder)) as client:
        reports = Reports(client)
        cold = (await answers(client, [*others(), *chats()]))[: len(expected)]
        warm = await answers(client, [request(f"again {each.request_id}", each.tokens, each.task) for each in others()])
        await reports.until(lambda stats: stats.mixed_steps > 0)
    assert sum(stats.mixed_steps for stats in reports.seen) > 0
    assert any(each.end.cached_tokens for each in warm)
    for wanted, first, second in zip(expected, cold, warm, strict=True):
        assert_same(wanted, first)
        assert_same(wanted, second)
    # The answers differ between prompts: it is the prompt that is read.
    assert len({each.end.selected.scores for each in expected if each.end.selected is not None}) > 10


async def test_answers_survive_preemption(tiny_model: TinyModel) -> None:
    folder = tiny_model("smollm2")
    # 2 layers x 1 head x 16 x 2 x 4 bytes = 256 bytes a token: 16 pages for 18 chats of up to 186 tokens.
    async with running(spec(folder, kv_cache_bytes=16 * 16 * 256)) as client:
        assert client.ready is not None and client.ready.pages == 16
        got = await answers(client, chats())
        assert tuple(each.tokens for each in got) == reference(folder)


async def test_a_closed_stream_cancels_its_request(tiny_model: TinyModel) -> None:
    async with running(spec(tiny_model("smollm2"), max_running_requests=1)) as client:
        stream = client.generate(request("long", range(3, 20), Generate(200)))
        await anext(stream)
        await stream.aclose()
        # There is one state slot: the next request runs because the first has gone.
        reports = Reports(client)
        got = await answer(client, request("next", range(3, 20), Generate(2)))
        assert len(got.tokens) == 2 and client.in_flight == 0
        await answer(client, request("third", range(3, 20), Generate(2)))
        await reports.until(lambda stats: "chat:cancelled" in stats.failures)
    assert sum(each.failures.get("chat:cancelled", 0) for each in reports.seen) == 1


async def test_refusals_come_as_their_own_errors(tiny_model: TinyModel) -> None:
    async with running(spec(tiny_model("smollm2"), max_queued_tokens=40)) as client:
        with pytest.raises(InvalidRequestError, match="context holds 256"):
            await client.run(request("long", range(3, 200), Generate(100)))
        with pytest.raises(InvalidRequestError, match="no trie is named 'other'"):
            await client.run(request("trie", [3], Select(1, 1, trie="other")))
        with pytest.raises(OverloadedError, match="tokens are queued"):
            await client.run(request("large", range(3, 60), Generate(1)))
        late = Request("late", request("", [3], Embed()).service, token_ids([3]), Embed(), 0.0, deadline_seconds=0.1)
        with pytest.raises(ExpiredError):
            await client.run(late)
        assert len((await answer(client, request("good", [3], Generate(3)))).tokens) == 3


async def test_an_id_in_use_is_refused_and_its_owner_gets_everything(tiny_model: TinyModel) -> None:
    async with running(spec(tiny_model("smollm2"))) as client:
        owner = client.generate(request("same", prompts()[0], Generate(NEW_TOKENS)))
        first = await anext(owner)
        with pytest.raises(InvalidRequestError, match="'same' is in use"):
            await client.run(request("same", prompts()[1], Embed()))
        got = [first, *[output async for output in owner]]
        assert sum(len(output.tokens) for output in got if isinstance(output, TokensOutput)) == NEW_TOKENS


async def test_closing_fails_what_is_in_flight_and_refuses_the_rest(tiny_model: TinyModel) -> None:
    async with running(spec(tiny_model("smollm2"))) as client:
        calls = [asyncio.create_task(client.run(request(f"r{i}", range(3, 20), Generate(200)))) for i in range(5)]
        stream = client.generate(request("started", range(3, 20), Generate(230)))
        await anext(stream)
        await client.close()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, EngineUnavailableError) for end in ends)
        with pytest.raises(EngineUnavailableError):
            async for _ in stream:
                pass
        with pytest.raises(EngineUnavailableError):
            await client.run(request("late", [3], Embed()))
