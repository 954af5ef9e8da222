"""Explanations through a whole engine: the same alone, in company, in small steps and behind a cached history."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from real_engine import Answer, answer, answers, assert_same, request, running
from shoplm.engine.spec import EngineSpec
from shoplm.errors import InvalidRequestError
from shoplm.request import Embed, Explain, Generate, HeadValues, ItemScores, Request, Select

TinyModel = Callable[[str], Path]
HISTORY = tuple(np.random.default_rng(3).integers(3, 448, 70).tolist())
SUFFIX = (11, 12)
ITEMS = (5, 199, 0)
HIDDEN = ((), ((3, 20),), ((0, 2), (60, 69)), *(((at, at + 4),) for at in range(0, 60, 4)))


def spec(folder: Path, **fields: object) -> EngineSpec:
    bounds = {"dtype": "float32", "kv_cache_bytes": 4 << 20, "max_step_tokens": 96, "max_mixed_prompt_tokens": 40}
    return EngineSpec(base_folder=str(folder), **{**bounds, **fields})  # type: ignore[arg-type]


def explanations(name: str) -> list[Request]:
    tokens = HISTORY + SUFFIX * len(HIDDEN)
    reads = (ItemScores(ITEMS), HeadValues(tuple((0.5, -1.0, at) for at in range(len(HIDDEN)))))
    return [request(f"{name} {at}", tokens, Explain(len(SUFFIX), HIDDEN, each)) for at, each in enumerate(reads)]


def chats(count: int) -> list[Request]:
    return [request(f"chat {at}", HISTORY[: 5 * at + 5], Generate(12)) for at in range(count)]


async def alone(folder: Path) -> list[Answer]:
    async with running(spec(folder, max_running_requests=1)) as client:
        return [await answer(client, each) for each in explanations("alone")]


@pytest.mark.parametrize("family", ["smollm2", "mistral"])
async def test_an_explanation_does_not_depend_on_company_steps_or_cache(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    expected = await alone(folder)
    async with running(spec(folder, max_step_tokens=21, max_mixed_prompt_tokens=13)) as client:
        cold = await answers(client, [*explanations("cold"), *chats(10)])
        warm = await answers(client, [*explanations("warm"), *chats(4)])
        ranked = await answer(client, request("rank", HISTORY + SUFFIX, Select(3, 0, candidates=ITEMS)))
    for wanted, first, second in zip(expected, cold, warm, strict=False):
        assert_same(wanted, first)
        assert_same(wanted, second)
    assert [each.end.cached_tokens for each in warm[:2]] == [64, 64]
    assert ranked.end.selected is not None
    model = dict(zip(ranked.end.selected.items, ranked.end.selected.model, strict=True))
    np.testing.assert_allclose(expected[0].end.values[:3], [model[item] for item in ITEMS], atol=1e-4)
    assert len(expected[1].end.values) == 4 * len(HIDDEN)


async def test_nobody_reads_the_keys_of_forks(tiny_model: TinyModel) -> None:
    """A prompt that goes on as the forks do has the history's pages in common with them, and no more."""
    folder = tiny_model("smollm2")
    tokens = HISTORY + SUFFIX * len(HIDDEN)
    async with running(spec(folder)) as client:
        expected = await answer(client, request("before", tokens, Embed()))
    async with running(spec(folder)) as client:
        await answer(client, explanations("first")[0])
        found = await answer(client, request("after", tokens, Embed()))
    assert found.end.cached_tokens == 64
    assert_same(expected, found)


async def test_explanations_survive_preemption(tiny_model: TinyModel) -> None:
    folder = tiny_model("smollm2")
    expected = await alone(folder)
    async with running(spec(folder, kv_cache_bytes=14 * 16 * 256, max_step_tokens=24)) as client:
        assert client.ready is not None and client.ready.pages == 14
        long = [request(f"long {at}", HISTORY[at : at + 9], Generate(60)) for at in range(6)]
        found = await answers(client, [*long, *explanations("late")])
    for wanted, got in zip(expected, found[6:], strict=True):
        assert_same(wanted, got)


async def test_what_cannot_be_explained_is_refused(tiny_model: TinyModel) -> None:
    async with running(spec(tiny_model("smollm2"))) as client:
        tokens = HISTORY + SUFFIX
        for trie in ("deep", "other"):
            with pytest.raises(InvalidRequestError, match="codes of one token"):
                await client.run(request(trie, tokens, Explain(2, ((),), ItemScores((1,), trie))))
