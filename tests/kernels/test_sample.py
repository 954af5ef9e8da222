"""Sampling under the interpreter against its specification, and the specification against statistics."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from shoplm.kernels import reference_ops
from shoplm.kernels.sample import TILE, SampleWorkspace, sample


@dataclasses.dataclass(frozen=True)
class Rows:
    """One call's tensors."""

    logits: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor

    @staticmethod
    def of(logits: torch.Tensor, **settings: list[float]) -> Rows:
        """Rows with `temperature`, `top_k`, `top_p`, `seed`, `position` lists; greedy, unfiltered, 0 by default."""
        rows = logits.shape[0]
        return Rows(
            logits,
            torch.tensor(settings.get("temperature", [0.0] * rows), dtype=torch.float32),
            torch.tensor(settings.get("top_k", [0] * rows), dtype=torch.int32),
            torch.tensor(settings.get("top_p", [1.0] * rows), dtype=torch.float32),
            torch.tensor(settings.get("seed", [0] * rows), dtype=torch.int64),
            torch.tensor(settings.get("position", [0] * rows), dtype=torch.int64),
        )

    def arguments(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(*(tensor[rows] for tensor in self.arguments()))


def run(rows: Rows, **keywords: Any) -> list[int]:
    tokens: list[int] = sample(*rows.arguments(), **keywords).tolist()
    return tokens


def expected(rows: Rows) -> list[int]:
    tokens: list[int] = reference_ops.sample(*rows.arguments()).tolist()
    return tokens


@settings(max_examples=40, derandomize=True)
@given(data=st.data())
def test_equals_the_specification(data: st.DataObject) -> None:
    """Every row of a batch with settings of its own; coarse logits give the ties that break naive filters."""
    vocab = data.draw(st.sampled_from([1, 2, 5, 127, 1000, TILE, TILE + 1, 9001]))
    count = data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    storage = torch.full((count, vocab + 5), float("nan"), dtype=dtype)
    logits = storage[:, :vocab]
    logits.copy_(torch.randn(count, vocab, generator=generator) * data.draw(st.sampled_from([0.0, 1.0, 4.0])))
    if data.draw(st.booleans(), label="ties"):
        logits.copy_(logits.round())
    if vocab > 2 and data.draw(st.booleans(), label="forbidden tokens"):
        logits[:, 1] = float("-inf")

    def each(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return [data.draw(strategy) for _ in range(count)]

    rows = Rows.of(
        logits,
        temperature=each(st.sampled_from([0.0, 0.25, 1.0, 3.0])),
        top_k=each(st.sampled_from([-1, 0, 1, 2, 20, 1500, 10_000])),
        top_p=each(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])),
        seed=each(st.integers(-(2**63), 2**63 - 1)),
        position=each(st.integers(0, 2**40)),
    )
    assert run(rows, out=torch.full((count,), -5)) == expected(rows)


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.zeros(2, 2 * TILE)
    logits[0, 17] = logits[0, TILE + 3] = 2.0
    logits[1] = -3.0
    assert run(Rows.of(logits, top_k=[5, 5], top_p=[0.5, 0.5])) == [17, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_negative_zero_ties_with_zero(dtype: torch.dtype) -> None:
    """Of equal logits top-k keeps the lowest ids, and -0.0 equals 0.0: over 8 seeds only tokens 0 and 1 come out."""
    logits = torch.zeros(8, 6, dtype=dtype)
    logits[:, 1] = -0.0
    rows = Rows.of(logits, temperature=[1.0] * 8, top_k=[2.0] * 8, seed=[float(seed) for seed in range(8)])
    found = run(rows)
    assert found == expected(rows)
    assert set(found) == {0, 1}


def test_a_row_without_a_number_has_a_token_of_the_vocabulary() -> None:
    """Its neighbour is served as if it were alone."""
    logits = torch.full((3, 5000), torch.nan)
    logits[1, 7] = 1.0
    logits[1, :7], logits[1, 8:] = 0.0, 0.0
    settings = {"temperature": [0.0, 0.0, 1.0], "top_k": [0, 0, 5], "top_p": [1.0, 1.0, 0.5]}
    found = run(Rows.of(logits, **settings))
    assert all(0 <= token < 5000 for token in found)
    assert found[1] == 7


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Same seed and position, same token: alone, in a batch, elsewhere in it, and from a larger workspace."""
    generator = torch.Generator().manual_seed(1)
    rows = Rows.of(
        torch.randn(4, 5000, generator=generator),
        temperature=[1.0, 0.0, 0.7, 2.0],
        top_k=[0, 0, 40, 3000],
        top_p=[1.0, 1.0, 0.8, 0.95],
        seed=[1, 2, 3, 4],
        position=[7, 8, 9, 10],
    )
    together = run(rows, workspace=SampleWorkspace.allocate(9, 6000, "cpu"))
    assert together == [run(rows[slice(i, i + 1)])[0] for i in range(4)]
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Rows(*(tensor[order] for tensor in rows.arguments()))
    assert run(shuffled) == [together[i] for i in order.tolist()]


def test_philox_known_answers() -> None:
    """The vectors published with the generator (Random123, kat_vectors, philox4x32-10)."""
    for counter, key, words in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
        k0, k1 = (torch.tensor(word) for word in key)
        assert [int(word) for word in reference_ops.philox((c0, c1, c2, c3), (k0, k1))] == words


def test_noise_is_gumbel() -> None:
    """Quantiles of 400,000 draws against the distribution function exp(-exp(-g)); the bound is five standard errors."""
    draws = 400_000
    noise = reference_ops.gumbel_noise(torch.tensor(99), torch.tensor(3), torch.arange(draws)).double()
    assert torch.isfinite(noise).all()
    for g in (-2.0, 0.0, 1.0, 4.0, 9.0):
        probability = torch.exp(-torch.exp(torch.tensor(-g, dtype=torch.float64)))
        error = (noise <= g).double().mean() - probability
        assert abs(float(error)) < 5 * float((probability * (1 - probability) / draws).sqrt())


def test_draws_follow_the_filtered_distribution() -> None:
    """Over 20,000 seeds: frequencies of the kept tokens, none of the cut ones."""
    probability = torch.tensor([0.4, 0.05, 0.25, 0.15, 0.1, 0.05])
    draws = 20_000
    # top_k = 4 keeps {0, 2, 3, 4}, mass 0.9; top_p = 0.8 of that keeps {0, 2, 3}, the shortest run to reach 0.72.
    kept = torch.tensor([0, 2, 3])
    noise = reference_ops.gumbel_noise(
        torch.arange(draws)[:, None].expand(draws, 3),
        torch.zeros(draws, 3, dtype=torch.long),
        kept.expand(draws, 3),
    )
    drawn = kept[(probability.log()[kept] + noise).argmax(dim=1)]
    share = torch.bincount(drawn, minlength=6) / draws
    want = torch.zeros(6)
    want[kept] = probability[kept] / probability[kept].sum()
    assert ((share - want).abs() <= 5 * (want * (1 - want) / draws).sqrt()).all()
    filtered = {"temperature": [1.0] * 12, "top_k": [4.0] * 12, "top_p": [0.8] * 12}
    seeds = [float(seed) for seed in range(12)]
    rows = Rows.of(probability.log().expand(12, 6).contiguous(), **filtered, seed=seeds)
    assert run(rows) == drawn[:12].tolist()


def test_no_rows() -> None:
    assert run(Rows.of(torch.empty(0, 10))) == []


def test_bad_arguments_are_named() -> None:
    good = Rows.of(torch.zeros(2, 8))
    cases: list[tuple[dict[str, torch.Tensor], dict[str, Any], type[Exception], str]] = [
        ({"logits": torch.zeros(2, 0)}, {}, ValueError, "logits has 0 columns"),
        ({"logits": torch.zeros(2, 16)[:, ::2]}, {}, ValueError, "logits has last stride 2"),
        ({"temperature": torch.zeros(3)}, {}, ValueError, "temperature has shape"),
        ({"top_k": torch.zeros(2, dtype=torch.int64)}, {}, TypeError, r"top_k is torch\.int64"),
        ({"seed": torch.zeros(2, dtype=torch.int32)}, {}, TypeError, r"seed is torch\.int32"),
        ({}, {"out": torch.zeros(2, dtype=torch.int32)}, TypeError, r"out is torch\.int32"),
        ({}, {"workspace": SampleWorkspace.allocate(1, 8, "cpu")}, ValueError, "allocate it for the most rows"),
    ]
    for changed, keywords, error, message in cases:
        with pytest.raises(error, match=message):
            run(dataclasses.replace(good, **changed), **keywords)
