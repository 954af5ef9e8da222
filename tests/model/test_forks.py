"""Forks of a prompt: what each reads is what it would read alone, with the hidden tokens' keys taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from shoplm.batch import Batch, EmbedReadout, Row
from shoplm.engine.direct import DirectRunner
from shoplm.model.config import ModelConfig
from shoplm.model.shop_weights import ShopWeights, random_trie
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import load_weights
from shoplm.readout.heads import Heads
from shoplm.request import Explain, HeadValues, ItemScores, Predict, Request, Select, SelectOutput, Service, token_ids

TinyModel = Callable[[str], Path]
SUFFIX = (401, 402)
ITEMS = (7, 150, 0)
SPANS: tuple[tuple[tuple[int, int], ...], ...] = ((), ((3, 9),), ((0, 1), (40, 58)), ((59, 60), (10, 12), (20, 45)))


def history() -> tuple[int, ...]:
    return tuple(np.random.default_rng(4).integers(3, 448, 60).tolist())


def make_backend(folder: Path, page_size: int = 16) -> TorchBackend:
    config = ModelConfig.from_folder(folder)
    shop = random_trie("", items=200, level_sizes=(200,), hidden_size=config.hidden_size, seed=2)
    weights = load_weights(folder, config)
    width = config.hidden_size + 2
    heads = Heads(
        torch.zeros(2), torch.ones(2), torch.randn(3, width, generator=torch.Generator().manual_seed(1)), torch.ones(3)
    )
    shop_weights = ShopWeights(shop.input_rows, shop.table(len(weights.embedding)), heads)
    backend = TorchBackend(config, weights, shop_weights, pages=1024 // page_size, page_size=page_size, state_slots=8)
    backend.pool.keys.fill_(torch.nan)  # whatever is read without having been written shows
    backend.pool.values.fill_(torch.nan)
    return backend


def explain(
    spans: Sequence[tuple[tuple[int, int], ...]], reads: ItemScores | HeadValues
) -> tuple[tuple[int, ...], Explain]:
    return history() + SUFFIX * len(spans), Explain(len(SUFFIX), tuple(spans), reads)


def without_keys(backend: TorchBackend, hidden: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """The last hidden state where the hidden tokens' pages, of one token each, are left out of the suffix's."""
    prefix, count = history(), len(history())
    seen = [at for at in range(count) if not any(start <= at < end for start, end in hidden)]
    own = np.arange(count, count + len(SUFFIX))
    rows = (
        Row(0, 0, count, np.arange(count, dtype=np.int32), count),
        Row(
            *(1, count, len(SUFFIX), np.array([*seen, *own], np.int32), len(seen) + len(SUFFIX)), readout=EmbedReadout()
        ),
    )
    total = count + len(SUFFIX)
    order = np.arange(total)
    batch = Batch(np.array([*prefix, *SUFFIX], np.int32), order.astype(np.int32), order, rows)
    output = backend.submit(batch).result().outputs[1]
    assert isinstance(output, tuple)
    return torch.tensor(output)


@pytest.mark.parametrize("chunk_tokens", [2048, 61, 7, 1])
def test_a_fork_reads_what_is_left_of_the_history(tiny_model: TinyModel, chunk_tokens: int) -> None:
    folder = tiny_model("llama")
    runner = DirectRunner(make_backend(folder), chunk_tokens=chunk_tokens)
    values = np.array(runner.run([explain(SPANS, ItemScores(ITEMS))])[0]).reshape(len(SPANS), len(ITEMS))
    alone = make_backend(folder, page_size=1)
    table = alone._readouts.tables[""]
    for hidden, found in zip(SPANS, values, strict=True):
        logits = table.output_rows[0] @ without_keys(alone, hidden) + table.output_bias[0]
        np.testing.assert_allclose(found, torch.log_softmax(logits, 0)[list(ITEMS)], atol=2e-4)
    assert np.ptp(values, axis=0).min() > 1e-3  # hiding does something


def test_a_fork_that_hides_nothing_is_the_prompt(tiny_model: TinyModel, family: str) -> None:
    """Also where a window counts positions, and behind many other forks."""
    backend = make_backend(tiny_model(family))
    runner = DirectRunner(backend)
    ranked = runner.run([(history() + SUFFIX, Select(3, 0, candidates=ITEMS))])[0]
    assert isinstance(ranked, SelectOutput)
    expected = dict(zip(ranked.items, ranked.model, strict=True))
    spans = (*SPANS[1:], *SPANS[1:], *SPANS[1:], ())
    values = runner.run([explain(spans, ItemScores(ITEMS))])[0]
    assert isinstance(values, tuple)
    np.testing.assert_allclose(values[-3:], [expected[item] for item in ITEMS], atol=2e-4)


def test_heads_are_read_of_each_fork(tiny_model: TinyModel) -> None:
    runner = DirectRunner(make_backend(tiny_model("smollm2")), chunk_tokens=33)
    features = ((0.5, -1.0), (0.5, -1.0), (0.5, -1.0), (9.0, 9.0))
    whole = runner.run([(history() + SUFFIX, Predict(features[0]))])[0]
    values = np.array(runner.run([explain((*SPANS[:3], ()), HeadValues(features))])[0]).reshape(4, 3)
    np.testing.assert_allclose(values[0], np.array(whole), atol=2e-4)
    assert np.abs(values[1:3] - values[0]).max() > 1e-3
    other = runner.run([(history() + SUFFIX, Predict(features[3]))])[0]
    np.testing.assert_allclose(values[3], np.array(other), atol=2e-4)


def test_spans_outside_the_history_are_refused() -> None:
    tokens, task = explain((((55, 61),),), ItemScores(ITEMS))
    with pytest.raises(ValueError, match=r"hides \(\(55, 61\),\) of a history of 60 tokens"):
        Request("r", Service.RECOMMENDATION, token_ids(tokens), task, 0.0)
    with pytest.raises(ValueError, match="1 rows of features for 2 forks"):
        Explain(2, ((), ()), HeadValues(((0.5,),)))
    with pytest.raises(ValueError, match="at least one of each"):
        Explain(2, (), ItemScores(ITEMS))
