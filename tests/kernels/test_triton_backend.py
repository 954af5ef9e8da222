"""The whole GPU backend under the interpreter: mixed steps of all services equal the torch backend's, row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from shoplm.batch import Batch, EmbedReadout, ForkReadout, PredictReadout, Row, SampleReadout, SelectReadout
from shoplm.engine.gpu_warmup import warm_up
from shoplm.errors import ConfigurationError
from shoplm.kernels.beam_step import beam_step
from shoplm.model import device_select
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.triton_backend import TritonBackend
from shoplm.model.triton_decoder import TritonDecoder
from shoplm.request import Embed, Sampling, Select, SelectOutput, Task
from toy_backend import (
    ITEMS,
    PAGES,
    TOLERANCE,
    Recorder,
    assert_same,
    backends,
    chats,
    explanations,
    run,
    toy_config,
    toy_shop,
    toy_trie,
    toy_weights,
    work,
)


def kinds(batch: Batch) -> set[str]:
    """What a step mixes."""
    names = {SampleReadout: "sample", PredictReadout: "predict", EmbedReadout: "embed", type(None): "chunk"}
    names |= {ForkReadout: "forks"}
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
    jobs = [*work(), *explanations()]
    expected, outputs = run(reference, 15, jobs)
    found, answers = run(backend, 15, jobs)
    assert backend.info == replace(reference.info, name="triton", pipeline_depth=2, checks_drafts=False)
    # Else the test would not show what it says: prompt, chat, searches and predictions in one launch.
    mixes = [kinds(batch) for batch, _ in expected.steps]
    assert any({"chunk", "decode", "beams"} <= mix for mix in mixes), mixes
    assert any({"decode", "predict", "beams"} <= mix for mix in mixes), mixes
    assert any({"decode", "beams", "forks"} <= mix for mix in mixes), mixes
    assert {"select", "embed", "sample"} <= set().union(*mixes)
    assert len(found.steps) == len(expected.steps) >= 7
    for (batch, want), (_, have) in zip(expected.steps, found.steps, strict=True):
        assert len(want) == len(have) == len(batch.rows)
        for one, other in zip(want, have, strict=True):
            assert_same(one, other)
    for output, answer in zip(outputs, answers, strict=True):
        assert_same(output, answer)


def test_an_adapter_apart_equals_a_merged_one() -> None:
    reference, backend = backends(traits=True, adapted=True)
    jobs = [work()[1], work()[4], *chats(Sampling())]
    plain = run(backends(traits=True)[0], 15, jobs)[1]
    expected, found = (run(each, 15, jobs)[1] for each in (reference, backend))
    assert expected[2] != plain[2]
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


def test_a_seed_gives_the_same_tokens_in_every_run() -> None:
    """Beside other rows and alone, on a fresh backend: settings and seed decide, and both do."""
    _, backend = backends(traits=False, layers=1)
    wide, cut = Sampling(temperature=1.5, seed=2**63 + 11), Sampling(temperature=1.5, top_k=30, top_p=0.9, seed=7)
    other = Sampling(temperature=1.5, seed=8)
    _, [first, second, third, greedy] = run(backend, 2048, chats(wide, cut, other, Sampling()))
    assert len({first, second, third, greedy}) == 4
    _, fresh = backends(traits=False, layers=1)
    assert run(fresh, 2048, [work()[0], work()[5], *chats(cut)])[1][2] == second
    assert run(fresh, 1, chats(wide))[1] == [first]


def test_a_temperature_that_no_logit_bears_is_greedy() -> None:
    """Logits over it would overflow: neither backend divides by it."""
    reference, backend = backends(traits=False, layers=1)
    jobs = chats(Sampling(), Sampling(temperature=1e-39, seed=3), Sampling(temperature=1e-7, top_k=5, top_p=0.9))
    for each in (reference, backend):
        greedy, *others = run(each, 2048, jobs)[1]
        assert others == [greedy, greedy]


def test_a_result_does_not_depend_on_the_batch() -> None:
    """Alone or among all services, in chunks of any size: the same tokens and items."""
    _, backend = backends(traits=False, layers=1)
    jobs = [work()[1], *chats(Sampling(temperature=1.5, top_p=0.9, seed=3))]
    _, together = run(backend, 2048, jobs)
    for job, output in zip(jobs, together, strict=True):
        _, [alone] = run(backend, 9, [job])
        assert_same(alone, output)


@pytest.mark.parametrize(("kv_format", "limit"), [("int8", 0.0005), ("fp8", 0.02)])
def test_quantised_keys_and_values_are_those_that_the_torch_backend_rounds(kv_format: str, limit: float) -> None:
    """A hidden state behind chunks of prompt that were read back from the pool: off by the format's rounding, and the
    quality gate, which lets the torch backend round, measures the same numbers."""
    plain, _ = backends(traits=False)
    rounding, backend = backends(traits=False, kv_format=kv_format)
    jobs = [([3, 1, 4, 1, 5, 9, 2, 6, 5] * 2, Embed())]
    exact, expected = (np.asarray(run(each, 7, jobs)[1][0], np.float64) for each in (plain, rounding))
    recorder, [found] = run(backend, 7, jobs)
    assert len(recorder.steps) == 3
    distance = 1 - exact @ expected / np.linalg.norm(exact) / np.linalg.norm(expected)
    assert limit / 200 < distance < limit
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_unknown_kv_format_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="kv_format 'int2' is not one of: model, int8, fp8"):
        backends(traits=False, kv_format="int2")


def test_warming_up_changes_no_answer() -> None:
    """It runs every kind of request that fits: what its pages hold afterwards is not read."""
    _, backend = backends(traits=False, layers=1, max_context_tokens=24)
    jobs = [work()[5], *chats(Sampling())]
    _, cold = run(backend, 15, jobs)
    recorder = Recorder(backend)
    assert warm_up(recorder, 32) > 0
    full = recorder.steps[0][0]
    assert len(full.tokens) == 32 and len(full.rows) == 8
    done = set().union(*(kinds(batch) for batch, _ in recorder.steps))
    assert {"sample", "decode", "predict", "select", "beams", "forks"} <= done
    assert run(backend, 15, jobs)[1] == cold


def test_how_many_items_a_deep_search_gives_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for a width: the last level, which keeps fewer, takes those of the others."""
    _, backend = backends(traits=False, layers=1)
    classes = []

    def recorded(*arguments: Any, max_select: int, **options: Any) -> Any:
        classes.append(max_select)
        return beam_step(*arguments, max_select=max_select, **options)

    monkeypatch.setattr(device_select, "beam_step", recorded)
    [few] = run(backend, 2048, [([1, 2, 3], Select(3, 20, trie="deep"))])[1]
    [many] = run(backend, 2048, [([1, 2, 3], Select(20, 20, trie="deep"))])[1]
    assert set(classes) == {32}
    assert isinstance(few, SelectOutput) and isinstance(many, SelectOutput)
    assert few.items == many.items[:3] and len(few.items) == 3


