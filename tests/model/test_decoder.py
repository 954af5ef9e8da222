"""The forward pass itself: hidden states against transformers, and what each step writes to the pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from shoplm.batch import Batch, Row
from shoplm.model.attention_plan import GATHER_TOKENS, PADDED_TOKENS, plan_attention
from shoplm.model.config import ModelConfig
from shoplm.model.decoder import Decoder, StepInputs
from shoplm.model.kv_pool import KVPool
from shoplm.model.linear import Linear, packing_supported
from shoplm.model.weights import load_weights
from torch.nn import functional
from toy_adapter import with_adapter
from transformers import AutoModelForCausalLM

TinyModel = Callable[[str], Path]


def new_pool(config: ModelConfig, pages: int = 40, page_size: int = 4) -> KVPool:
    pool = KVPool(
        layers=config.num_layers,
        pages=pages,
        kv_heads=config.num_kv_heads,
        page_size=page_size,
        head_dim=config.head_dim,
        dtype=torch.float32,
    )
    pool.keys.fill_(torch.nan)
    pool.values.fill_(torch.nan)
    return pool


def one_row(tokens: list[int], pages: list[int], start: int = 0, page_size: int = 4) -> Batch:
    """A step that computes tokens[start:] of one sequence."""
    positions = np.arange(start, len(tokens))
    table = np.array(pages, np.int32)
    row = Row(0, 0, len(positions), table, len(tokens))
    slots = table[positions // page_size].astype(np.int64) * page_size + positions % page_size
    return Batch(np.array(tokens[start:], np.int32), positions.astype(np.int32), slots, (row,))


def inputs_of(batch: Batch, config: ModelConfig, pool: KVPool, outputs: list[int]) -> StepInputs:
    return StepInputs(
        tokens=torch.from_numpy(batch.tokens.astype(np.int64)),
        positions=torch.from_numpy(batch.positions.astype(np.int64)),
        write_rows=pool.token_major(torch.from_numpy(batch.slots)),
        plans={
            window: plan_attention(batch, {}, pool, window=window, group=config.query_group, dtype=torch.float32)
            for window in set(config.sliding_windows)
        },
        outputs=torch.tensor(outputs, dtype=torch.long),
    )


@pytest.mark.parametrize("length", [1, 30, 150])
def test_hidden_states_equal_transformers(tiny_model: TinyModel, family: str, length: int) -> None:
    folder = tiny_model(family)
    config = ModelConfig.from_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    decoder, pool = Decoder(config, load_weights(folder, config), None, 256), new_pool(config)
    tokens = np.random.default_rng(length).integers(3, 448, length).tolist()
    with torch.inference_mode():
        expected = model.model(torch.tensor([tokens])).last_hidden_state[0]
        batch = one_row(tokens, list(range(39, -1, -1)))
        every = decoder.forward(inputs_of(batch, config, pool, list(range(length))), pool)
        torch.testing.assert_close(every, expected, atol=2e-4, rtol=2e-4)
        some = [length // 2, length - 1]
        chosen = decoder.forward(inputs_of(batch, config, pool, some), pool)
        torch.testing.assert_close(chosen, expected[some], atol=2e-4, rtol=2e-4)
        nothing = decoder.forward(inputs_of(batch, config, pool, []), pool)
    assert nothing.shape == (0, config.hidden_size)


def test_an_adapter_apart_equals_a_merged_one(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    config = ModelConfig.from_folder(folder)
    tokens, states = list(range(5, 35)), []
    for weights in with_adapter(load_weights(folder, config)):
        decoder, pool = Decoder(config, weights, None, 256), new_pool(config)
        with torch.inference_mode():
            states.append(
                decoder.forward(inputs_of(one_row(tokens, list(range(8))), config, pool, list(range(30))), pool)
            )
    torch.testing.assert_close(*states, atol=2e-4, rtol=2e-4)


def test_a_step_writes_its_slots_and_no_others(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    config = ModelConfig.from_folder(folder)
    decoder, pool = Decoder(config, load_weights(folder, config), None, 256), new_pool(config)
    with torch.inference_mode():
        decoder.forward(inputs_of(one_row([5, 6, 7, 8, 9, 10], [7, 2]), config, pool, []), pool)
    for tensor in (pool.keys, pool.values):
        written = ~tensor.isnan().any(dim=-1)  # [layers, pages, heads, page_size]
        expected = torch.zeros_like(written)
        expected[:, 7] = True
        expected[:, 2, :, :2] = True
        assert torch.equal(written, expected)


def test_shop_rows_follow_the_text_rows(tiny_model: TinyModel) -> None:
    """A shop token whose row is a text token's row is that text token."""
    folder = tiny_model("llama")
    config = ModelConfig.from_folder(folder)
    weights = load_weights(folder, config)
    decoder, pool = Decoder(config, weights, weights.embedding[[77, 33]].clone(), 256), new_pool(config)
    assert decoder.vocab_size == 450
    with torch.inference_mode():
        text = decoder.forward(inputs_of(one_row([3, 33, 77], [0]), config, pool, [2]), pool)
        shop = decoder.forward(inputs_of(one_row([3, 449, 448], [0]), config, pool, [2]), pool)
    assert torch.equal(text, shop)


