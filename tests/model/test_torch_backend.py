"""The CPU backend against transformers, whatever the chunks, pages and batch mates are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from greedy_reference import greedy_answers
from shoplm.batch import Batch, PredictReadout, Row, SampleReadout
from shoplm.engine.direct import DirectRunner
from shoplm.errors import BundleError, ConfigurationError
from shoplm.model.config import ModelConfig
from shoplm.model.shop_weights import random_trie
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import load_weights
from shoplm.request import Embed, Generate, Sampling, Select, Task

TinyModel = Callable[[str], Path]
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 33, 64, 150)  # the longest is more than one block of queries
NEW_TOKENS = 12


@lru_cache
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, 448, length).tolist() for length in PROMPT_LENGTHS]


@lru_cache
def reference(folder: Path) -> list[tuple[int, ...]]:
    return greedy_answers(folder, prompts(), NEW_TOKENS)


def make_backend(folder: Path, *, page_size: int = 16, tokens: int = 1024, poison: bool = True) -> TorchBackend:
    config = ModelConfig.from_folder(folder)
    backend = TorchBackend(
        config,
        load_weights(folder, config),
        tries=[random_trie("shop", items=300, level_sizes=(9, 11, 7), hidden_size=config.hidden_size, seed=3)],
        pages=tokens // page_size,
        page_size=page_size,
        state_slots=16,
    )
    if poison:  # whatever is read without having been written shows
        backend.pool.keys.fill_(torch.nan)
        backend.pool.values.fill_(torch.nan)
    return backend


def shuffled(backend: TorchBackend) -> list[int]:
    pages: list[int] = np.random.default_rng(1).permutation(backend.info.pages).tolist()
    return pages


def greedy(backend: TorchBackend, chunk_tokens: int) -> list[tuple[int, ...]]:
    runner = DirectRunner(backend, chunk_tokens=chunk_tokens, free_pages=shuffled(backend))
    answers = runner.run([(prompt, Generate(NEW_TOKENS)) for prompt in prompts()])
    return [tuple(int(token) for token in answer) for answer in answers if isinstance(answer, tuple)]


def test_greedy_equals_transformers_at_every_chunk_size(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    backend, expected = make_backend(folder), reference(folder)
    for chunk_tokens in (*range(1, 65), 2048):
        assert greedy(backend, chunk_tokens) == expected, f"chunks of {chunk_tokens} tokens"


@pytest.mark.parametrize("page_size", [1, 2, 3, 5, 7, 16, 64])
def test_greedy_equals_transformers_at_every_page_size(tiny_model: TinyModel, family: str, page_size: int) -> None:
    folder = tiny_model(family)
    assert greedy(make_backend(folder, page_size=page_size), chunk_tokens=13) == reference(folder)


def tasks() -> list[Task]:
    select = Select(count=5, beam_width=6, trie="shop", own_items=(4, 250), own_counts=(2.0, 0.5))
    sampled = Generate(6, Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=11))
    return [Embed(), select, Generate(8), sampled, Embed(), select, Generate(3), Embed()]


def test_a_result_does_not_depend_on_the_batch(tiny_model: TinyModel, family: str) -> None:
    backend = make_backend(tiny_model(family))
    work = list(zip(prompts(), tasks(), strict=True))
    alone = [DirectRunner(backend).run([one])[0] for one in work]
    for chunk_tokens in (5, 40, 2048):
        together = DirectRunner(backend, chunk_tokens=chunk_tokens, free_pages=shuffled(backend)).run(work)
        for (_, task), one, other in zip(work, alone, together, strict=True):
            if isinstance(task, Generate):
                assert one == other
            elif isinstance(task, Select):
                assert one.items == other.items  # type: ignore[union-attr]
                np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)  # type: ignore[union-attr]
            else:
                np.testing.assert_allclose(one, other, atol=1e-4)  # type: ignore[arg-type]


def test_bf16_follows_fp32(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    config = ModelConfig.from_folder(folder)
    work = [(prompt, Embed()) for prompt in prompts()]
    states = []
    for dtype in (torch.float32, torch.bfloat16):
        backend = TorchBackend(config, load_weights(folder, config, dtype), pages=64, state_slots=8)
        states.append(np.array(DirectRunner(backend).run(work)))
    cosine = (states[0] * states[1]).sum(1) / np.linalg.norm(states[0], axis=1) / np.linalg.norm(states[1], axis=1)
    assert cosine.min() > 0.99


def test_a_failed_step_raises_from_its_result(tiny_model: TinyModel) -> None:
    backend = make_backend(tiny_model("llama"))
    row = Row(0, 0, 1, np.zeros(1, np.int32), 1, readout=PredictReadout(()))
    handle = backend.submit(Batch(np.ones(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int64), (row,)))
    with pytest.raises(BundleError, match="no heads"):
        handle.result()


def test_settings_that_cannot_work_are_refused(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    config = ModelConfig.from_folder(folder)
    with pytest.raises(ConfigurationError, match=r"float16.*bfloat16 or float32"):
        TorchBackend(config, load_weights(folder, config, torch.float16), pages=4)
    trie = random_trie("a", items=3, level_sizes=(3,), hidden_size=config.hidden_size, seed=0)
    with pytest.raises(ConfigurationError, match="names that differ"):
        TorchBackend(config, load_weights(folder, config), tries=[trie, trie], pages=4)
    narrow = random_trie("a", items=3, level_sizes=(3,), hidden_size=7, seed=0)
    with pytest.raises(BundleError, match="another base model"):
        TorchBackend(config, load_weights(folder, config), tries=[narrow], pages=4)


def test_info_names_what_the_scheduler_needs(tiny_model: TinyModel) -> None:
    info = make_backend(tiny_model("qwen3")).info
    assert (info.vocab_size, info.trie_depths, info.trie_items) == (448 + 27, {"shop": 3}, {"shop": 300})
    assert info.max_context_tokens == 256


def test_tokens_come_from_the_state(tiny_model: TinyModel) -> None:
    """A step may name a token that the step before drew, without having asked for that step's result."""
    folder = tiny_model("smollm2")
    backend = make_backend(folder)
    prompt, expected = prompts()[2], reference(folder)[2]
    handles = []
    for position in itertools.chain([len(prompt) - 1], range(len(prompt), len(prompt) + 3)):
        first = not handles
        count = len(prompt) if first else 1
        tokens = np.array(prompt if first else [0], np.int32)
        at = np.arange(position + 1 - count, position + 1)
        generate = Generate(4)
        row = Row(
            5,
            0,
            count,
            np.arange(8, dtype=np.int32),
            position + 1,
            not first,
            None,
            SampleReadout(generate.sampling, 0),
        )
        handles.append(backend.submit(Batch(tokens, at.astype(np.int32), at.astype(np.int64), (row,))))
    assert tuple(handle.result().outputs[0] for handle in handles) == expected[:4]