def test_many_selections_of_a_step_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their logits, filters and terms, a row of the catalogue each, would outgrow what memory is left for a step."""
    _, backend = backends(traits=False, layers=1)
    kinds_of = (Select(4, 0, exclude_items=(3,)), Select(4, 0, candidates=(7, 2, 30)), Select(4, 4, trie="deep"))
    jobs: list[tuple[list[int], Task]] = [([at, 2, 3], select) for at in range(3) for select in kinds_of]
    rows: list[int] = []

    def recorded(logits: torch.Tensor, first_row: torch.Tensor, *others: Any, **options: Any) -> Any:
        rows.append(len(first_row))
        return beam_step(logits, first_row, *others, **options)

    monkeypatch.setattr(device_select, "beam_step", recorded)
    whole = run(backend, 2048, jobs)[1]
    assert rows[:2] == [3, 3]
    rows.clear()
    monkeypatch.setattr(device_select, "MOST_LOGITS", 2 * ITEMS)
    parts = run(backend, 2048, jobs)[1]
    assert rows[:4] == [1, 1, 1, 3]  # of six of the shop's trie, half of which are candidates, then the other trie's
    for one, other in zip(whole, parts, strict=True):
        assert_same(one, other)


def test_a_failed_step_raises_from_its_result() -> None:
    _, backend = backends(traits=False, layers=1)
    row = Row(0, 0, 1, np.zeros(1, np.int32), 1, readout=SelectReadout(Select(1, 1, trie="nowhere"), 0))
    handle = backend.submit(Batch(np.ones(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int64), (row,)))
    with pytest.raises(ValueError, match="'nowhere' does not exist"):
        handle.result()


def test_beams_go_on_behind_a_prompt_that_fills_the_context() -> None:
    """On both backends as with a longer context."""
    longer, backend = backends(traits=False, layers=1, max_context_tokens=24)
    config = toy_config(traits=False, layers=1)
    torch.manual_seed(20240607)
    filled = TorchBackend(
        config, toy_weights(config), toy_shop(), [toy_trie()], pages=PAGES, state_slots=1, max_context_tokens=24
    )
    jobs = [(list(range(24)), Select(4, 4, trie="deep"))]
    [expected] = run(longer, 2048, jobs)[1]
    for each in (filled, backend):
        assert each.info.max_context_tokens == 24
        assert_same(expected, run(each, 2048, jobs)[1][0])


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_takes_no_memory_of_its_own(tied: bool) -> None:
    """With a shop's rows behind the text's, which are a copy."""
    config = toy_config(traits=not tied)
    weights, shop_rows = toy_weights(config), torch.randn(5, config.hidden_size)
    options: dict[str, Any] = {"max_positions": 8, "workspace": None, "device": torch.device("cpu")}
    decoder = TritonDecoder(config, weights, shop_rows, **options)
    storages = {table.untyped_storage().data_ptr() for table in (decoder._embedding, decoder._head)}
    assert len(storages) == (1 if tied else 2)
    assert decoder.vocab_size == config.vocab_size + 5 and decoder.text_vocab_size == config.vocab_size
    hidden = torch.randn(3, config.hidden_size)
    assert torch.equal(decoder.logits(hidden), torch.nn.functional.linear(hidden, weights.lm_head))


def test_more_lanes_than_there_is_scratch_for_are_refused() -> None:
    _, backend = backends(traits=False, layers=1)
    with pytest.raises(ValueError, match="40 lanes, but max_step_tokens is 32"):
        run(backend, 2048, [([1, 2, 3], Select(1, 40, trie="deep"))])


def test_what_the_kernels_do_not_take_is_refused() -> None:
    config = toy_config(traits=False)
    with pytest.raises(ConfigurationError, match="page_size 8 is not one of"):
        TritonBackend(config, toy_weights(config), pages=4, page_size=8, device="cpu")
