"""The whole GPU backend under the interpreter: mixed steps of all services equal the torch backend's, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from shoplm.catalog.filters import ItemColumns, ItemFilters
from shoplm.catalog.trie import Trie
from shoplm.engine.batch import (
    Batch,
    EmbedReadout,
    PredictReadout,
    Row,
    RowOutput,
    SampleReadout,
    SelectReadout,
)
from shoplm.errors import ConfigurationError
from shoplm.model.backend import Backend, BackendInfo, Handle
from shoplm.model.config import ModelConfig, RopeConfig
from shoplm.model.direct import DirectRunner, Output
from shoplm.model.shop_weights import NamedTrie, ShopWeights, random_trie
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.triton_backend import TritonBackend
from shoplm.model.weights import DecoderWeights, LayerWeights
from shoplm.readout.heads import Heads
from shoplm.readout.table import SelectTable
from shoplm.request import Embed, Generate, ItemFilter, Predict, Sampling, Select, SelectOutput, Task

HIDDEN, MIDDLE, VOCABULARY, HEAD_DIM, QUERY_HEADS = 48, 80, 96, 64, 2
ITEMS, FEATURES = 40, 3
PAGES, PAGE_SIZE, STATE_SLOTS = 40, 16, 9
TOLERANCE = 2e-4


def toy_config(*, traits: bool) -> ModelConfig:
    """Two layers. With `traits`, those that a family may have: biases, QK-norm, a window, a layer without RoPE."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_layers=2,
        num_heads=QUERY_HEADS,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500.0),
        uses_rope=(True, not traits),
        sliding_windows=(19 if traits else None, None),
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
        repeat_weight=1.3,
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


def backends(*, traits: bool) -> tuple[TorchBackend, TritonBackend]:
    """Both on the same weights; slots that nothing was written to read as NaN."""
    config = toy_config(traits=traits)
    weights, shop, tries = toy_weights(config), toy_shop(), [toy_trie()]
    reference = TorchBackend(config, weights, shop, tries, pages=PAGES, page_size=PAGE_SIZE, state_slots=STATE_SLOTS)
    backend = TritonBackend(
        config, weights, shop, tries, pages=PAGES, page_size=PAGE_SIZE, state_slots=STATE_SLOTS, max_beam_tokens=32,
        device="cpu",
    )  # fmt: skip
    for kv in backend.pool:
        kv.k.fill_(torch.nan)
        kv.v.fill_(torch.nan)
    return reference, backend


def assert_same(expected: RowOutput | Output, found: RowOutput | Output) -> None:
    """Token for token and item for item; scores, predictions and hidden states up to rounding."""
    if isinstance(expected, SelectOutput):
        assert isinstance(found, SelectOutput)
        assert found.items == expected.items
        for name in ("scores", "model", "repeat", "popularity"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=TOLERANCE, rtol=0)
    elif isinstance(expected, tuple) and expected and isinstance(expected[0], float):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)  # type: ignore[arg-type]
    else:
        assert found == expected


def kinds(batch: Batch) -> set[str]:
    """What a step mixes."""
    names = {SampleReadout: "sample", PredictReadout: "predict", EmbedReadout: "embed", type(None): "chunk"}
    found = set()
    for row in batch.rows:
        if isinstance(row.readout, SelectReadout):
            found.add("beams" if row.beam is not None else "select")
        else:
            found.add("decode" if row.token_from_state else names[type(row.readout)])
    return found


@pytest.mark.parametrize("traits", [False, True], ids=["llama", "every-trait"])
def test_mixed_steps_of_all_services_equal_the_torch_backend(traits: bool) -> None:
    reference, backend = backends(traits=traits)
    expected, outputs = run(reference, 15, work())
    found, answers = run(backend, 15, work())
    assert backend.info == replace(reference.info, name="triton", pipeline_depth=2)
    # Else the test would not show what it says: prompt, chat, searches and predictions in one launch.
    mixes = [kinds(batch) for batch, _ in expected.steps]
    assert any({"chunk", "decode", "beams"} <= mix for mix in mixes), mixes
    assert any({"decode", "predict", "beams"} <= mix for mix in mixes), mixes
    assert {"select", "embed", "sample"} <= set().union(*mixes)
    assert len(found.steps) == len(expected.steps) >= 7
    for (batch, want), (_, have) in zip(expected.steps, found.steps, strict=True):
        assert len(want) == len(have) == len(batch.rows)
        for one, other in zip(want, have, strict=True):
            assert_same(one, other)
    for output, answer in zip(outputs, answers, strict=True):
        assert_same(output, answer)


def chats(*samplings: Sampling) -> list[tuple[list[int], Task]]:
    """The same prompt for each setting."""
    return [([5, 17, 80, 2], Generate(6, sampling)) for sampling in samplings]


def test_a_seed_gives_the_same_tokens_in_every_run() -> None:
    """Beside other rows and alone, on a fresh backend: settings and seed decide, and both do."""
    _, backend = backends(traits=False)
    wide, cut = Sampling(temperature=1.5, seed=2**63 + 11), Sampling(temperature=1.5, top_k=30, top_p=0.9, seed=7)
    other = Sampling(temperature=1.5, seed=8)
    _, [first, second, third, greedy] = run(backend, 2048, chats(wide, cut, other, Sampling()))
    assert len({first, second, third, greedy}) == 4
    torch.manual_seed(20240607)  # the same weights once more
    _, fresh = backends(traits=False)
    assert run(fresh, 2048, [*work()[:2], *chats(cut)])[1][2] == second
    assert run(fresh, 1, chats(wide))[1] == [first]


def test_a_result_does_not_depend_on_the_batch() -> None:
    """Alone or among all services, in chunks of any size: the same tokens and items."""
    _, backend = backends(traits=False)
    jobs = [work()[1], *chats(Sampling(temperature=1.5, top_p=0.9, seed=3))]
    _, together = run(backend, 2048, jobs)
    for job, output in zip(jobs, together, strict=True):
        _, [alone] = run(backend, 9, [job])
        assert_same(alone, output)


def test_a_failed_step_raises_from_its_result() -> None:
    _, backend = backends(traits=False)
    row = Row(0, 0, 1, np.zeros(1, np.int32), 1, readout=SelectReadout(Select(1, 1, trie="nowhere"), 0))
    handle = backend.submit(Batch(np.ones(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int64), (row,)))
    with pytest.raises(ValueError, match="'nowhere' does not exist"):
        handle.result()


def test_more_lanes_than_there_is_scratch_for_are_refused() -> None:
    _, backend = backends(traits=False)
    with pytest.raises(ValueError, match="40 lanes, but max_beam_tokens is 32"):
        run(backend, 2048, [([1, 2, 3], Select(1, 40, trie="deep"))])


def test_what_the_kernels_do_not_take_is_refused() -> None:
    config = toy_config(traits=False)
    with pytest.raises(ConfigurationError, match="page_size 8 is not one of"):
        TritonBackend(config, toy_weights(config), pages=4, page_size=8, device="cpu")
