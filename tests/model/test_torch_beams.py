"""Trie-constrained beam search through the backend: 50,000 items of three codes, against enumeration and against a
plain beam search, both on transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shoplm.catalog.filters import ItemColumns, ItemFilters
from shoplm.engine.direct import DirectRunner
from shoplm.model.config import ModelConfig
from shoplm.model.shop_weights import NamedTrie, ShopWeights, random_trie
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import load_weights
from shoplm.readout.habits import HabitTable, Neighbours
from shoplm.readout.table import SelectTable
from shoplm.request import Generate, ItemFilter, Select, SelectOutput
from transformers import AutoModelForCausalLM

TinyModel = Callable[[str], Path]
ITEMS, SIZES = 50_000, (40, 40, 40)
VOCABULARY = 448
Floats = NDArray[np.float64]


@lru_cache
def catalogue(hidden_size: int) -> NamedTrie:
    return random_trie("", items=ITEMS, level_sizes=SIZES, hidden_size=hidden_size, seed=9)


@lru_cache
def habits() -> HabitTable:
    generator = np.random.default_rng(12)
    neighbours = Neighbours(
        np.arange(0, 3 * ITEMS + 1, 3),
        generator.integers(0, ITEMS, 3 * ITEMS).astype(np.int32),
        generator.uniform(0, 1, 3 * ITEMS).astype(np.float32),
    )
    return HabitTable(1.3, 0.2, 30.0, generator.normal(0, 1, ITEMS).astype(np.float32), neighbours)


def shop_of(config: ModelConfig) -> ShopWeights:
    """The catalogue with all terms and columns; seen by both sides."""
    named = catalogue(config.hidden_size)
    generator = np.random.default_rng(4)
    columns = ItemColumns(
        [("dairy", "fruit", "bakery")[index] for index in generator.integers(0, 3, ITEMS)],
        generator.uniform(0, 10, ITEMS),
        generator.random(ITEMS) < 0.9,
    )
    table = SelectTable(
        trie=named.trie,
        output_rows=named.output_rows,
        output_bias=tuple(torch.randn(40, generator=torch.Generator().manual_seed(level)) for level in range(3)),
        token_starts=(VOCABULARY, VOCABULARY + 40, VOCABULARY + 80),
        popularity=generator.normal(-8, 1, ITEMS).astype(np.float32),
        habits=habits(),
        popularity_weight=0.7,
        filters=ItemFilters(ITEMS, columns),
        own_lanes=4,
    )
    return ShopWeights(named.input_rows, table, None)


class Reference:
    """Hidden states by transformers, log p by plain fp64 arithmetic over the trie-valid children."""

    def __init__(self, folder: Path, prompt: Sequence[int]) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model = model.eval()
        self.shop = shop_of(ModelConfig.from_folder(folder))
        self.prompt = list(prompt)
        text = self.model.get_input_embeddings().weight.detach()
        self.embedding = torch.cat((text, self.shop.input_rows))

    def child_log_p(self, level: int, prefixes: NDArray[np.int64]) -> Floats:
        """[prefixes, codes]: log p of each next code of each prefix [prefixes, level]; -inf where no item has it."""
        table = self.shop.table
        tokens = torch.from_numpy(prefixes + np.array(table.token_starts[:level], np.int64))
        prompt = torch.tensor(self.prompt).expand(len(prefixes), -1)
        with torch.inference_mode():
            states = [
                self.model.model(inputs_embeds=self.embedding[part], use_cache=False).last_hidden_state[:, -1]
                for part in torch.cat((prompt, tokens), dim=1).split(256)
            ]
        logits = torch.cat(states).double() @ table.output_rows[level].double().T + table.output_bias[level].double()
        known = {tuple(code) for code in np.unique(table.trie.codes[:, : level + 1], axis=0).tolist()}
        valid = torch.tensor([[(*prefix, code) in known for code in range(40)] for prefix in prefixes.tolist()])
        result: Floats = torch.log_softmax(logits.masked_fill(~valid, -torch.inf), -1).numpy()
        return result

    @lru_cache  # noqa: B019 - one reference per module
    def all_log_p(self) -> Floats:
        """log p of every item, by enumeration of all prefixes."""
        codes = self.shop.table.trie.codes.astype(np.int64)
        total = np.zeros(ITEMS)
        for level in range(3):
            prefixes, index = np.unique(codes[:, :level], axis=0, return_inverse=True) if level else (codes[:1, :0], 0)
            total += self.child_log_p(level, prefixes)[index, codes[:, level]]
        return total

    def rank(self, select: Select, log_p: dict[int, float]) -> list[tuple[int, float]]:
        """The best of the items whose log p is given, by the whole score."""
        table = self.shop.table
        terms = table.habits_of(select)
        mask = table.filters.allowed(select.item_filter, select.exclude_items).mask
        beside = dict(zip(*(part.tolist() for part in terms.flat), strict=True))
        scores = {
            item: value + beside.get(item, 0.0) + 0.7 * float(table.popularity[item])
            for item, value in log_p.items()
            if mask[item]
        }
        order = sorted(scores, key=lambda item: (-scores[item], item))
        return [(item, scores[item]) for item in order[: select.count]]

    def beam_search(self, select: Select) -> list[tuple[int, float]]:
        """Beams as lists of (log p, code), one by one; owned items are scored apart."""
        table = self.shop.table
        mask = table.filters.allowed(select.item_filter, select.exclude_items).mask
        codes = table.trie.codes
        beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for level in range(3):
            log_p = self.child_log_p(level, np.array([code for _, code in beams], np.int64).reshape(len(beams), level))
            grown = [
                (score + float(log_p[index, code]), (*prefix, code))
                for index, (score, prefix) in enumerate(beams)
                for code in range(40)
                if log_p[index, code] > -np.inf
            ]
            reachable = {tuple(code) for code in codes[mask][:, : level + 1].tolist()}
            grown = sorted((beam for beam in grown if beam[1] in reachable), key=lambda beam: (-beam[0], beam[1]))
            beams = grown if level == 2 else grown[: select.beam_width]
        rows = {tuple(code): row for row, code in enumerate(codes.tolist())}
        found = {rows[code]: score for score, code in beams}
        forced = table.forced_items(select).tolist()
        return self.rank(select, {**found, **{item: float(self.all_log_p()[item]) for item in forced}})


PROMPT = tuple(np.random.default_rng(8).integers(3, VOCABULARY, 37).tolist())


@pytest.fixture(scope="module")
def reference(tiny_model: TinyModel) -> Reference:
    return Reference(tiny_model("mistral"), PROMPT)  # the prompt is longer than its sliding window of 24


@pytest.fixture(scope="module")
def backend(tiny_model: TinyModel) -> TorchBackend:
    return make_backend(tiny_model("mistral"))


def make_backend(folder: Path, page_size: int = 8) -> TorchBackend:
    config = ModelConfig.from_folder(folder)
    backend = TorchBackend(
        config,
        load_weights(folder, config),
        shop_of(config),
        pages=20_000 // page_size,
        page_size=page_size,
        state_slots=16,
    )
    backend.pool.keys.fill_(torch.nan)
    backend.pool.values.fill_(torch.nan)
    return backend


def check(output: object, expected: list[tuple[int, float]]) -> None:
    assert isinstance(output, SelectOutput)
    assert list(output.items) == [item for item, _ in expected]
    np.testing.assert_allclose(output.scores, [score for _, score in expected], atol=1e-4)


OWN = {"own_items": (11, 49_999, 23_456, 30_000, 8), "own_counts": (30.0, 900.0, 4.0, 0.5, 0.1)}
SELECTS = [
    Select(count=20, beam_width=1600),
    Select(count=20, beam_width=1600, **OWN),  # type: ignore[arg-type]
    Select(count=12, beam_width=8),
    Select(count=12, beam_width=3, **OWN),  # type: ignore[arg-type]
    Select(
        count=12,
        beam_width=8,
        item_filter=ItemFilter(include_categories=("fruit",), max_price=0.05, in_stock_only=True),
    ),
    Select(count=30, beam_width=2, exclude_items=tuple(range(0, ITEMS, 2)), **OWN),  # type: ignore[arg-type]
    Select(count=4, beam_width=1, candidates=(5, 44_444, 5, 17, 30_000), **OWN),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("select", SELECTS[:2])
def test_wide_beams_find_what_enumeration_finds(backend: TorchBackend, reference: Reference, select: Select) -> None:
    (output,) = DirectRunner(backend).run([(PROMPT, select)])
    check(output, reference.rank(select, dict(enumerate(reference.all_log_p().tolist()))))


@pytest.mark.parametrize("select", SELECTS[2:6])
def test_narrow_beams_find_what_a_plain_beam_search_finds(
    backend: TorchBackend, reference: Reference, select: Select
) -> None:
    (output,) = DirectRunner(backend).run([(PROMPT, select)])
    check(output, reference.beam_search(select))


def test_candidates_are_scored_exactly(backend: TorchBackend, reference: Reference) -> None:
    select = SELECTS[6]
    assert select.candidates is not None
    (output,) = DirectRunner(backend).run([(PROMPT, select)])
    check(output, reference.rank(select, {item: float(reference.all_log_p()[item]) for item in select.candidates}))


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_searches_share_a_batch_with_everything_else(
    tiny_model: TinyModel, reference: Reference, page_size: int
) -> None:
    backend = make_backend(tiny_model("mistral"), page_size)
    prompts = [PROMPT, PROMPT[:9], (*PROMPT, *PROMPT[:5]), PROMPT]
    work = [(prompt, select) for prompt in prompts for select in SELECTS[2:]]
    mixed = [*work[:9], (PROMPT[:4], Generate(30)), *work[9:]]
    pages = np.random.default_rng(page_size).permutation(backend.info.pages).tolist()
    together = DirectRunner(backend, chunk_tokens=7, step_tokens=40, free_pages=pages).run(mixed)
    del together[9]
    for one, output in zip(work, together, strict=True):
        (alone,) = DirectRunner(backend).run([one])
        assert isinstance(alone, SelectOutput) and isinstance(output, SelectOutput)
        assert alone.items == output.items
        np.testing.assert_allclose(alone.scores, output.scores, atol=1e-4)
    check(together[0], reference.beam_search(SELECTS[2]))


def test_every_family_searches_like_its_reference(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    select = Select(count=12, beam_width=3)
    (output,) = DirectRunner(make_backend(folder)).run([(PROMPT[:30], select)])
    check(output, Reference(folder, PROMPT[:30]).beam_search(select))


def test_owned_items_and_what_goes_with_them_are_found_that_no_beam_reaches(
    backend: TorchBackend, reference: Reference
) -> None:
    worst = int(np.argmin(reference.all_log_p()))
    (without,) = DirectRunner(backend).run([(PROMPT, Select(count=4, beam_width=1))])
    bought = Select(count=4, beam_width=1, own_items=(worst,), own_counts=(1e12,))
    (output,) = DirectRunner(backend).run([(PROMPT, bought)])
    assert isinstance(without, SelectOutput) and isinstance(output, SelectOutput)
    table, near = habits(), habits().of((worst,), (1e12,))
    assert table.loyalty is not None
    assert output.items[0] == worst and not set(near.near_items.tolist()) & set(without.items)
    assert output.repeat[0] == pytest.approx(1.3 * np.log1p(1e12) + 0.2 * float(table.loyalty[worst]))
    assert set(near.strongest_near(3).tolist()) & set(output.items)
    check(output, reference.beam_search(bought))
