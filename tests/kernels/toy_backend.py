"""Toy models, catalogues and work for the tests of the GPU backend under the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from shoplm.batch import Batch, RowOutput
from shoplm.catalog.filters import ItemColumns, ItemFilters
from shoplm.catalog.trie import Trie
from shoplm.engine.direct import DirectRunner, Output
from shoplm.model.backend import Backend, BackendInfo, Handle
from shoplm.model.config import ModelConfig, RopeConfig
from shoplm.model.shop_weights import NamedTrie, ShopWeights, random_trie
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.triton_backend import TritonBackend
from shoplm.model.weights import DecoderWeights, LayerWeights
from shoplm.readout.habits import HabitTable, Neighbours
from shoplm.readout.heads import Heads
from shoplm.readout.table import SelectTable
from shoplm.request import (
    Embed,
    Explain,
    Generate,
    HeadValues,
    ItemFilter,
    ItemScores,
    Predict,
    Sampling,
    Select,
    SelectOutput,
    Task,
)
from toy_adapter import with_adapter

HIDDEN, MIDDLE, VOCABULARY, HEAD_DIM, QUERY_HEADS = 48, 80, 96, 64, 2
ITEMS, FEATURES = 40, 3
PAGES, PAGE_SIZE, STATE_SLOTS = 40, 16, 9
TOLERANCE = 2e-4


def toy_config(*, traits: bool, layers: int = 2) -> ModelConfig:
    """With `traits`, those that a family may have: biases, QK-norm, a window, a second layer without RoPE."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_layers=layers,
        num_heads=QUERY_HEADS,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500.0),
        uses_rope=(True, not traits)[:layers],
        sliding_windows=(19 if traits else None, None)[:layers],
        max_positions=128,
        tied_head=not traits,
        qkv_bias=traits,
        output_bias=traits,
        qk_norm=traits,
        bos_token_id=None,
        eos_token_ids=(),
    )


def toy_weights(config: ModelConfig) -> DecoderWeights:
    """Random weights large enough that every part of the model moves the result."""

    def normal(*shape: int, mean: float = 0.0, scale: float = 0.25) -> torch.Tensor:
        return mean + scale * torch.randn(shape)

    def norm(size: int) -> torch.Tensor:
        return normal(size, mean=1.0, scale=0.1)

    query_size = config.num_heads * config.head_dim
    layers = tuple(
        LayerWeights(
            input_norm=norm(HIDDEN),
            qkv=normal(config.qkv_size, HIDDEN),
            qkv_bias=normal(config.qkv_size) if config.qkv_bias else None,
            query_norm=norm(config.head_dim) if config.qk_norm else None,
            key_norm=norm(config.head_dim) if config.qk_norm else None,
            output=normal(HIDDEN, query_size),
            output_bias=normal(HIDDEN) if config.output_bias else None,
            mlp_norm=norm(HIDDEN),
            gate_up=normal(2 * MIDDLE, HIDDEN),
            down=normal(HIDDEN, MIDDLE),
        )
        for _ in range(config.num_layers)
    )
    embedding = normal(VOCABULARY, HIDDEN)
    return DecoderWeights(
        embedding, layers, norm(HIDDEN), embedding if config.tied_head else normal(VOCABULARY, HIDDEN)
    )


def toy_neighbours() -> Neighbours:
    """Each item goes with the three behind it."""
    near = (np.arange(ITEMS)[:, None] + np.arange(1, 4)) % ITEMS
    strengths = np.linspace(0.1, 1.0, 3 * ITEMS).astype(np.float32)
    return Neighbours(np.arange(0, 3 * ITEMS + 1, 3), near.ravel().astype(np.int32), strengths)


def toy_shop() -> ShopWeights:
    """Items of one token each, with every term of the score, columns to filter by, and two heads."""
    generator = np.random.default_rng(3)
    columns = ItemColumns(
        [("dairy", "fruit")[index % 2] for index in range(ITEMS)],
        generator.uniform(0, 10, ITEMS),
        generator.random(ITEMS) < 0.8,
    )
    table = SelectTable(
        trie=Trie.from_codes(np.arange(ITEMS, dtype=np.int32)[:, None], (ITEMS,)),
        output_rows=(0.2 * torch.randn(ITEMS, HIDDEN),),
        output_bias=(torch.randn(ITEMS),),
        token_starts=(VOCABULARY,),
        popularity=generator.normal(-8, 1, ITEMS).astype(np.float32),
        habits=HabitTable(1.3, 0.5, 9.0, generator.normal(0, 1, ITEMS).astype(np.float32), toy_neighbours()),
        popularity_weight=0.7,
        filters=ItemFilters(ITEMS, columns),
    )
    heads = Heads(torch.zeros(FEATURES), torch.full((FEATURES,), 2.0), torch.randn(2, HIDDEN + FEATURES), torch.ones(2))
    return ShopWeights(0.25 * torch.randn(ITEMS, HIDDEN), table, heads)


def toy_trie() -> NamedTrie:
    return random_trie("deep", items=60, level_sizes=(6, 5, 7), hidden_size=HIDDEN, seed=5)


