"""One packed pass gives the hidden states that the plain prompts give when they are served one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shoplm.bundle import PromptSchema
from shoplm.model.base import resolve_base
from shoplm.model.direct import DirectRunner
from shoplm.model.torch_backend import TorchBackend
from shoplm.request import Embed
from shoplm.training import pipeline
from shoplm.training.hidden import Reader, make_reader
from shoplm.training.log import ShopLog
from shoplm.training.packing import Pack, pack_batch, pack_samples
from shoplm.training.samples import Sample, Task, samples_of
from shoplm.training.shop import Shop

BUDGET, BLOCK = 48, 16


@pytest.fixture(scope="module")
def shop(tiny_shop_log: ShopLog) -> Shop:
    return pipeline.prepare(tiny_shop_log)


@pytest.fixture(scope="module", params=["smollm2", "qwen2"])
def reader(
    request: pytest.FixtureRequest, shop: Shop, tiny_model: object, tmp_path_factory: pytest.TempPathFactory
) -> Reader:
    """Two architectures; Qwen2's upper layers see a sliding window, so a suffix has to know its own position."""
    base = resolve_base(str(tiny_model(request.param)))  # type: ignore[operator]
    catalog = pipeline.write_items(shop.items, tmp_path_factory.mktemp("items"))
    schema = PromptSchema(preamble="Hi.", attributes=("age",), history_budget_tokens=BUDGET, history_block_tokens=BLOCK)
    return make_reader(base, catalog, shop.items.vocabulary(base.config.vocab_size), schema, torch.float32)


def packs_of(reader: Reader, shop: Shop, customer: int) -> list[Pack]:
    history = shop.histories[customer]
    return pack_samples(reader.builder, history, samples_of(history, shop.timeline, shop.starts[customer]))


def plain_prompt(reader: Reader, shop: Shop, customer: int, sample: Sample) -> tuple[int, ...]:
    known = shop.histories[customer].before(sample.moment)
    prefix = reader.builder.prefix(known)
    render = reader.builder.recommend if sample.task == Task.RECOMMEND else reader.builder.predict
    return render(prefix, known)


@pytest.mark.parametrize("customer", [1, 2, 7])
def test_packed_states_equal_those_of_the_plain_prompts(reader: Reader, shop: Shop, customer: int) -> None:
    backend = reader.backend
    assert isinstance(backend, TorchBackend)
    for pack in packs_of(reader, shop, customer):
        found = reader.read(pack)
        work = [(plain_prompt(reader, shop, customer, sample), Embed()) for sample in pack.samples]
        plain = torch.tensor(DirectRunner(backend).run(work))
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_a_history_whose_baskets_were_dropped_needs_several_passes(reader: Reader, shop: Shop) -> None:
    longest = max(range(len(shop.histories)), key=lambda customer: len(shop.histories[customer]))
    packs = packs_of(reader, shop, longest)
    assert len(packs) > 1
    assert len({pack.prefix for pack in packs}) == len(packs)


def test_every_required_sample_is_in_exactly_one_pack_and_no_sample_twice(reader: Reader, shop: Shop) -> None:
    for customer in range(0, 60, 7):
        samples = samples_of(shop.histories[customer], shop.timeline, shop.starts[customer])
        placed = [sample for pack in packs_of(reader, shop, customer) for sample in pack.samples]
        assert len(placed) == len(set(placed))
        assert {sample for sample in samples if sample.required} <= set(placed) <= set(samples)


def test_prompts_of_a_pack_are_its_prefix_and_suffix(reader: Reader, shop: Shop) -> None:
    for pack in packs_of(reader, shop, 3):
        for sample, length, suffix in zip(pack.samples, pack.lengths, pack.suffixes, strict=True):
            assert (*pack.prefix[:length], *suffix) == plain_prompt(reader, shop, 3, sample)


def test_a_packed_step_owns_every_slot_once() -> None:
    pack = Pack((5, 6, 7))
    for length in (1, 3):
        pack.add(Sample(0.0, Task.PREDICT, 0, True), length, (8, 9))  # type: ignore[arg-type]
    batch = pack_batch(pack)
    assert batch.positions.tolist() == [0, 1, 2, 1, 2, 3, 4]
    assert sorted(batch.slots.tolist()) == list(range(7))
    assert [row.pages.tolist() for row in batch.rows] == [[0, 1, 2], [0, 3, 4], [0, 1, 2, 5, 6]]
    np.testing.assert_array_equal(batch.tokens, [5, 6, 7, 8, 9, 8, 9])