def test_rows_are_planned_as_spans_and_padded_groups(tiny_model: TinyModel) -> None:
    config = ModelConfig.from_folder(tiny_model("llama"))
    pool = KVPool(layers=1, pages=4, kv_heads=2, page_size=64, head_dim=8, dtype=torch.float32)
    shapes = [(1, 9), (40, 40), (1, 30), (PADDED_TOKENS, 60), (PADDED_TOKENS + 1, 60), (1, 100), (1, 1), (2, 2)]
    rows, start = [], 0
    for query_len, kv_len in shapes:
        rows.append(Row(0, start, query_len, np.arange(4, dtype=np.int32), kv_len))
        start += query_len
    zeros = np.zeros(start, np.int32)
    batch = Batch(zeros, zeros, zeros.astype(np.int64), tuple(rows))
    plan = plan_attention(batch, {}, pool, window=None, group=config.query_group, dtype=torch.float32)
    assert [(span.start, span.end, span.past) for span in plan.spans] == [(1, 41, 0), (58, 75, 43), (77, 79, 0)]
    assert sorted(padded.shape for padded in plan.padded) == [(1, 1, 100), (1, 16, 60), (3, 1, 30)]


def test_a_padded_group_bounds_its_scratch_memory() -> None:
    pool = KVPool(layers=1, pages=4, kv_heads=1, page_size=4096, head_dim=2, dtype=torch.float32)
    rows = tuple(Row(slot, slot, 1, np.arange(4, dtype=np.int32), 16_000) for slot in range(9))
    zeros = np.zeros(9, np.int32)
    plan = plan_attention(
        Batch(zeros, zeros, zeros.astype(np.int64), rows), {}, pool, window=None, group=1, dtype=torch.float32
    )
    assert [padded.shape for padded in plan.padded] == [(2, 1, 16_000)] * 4 + [(1, 1, 16_000)]
    assert all(padded.shape[0] * padded.shape[2] <= GATHER_TOKENS for padded in plan.padded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 33])
def test_linear_and_its_epilogues(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=generator).to(dtype)
    bias = torch.randn(40, generator=generator).to(dtype)
    states, other = torch.randn(rows, 24, generator=generator).to(dtype), torch.randn(rows, 40, generator=generator)
    linear = Linear(weight, bias)
    plain = functional.linear(states.float(), weight.float(), bias.float())
    tolerance = {"atol": 0.1, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    other = other.to(dtype)
    for result, expected in (
        (linear(states), plain),
        (linear.silu(states), functional.silu(plain)),
        (linear.multiply(states, other), plain * other.float()),
        (linear.add(states, other), plain + other.float()),
    ):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, **tolerance)


def test_without_packing_bf16_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if not packing_supported():
        pytest.skip("this CPU multiplies no bf16 natively, so nothing is ever packed")
    weight, states = torch.randn(40, 24).bfloat16(), torch.randn(5, 24).bfloat16()
    packed = Linear(weight)(states)
    monkeypatch.setattr("shoplm.model.linear.packing_supported", lambda: False)
    torch.testing.assert_close(Linear(weight)(states), packed, atol=0.1, rtol=0.02)


def test_a_pool_needs_pages() -> None:
    with pytest.raises(ValueError, match="pages is 0"):
        KVPool(layers=1, pages=0, kv_heads=1, page_size=4, head_dim=2, dtype=torch.float32)