def work() -> list[tuple[list[int], Task]]:
    """All services, their lengths around the pages' and the window's ends. Row 0 goes on chatting under all others."""
    # Drawn at a temperature, but from one token: the backends' noise differs, the token must not.
    sampled = Sampling(temperature=0.8, top_k=1, top_p=0.9, seed=4)
    tasks: list[tuple[int, Task]] = [
        (5, Generate(7)),
        (21, Select(6, 4, trie="deep", own_items=(3, 41, 3), own_counts=(1.0, 2.0, 0.5))),
        (17, Generate(4, sampled)),
        (16, Select(5, 0, own_items=(2, 30), own_counts=(0.7, 3.0), exclude_items=(11,))),
        (33, Predict((0.5, -1.0, 2.0))),
        (1, Select(4, 3, trie="deep", exclude_items=(7, 8))),
        (24, Select(5, 4, trie="deep", candidates=(0, 9, 17, 33, 59))),
        (9, Select(3, 0, item_filter=ItemFilter(include_categories=("fruit",)))),
        (12, Embed()),
    ]
    generator = np.random.default_rng(8)
    return [(generator.integers(0, VOCABULARY, length).tolist(), task) for length, task in tasks]


def explanations() -> list[tuple[list[int], Task]]:
    """Prompts with forks that read items, or heads, without parts of their histories."""
    history = np.random.default_rng(9).integers(0, VOCABULARY, 23).tolist()
    hidden = ((), ((2, 9),), ((0, 1), (15, 23)))
    features = tuple((0.5 * at,) * FEATURES for at in range(len(hidden)))
    return [
        (history + [11, 12] * 3, Explain(2, hidden, ItemScores((0, ITEMS - 1, 7)))),
        (history + [11, 12] * 3, Explain(2, hidden, HeadValues(features))),
        (history[:17] + [11, 12, 13] * 3, Explain(3, (((0, 17),), (), ((3, 5),)), ItemScores((1, 2, 3)))),
    ]


@dataclass
class Recorder:
    """A backend that also keeps what it was given and what it answered."""

    backend: Backend
    steps: list[tuple[Batch, tuple[RowOutput, ...]]] = field(default_factory=list)

    @property
    def info(self) -> BackendInfo:
        return self.backend.info

    def lanes(self, select: Select) -> int:
        return self.backend.lanes(select)

    def submit(self, batch: Batch) -> Handle:
        handle = self.backend.submit(batch)
        self.steps.append((batch, handle.result().outputs))
        return handle

    def close(self) -> None:
        self.backend.close()


def run(backend: Backend, chunk_tokens: int, jobs: Sequence[tuple[list[int], Task]]) -> tuple[Recorder, list[Output]]:
    recorder = Recorder(backend)
    pages: list[int] = np.random.default_rng(1).permutation(PAGES).tolist()
    runner = DirectRunner(recorder, chunk_tokens=chunk_tokens, free_pages=pages)
    return recorder, runner.run(jobs)


def backends(
    *, traits: bool, layers: int = 2, adapted: bool = False, **options: Any
) -> tuple[TorchBackend, TritonBackend]:
    """Both on the same weights and with the same `kv_format`; slots that nothing was written to read as NaN. `options`
    are the Triton backend's. `adapted`: with an adapter, which the torch backend has merged, the Triton one apart.

    Interpreting takes as long as there are layers: one does where a test is not about the layers.
    """
    torch.manual_seed(20240607)
    config = toy_config(traits=traits, layers=layers)
    weights, shop, tries = toy_weights(config), toy_shop(), [toy_trie()]
    apart, merged = with_adapter(weights) if adapted else (weights, weights)
    reference = TorchBackend(
        config, merged, shop, tries, pages=PAGES, page_size=PAGE_SIZE, state_slots=STATE_SLOTS,
        kv_format=options.get("kv_format", "model"),
    )  # fmt: skip
    backend = TritonBackend(
        config, apart, shop, tries, pages=PAGES, page_size=PAGE_SIZE, state_slots=STATE_SLOTS,
        **{"device": "cpu", "max_step_tokens": 32, **options},
    )  # fmt: skip
    for kv in backend.pool:
        for poisoned in (kv.k, kv.v) if kv.k_scale is None or kv.v_scale is None else (kv.k_scale, kv.v_scale):
            poisoned.fill_(torch.nan)
    return reference, backend


def assert_same(expected: RowOutput | Output, found: RowOutput | Output, tolerance: float = TOLERANCE) -> None:
    """Token for token and item for item; scores, predictions and hidden states up to rounding."""
    if isinstance(expected, SelectOutput):
        assert isinstance(found, SelectOutput)
        assert found.items == expected.items
        for name in ("scores", "model", "repeat", "popularity"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=tolerance, rtol=0)
    elif isinstance(expected, tuple) and expected and isinstance(expected[0], float):
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)  # type: ignore[arg-type]
    else:
        assert found == expected


def chats(*samplings: Sampling) -> list[tuple[list[int], Task]]:
    """The same prompt for each setting."""
    return [([5, 17, 80, 2], Generate(6, sampling)) for sampling in samplings]
