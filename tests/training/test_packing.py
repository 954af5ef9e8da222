"""One packed pass gives the hidden states that the plain prompts give when they are served one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shoplm.bundle import PromptSchema
from shoplm.engine.direct import DirectRunner
from shoplm.model.base import resolve_base
from shoplm.model.native.backend import NativeBackend, native_refusal
from shoplm.model.torch_backend import TorchBackend
from shoplm.request import Embed
from shoplm.training import pipeline
from shoplm.training.log import ShopLog
from shoplm.training.packing import Pack, pack_samples
from shoplm.training.passes import groups, lay_out, pages_of
from shoplm.training.reader import Reader, make_reader
from shoplm.training.samples import Sample, Task, samples_of
from shoplm.training.shop import Shop

BUDGET, BLOCK = 48, 16


@pytest.fixture(scope="module")
def shop(tiny_shop_log: ShopLog) -> Shop:
    return pipeline.prepare(tiny_shop_log)


@pytest.fixture(scope="module", params=["smollm2", "qwen2", "native"])
def reader(
    request: pytest.FixtureRequest, shop: Shop, tiny_model: object, tmp_path_factory: pytest.TempPathFactory
) -> Reader:
    """Torch in fp32, two architectures: Qwen2's upper layers see a sliding window, so a suffix has to know its own
    position. And the C++ decoder, where there is one."""
    base = resolve_base(str(tiny_model(request.param)))  # type: ignore[operator]
    dtype = torch.bfloat16 if request.param == "native" else torch.float32
    refusal = native_refusal(base.config, dtype, 16)
    if request.param == "native" and refusal is not None:
        pytest.skip(f"no C++ decoder here: {refusal}")
    catalog = pipeline.write_items(shop.items, tmp_path_factory.mktemp("items"))
    schema = PromptSchema(preamble="Hi.", attributes=("age",), history_budget_tokens=BUDGET, history_block_tokens=BLOCK)
    reader = make_reader(base, catalog, shop.items.vocabulary(base.config.vocab_size), schema, dtype)
    assert isinstance(reader.backend, TorchBackend if refusal is not None else NativeBackend)
    return reader


def packs_of(reader: Reader, shop: Shop, customer: int) -> list[Pack]:
    history = shop.histories[customer]
    return pack_samples(reader.builder, history, samples_of(history, shop.timeline, shop.starts[customer]))


def fill_with_nan(reader: Reader) -> None:
    """Whatever is read without having been written shows."""
    assert isinstance(reader.backend, TorchBackend | NativeBackend)
    reader.backend.pool.keys.fill_(torch.nan)
    reader.backend.pool.values.fill_(torch.nan)


def plain_prompt(reader: Reader, shop: Shop, customer: int, sample: Sample) -> tuple[int, ...]:
    known = shop.histories[customer].before(sample.moment)
    prefix = reader.builder.prefix(known)
    render = reader.builder.recommend if sample.task == Task.RECOMMEND else reader.builder.predict
    return render(prefix, known)


def test_packed_states_equal_those_of_the_plain_prompts(reader: Reader, shop: Shop) -> None:
    """All packs of some customers together, several steps' worth; the C++ decoder's are equal to the last bit."""
    chosen = [(customer, pack) for customer in range(16) for pack in packs_of(reader, shop, customer)]
    info = reader.backend.info
    assert len(list(groups([pack for _, pack in chosen], info.page_size, info.pages))) > 1
    fill_with_nan(reader)
    found = reader.read([pack for _, pack in chosen])
    prompts = [plain_prompt(reader, shop, customer, sample) for customer, pack in chosen for sample in pack.samples]
    plain = torch.tensor(DirectRunner(reader.backend).run([(prompt, Embed()) for prompt in prompts]))
    exact = isinstance(reader.backend, NativeBackend)
    torch.testing.assert_close(found, plain, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-4)


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


def pack_of(prefix: tuple[int, ...], *parts: tuple[int, tuple[int, ...]]) -> Pack:
    pack = Pack(prefix)
    for length, suffix in parts:
        pack.add(Sample(0.0, Task.PREDICT, 0, True), length, suffix)  # type: ignore[arg-type]
    return pack


def test_suffixes_share_whole_pages_and_own_a_copy_of_the_last() -> None:
    packs = [pack_of((1, 2, 3, 4, 5, 6, 7), (7, (8, 9)), (4, (8, 9)), (5, (8,))), pack_of((3,), (1, (8, 9)))]
    passes = lay_out(packs, page_size=4)
    assert passes.prefixes is not None
    assert passes.prefixes.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 3]
    assert [row.pages.tolist() for row in passes.prefixes.rows] == [[0, 1], [6]]
    assert passes.copied.tolist() == [[1, 2], [1, 5], [6, 7]]
    assert [row.pages.tolist() for row in passes.suffixes.rows] == [[0, 2, 3], [0, 4], [0, 5], [7]]
    assert [row.kv_len for row in passes.suffixes.rows] == [9, 6, 6, 3]
    assert passes.suffixes.positions.tolist() == [7, 8, 4, 5, 5, 1, 2]
    assert passes.suffixes.slots.tolist() == [2 * 4 + 3, 3 * 4, 4 * 4, 4 * 4 + 1, 5 * 4 + 1, 7 * 4 + 1, 7 * 4 + 2]
    np.testing.assert_array_equal(passes.suffixes.tokens, [8, 9, 8, 9, 8, 8, 9])
    assert [pages_of(pack, 4) for pack in packs] == [6, 2]


def test_groups_fill_the_pages_and_a_pack_that_never_fits_is_named() -> None:
    packs = [pack_of((1,) * 8, (8, (9,))) for _ in range(5)]  # three pages each
    assert [len(group) for group in groups(packs, 4, 7)] == [2, 2, 1]
    with pytest.raises(ValueError, match="1 samples behind 8 tokens need 3 pages"):
        list(groups(packs, 4, 2))


def test_a_prompt_without_a_prefix_is_a_suffix_alone() -> None:
    passes = lay_out([pack_of((), (0, (8, 9)))], page_size=4)
    assert passes.prefixes is None
    assert passes.suffixes.rows[0].pages.tolist() == [0]
