"""A real engine in a thread, on any base model, with a random shop of one code per item and one of three."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np
import torch
from shoplm.engine.client import EngineClient, ThreadEngineClient
from shoplm.engine.spec import EngineSpec
from shoplm.model.backend import Backend
from shoplm.model.config import ModelConfig
from shoplm.model.shop_weights import ShopWeights, random_trie
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import load_weights
from shoplm.readout.heads import Heads
from shoplm.request import FinishedOutput, Generate, Predict, Request, Select, Service, Task, TokensOutput, token_ids

FEATURES, ITEMS, SEED = 3, 200, 20180101
_HANG_SECONDS = 600.0  # of what takes half a minute, on a machine that may be busy


@dataclasses.dataclass(frozen=True)
class Answer:
    """All that a request got."""

    tokens: tuple[int, ...]
    end: FinishedOutput


def _shop(hidden_size: int, text_tokens: int) -> ShopWeights:
    generator = torch.Generator().manual_seed(SEED)
    flat = random_trie("", items=ITEMS, level_sizes=(ITEMS,), hidden_size=hidden_size, seed=SEED)
    popularity = np.random.default_rng(SEED).normal(-5, 1, ITEMS).astype(np.float32)
    table = dataclasses.replace(flat.table(text_tokens), popularity=popularity, popularity_weight=0.5)
    heads = Heads(
        input_mean=torch.zeros(FEATURES),
        input_scale=torch.ones(FEATURES),
        weight=0.1 * torch.randn(4, hidden_size + FEATURES, generator=generator),
        bias=torch.randn(4, generator=generator),
    )
    return ShopWeights(flat.input_rows, table, heads)


def load(spec: EngineSpec) -> Backend:
    """The spec's base in fp32 with the random shop."""
    folder = Path(spec.base_folder)
    config = ModelConfig.from_folder(folder)
    weights = load_weights(folder, config)
    page_bytes = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * spec.page_size
    deep = random_trie("deep", items=2_000, level_sizes=(20, 20, 20), hidden_size=config.hidden_size, seed=SEED)
    return TorchBackend(
        config,
        weights,
        _shop(config.hidden_size, len(weights.embedding)),
        [deep],
        pages=spec.kv_cache_bytes // page_bytes,
        page_size=spec.page_size,
        state_slots=spec.max_running_requests,
    )


@asynccontextmanager
async def running(spec: EngineSpec) -> AsyncIterator[EngineClient]:
    """The engine, until the block ends; a block that hangs fails."""
    client = ThreadEngineClient(spec, load)
    await client.start()
    try:
        async with asyncio.timeout(_HANG_SECONDS):
            yield client
    finally:
        await client.close()


def request(name: str, tokens: Sequence[int], task: Task, *, root: str = "") -> Request:
    """A request that arrived when the machine was started: it is always in time."""
    service = {Generate: Service.CHAT, Select: Service.RECOMMENDATION}.get(type(task), Service.PREDICTION)
    return Request(name, service, token_ids(tokens), task, arrival_seconds=0.0, cache_root=root)


async def answer(client: EngineClient, asked: Request) -> Answer:
    """Waits for everything that the request gets."""
    tokens: list[int] = []
    async with aclosing(client.generate(asked)) as outputs:
        async for output in outputs:
            if isinstance(output, TokensOutput):
                tokens.extend(output.tokens)
            else:
                return Answer(tuple(tokens), output)
    raise AssertionError(f"{asked.request_id} has no end")


async def answers(client: EngineClient, asked: Sequence[Request]) -> list[Answer]:
    """All at once: they share the engine's steps."""
    return list(await asyncio.gather(*(answer(client, each) for each in asked)))


def assert_same(one: Answer, other: Answer) -> None:
    """The same tokens and items; scores and values to 1e-4."""
    assert one.tokens == other.tokens
    assert len(one.end.values) == len(other.end.values)
    np.testing.assert_allclose(one.end.values, other.end.values, atol=1e-4, rtol=0)
    if one.end.selected is None or other.end.selected is None:
        assert one.end.selected is other.end.selected
        return
    assert one.end.selected.items == other.end.selected.items
    for term in ("scores", "model", "repeat", "popularity"):
        mine, its = getattr(one.end.selected, term), getattr(other.end.selected, term)
        np.testing.assert_allclose(mine, its, atol=1e-4, rtol=0, err_msg=term)


def tasks(count: int) -> list[Task]:
    """Recommendations of both shops, a ranking and predictions, in turn."""
    kinds: list[Task] = [
        Select(10, 10, own_items=(3, 7), own_counts=(1.0, 2.5)),
        Select(8, 16, trie="deep"),
        Predict((0.5, -1.0, 2.0)),
        Select(3, 3, candidates=(1, 5, 199)),
        Select(4, 8, trie="deep", exclude_items=tuple(range(0, 2_000, 2))),
    ]
    return [kinds[index % len(kinds)] for index in range(count)]
