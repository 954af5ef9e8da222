"""The C++ decoder against the torch operations in fp32, whatever the chunks, pages and batch mates are."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shoplm.engine.direct import DirectRunner, Output
from shoplm.model.native.backend import NativeBackend
from shoplm.model.native.decoder import unsupported
from shoplm.model.native.library import NativeLibrary
from shoplm.model.native.linear import WeightFormat
from shoplm.model.shop_weights import ShopWeights, random_trie
from shoplm.model.torch_backend import TorchBackend
from shoplm.request import Embed, Explain, Generate, ItemScores, Sampling, Select, SelectOutput, Task
from toy_adapter import with_adapter
from toy_decoder import CONFIG, make, poison, prompts, random_weights, tries

KV_FORMATS = ("model", "int8")


@lru_cache
def reference_states(head_dim: int = 64, kv_format: str = "model") -> NDArray[np.float64]:
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    backend = TorchBackend(config, random_weights(head_dim), pages=64, state_slots=8, kv_format=kv_format)
    return np.array(DirectRunner(backend).run([(prompt, Embed()) for prompt in prompts()]))


def relative_errors(states: list[Output], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    errors: NDArray[np.float64] = np.linalg.norm(np.array(states) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return errors


@pytest.mark.parametrize(("page_size", "chunk_tokens"), [(16, 2048), (16, 1), (16, 13), (32, 40), (64, 17)])
def test_states_follow_fp32(library: NativeLibrary, page_size: int, chunk_tokens: int) -> None:
    backend = make(library, page_size=page_size)
    pages = np.random.default_rng(1).permutation(backend.info.pages).tolist()
    runner = DirectRunner(backend, chunk_tokens=chunk_tokens, free_pages=pages)
    states = runner.run([(prompt, Embed()) for prompt in prompts()])
    assert relative_errors(states, reference_states()).max() < 0.02


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_states_follow_fp32_at_other_head_sizes(library: NativeLibrary, head_dim: int, kv_format: str) -> None:
    backend = make(library, head_dim=head_dim, kv_format=kv_format)
    states = DirectRunner(backend).run([(prompt, Embed()) for prompt in prompts()])
    assert relative_errors(states, reference_states(head_dim, kv_format)).max() < 0.02


@pytest.mark.parametrize(("page_size", "chunk_tokens"), [(16, 2048), (32, 1), (64, 13)])
def test_keys_and_values_in_int8_follow_fp32_rounded_alike(
    library: NativeLibrary, page_size: int, chunk_tokens: int
) -> None:
    backend = make(library, page_size=page_size, kv_format="int8")
    states = DirectRunner(backend, chunk_tokens=chunk_tokens).run([(prompt, Embed()) for prompt in prompts()])
    assert relative_errors(states, reference_states(kv_format="int8")).max() < 0.02
    assert relative_errors(list(reference_states(kv_format="int8")), reference_states()).max() > 0.005


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("format", WeightFormat)
def test_no_number_of_a_prompt_becomes_one_and_none_of_another_prompt_is_lost(
    library: NativeLibrary, format: WeightFormat, kv_format: str, value: float
) -> None:
    weights = random_weights()
    embedding = weights.embedding.clone()
    embedding[50, 7] = value
    weights = dataclasses.replace(weights, embedding=embedding)
    broken, whole = [3, 4, 50, *range(60, 90)], [*range(100, 140)]

    def states(*work: list[int]) -> NDArray[np.float64]:
        backend = NativeBackend(CONFIG, weights, pages=64, format=format, kv_format=kv_format, library=library)
        return np.array(DirectRunner(backend).run([(prompt, Embed()) for prompt in work]))

    of_broken, of_whole = states(broken, whole)
    assert not np.isfinite(of_broken).any()
    assert np.isfinite(of_whole).all()
    assert (of_whole == states(whole)[0]).all()


def test_pages_are_copied_with_their_scales(library: NativeLibrary) -> None:
    backend = make(library, kv_format="int8")
    work = [([*range(3, 35)], Embed())]
    DirectRunner(backend, free_pages=[5, 9, 7]).run(work)
    pool = backend.pool
    pool.copy_pages(torch.tensor([5, 9]), torch.tensor([1, 2]))
    for part in (pool.keys, pool.values, pool.key_scales, pool.value_scales):
        assert part is not None
        assert torch.equal(part[:, [1, 2]], part[:, [5, 9]])
        assert torch.isfinite(part[:, [1, 2]]).all()


@pytest.mark.parametrize(("format", "most"), [(WeightFormat.INT8, 0.05), (WeightFormat.INT4, 0.4)])
def test_integer_states_follow_fp32(library: NativeLibrary, format: WeightFormat, most: float) -> None:
    states = DirectRunner(make(library, format=format)).run([(prompt, Embed()) for prompt in prompts()])
    errors = relative_errors(states, reference_states())
    assert 0.002 < errors.max() < most


@pytest.mark.parametrize(
    ("format", "most"), [(WeightFormat.BF16, 0.02), (WeightFormat.INT8, 0.08), (WeightFormat.INT4, 0.5)]
)
def test_an_adapter_apart_follows_a_merged_one_in_fp32(
    library: NativeLibrary, format: WeightFormat, most: float
) -> None:
    apart, merged = with_adapter(random_weights())
    work: list[tuple[list[int], Task]] = [(prompt, Embed()) for prompt in prompts()]
    expected = np.array(DirectRunner(TorchBackend(CONFIG, merged, pages=64, state_slots=8)).run(work))
    backend = NativeBackend(CONFIG, apart, pages=128, format=format, library=library)
    for chunk_tokens in (2048, 13):
        states = DirectRunner(backend, chunk_tokens=chunk_tokens).run(work)
        assert relative_errors(states, expected).max() < most
    assert relative_errors(list(reference_states()), expected).min() > 0.6  # the adapter is not a small part of it


@pytest.mark.parametrize(
    ("format", "kv_format"), [*((each, "model") for each in WeightFormat), (WeightFormat.INT8, "int8")]
)
def test_a_result_does_not_depend_on_the_batch(library: NativeLibrary, format: WeightFormat, kv_format: str) -> None:
    backend = make(library, format=format, kv_format=kv_format)
    select = Select(count=5, beam_width=6, trie="shop", own_items=(4, 250), own_counts=(2.0, 0.5))
    sampled = Generate(6, Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=11))
    tasks: list[Task] = [Embed(), select, Generate(8), sampled, Embed(), select, Generate(3), Embed()]
    work = list(zip(prompts(), tasks, strict=True))
    alone = [DirectRunner(backend).run([one])[0] for one in work]
    for chunk_tokens in (5, 40, 2048):
        together = DirectRunner(backend, chunk_tokens=chunk_tokens).run(work)
        for one, other in zip(alone, together, strict=True):
            if isinstance(one, SelectOutput):  # torch multiplies the item rows
                assert isinstance(other, SelectOutput)
                assert one.items == other.items
                np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
            else:
                assert one == other  # to the last bit


@pytest.mark.parametrize("format", WeightFormat)
def test_a_result_does_not_depend_on_the_number_of_threads(library: NativeLibrary, format: WeightFormat) -> None:
    """More threads than cores: some come late to a loop that others have ended."""
    work: list[tuple[list[int], Task]] = [(prompt, Generate(12)) for prompt in prompts()]
    before, backend = torch.get_num_threads(), make(library, format=format)
    try:
        answers = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(DirectRunner(backend).run(work))
    finally:
        torch.set_num_threads(before)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(("chunk_tokens", "kv_format"), [(2048, "model"), (41, "int8"), (3, "model")])
def test_forks_follow_fp32(library: NativeLibrary, chunk_tokens: int, kv_format: str) -> None:
    """Log-probabilities where parts of the history are hidden, one of the layers having a window."""
    shop = random_trie("", items=100, level_sizes=(100,), hidden_size=CONFIG.hidden_size, seed=3)
    weights = ShopWeights(shop.input_rows, shop.table(CONFIG.vocab_size), None)
    native_backend = NativeBackend(CONFIG, random_weights(), weights, pages=64, kv_format=kv_format, library=library)
    poison(native_backend.pool)
    reference = TorchBackend(CONFIG, random_weights(), weights, pages=64, state_slots=8, kv_format=kv_format)
    spans = ((), ((100, 150),), ((0, 1), (140, 149)), ((17, 120),), *(((at, at + 3),) for at in range(9)))
    work = [((*prompts()[-1], *(401, 402) * len(spans)), Explain(2, spans, ItemScores((5, 70))))]
    ours, theirs = (
        np.array(DirectRunner(backend, chunk_tokens=chunk_tokens).run(work)[0]).reshape(-1, 2)
        for backend in (native_backend, reference)
    )
    assert np.abs(theirs[1:4] - theirs[0]).max(axis=1).min() > 0.2  # of what follows it is a small part
    np.testing.assert_allclose(ours, theirs, atol=0.05)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_beams_follow_fp32(library: NativeLibrary, kv_format: str) -> None:
    select = Select(count=20, beam_width=99, trie="shop", own_items=(4, 250), own_counts=(2.0, 0.5))
    reference = TorchBackend(CONFIG, random_weights(), tries=tries(), pages=128, state_slots=8, kv_format=kv_format)
    backend = make(library, kv_format=kv_format)
    work = [(prompt, select) for prompt in prompts()[3:]]
    for one, other in zip(DirectRunner(backend).run(work), DirectRunner(reference).run(work), strict=True):
        assert isinstance(one, SelectOutput)
        assert isinstance(other, SelectOutput)
        scores = dict(zip(other.items, other.scores, strict=True))
        shared = [(score, scores[item]) for item, score in zip(one.items, one.scores, strict=True) if item in scores]
        assert len(shared) >= 17
        ours, theirs = np.array(shared).T
        # Where a number lies between two bytes, the least difference in what came before decides which it becomes.
        np.testing.assert_allclose(ours, theirs, atol=0.08 if kv_format == "model" else 0.12)


def test_beams_go_on_behind_a_prompt_that_fills_the_context(library: NativeLibrary) -> None:
    filled, longer = (
        NativeBackend(CONFIG, random_weights(), tries=tries(), pages=128, max_context_tokens=tokens, library=library)
        for tokens in (24, None)
    )
    work: list[tuple[list[int], Task]] = [(list(range(3, 27)), Select(count=5, beam_width=6, trie="shop"))]
    assert filled.info.max_context_tokens == 24
    assert DirectRunner(filled).run(work) == DirectRunner(longer).run(work)


def test_sizes_that_do_not_fill_tiles_are_named() -> None:
    assert unsupported(CONFIG, 16) is None
    for page_size in (8, 0):
        assert f"page_size {page_size}" in str(unsupported(CONFIG, page_size))
    assert "hidden size 100" in str(unsupported(dataclasses.replace(CONFIG, hidden_size=100), 16))
    assert "head_dim 48" in str(unsupported(dataclasses.replace(CONFIG, head_dim=48, num_heads=8), 16))
