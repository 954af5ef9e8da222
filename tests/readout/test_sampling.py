"""Sampling: greedy, temperature, top-k, top-p and seeds, against plain references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shoplm.readout.sampling import ARGMAX_BLOCK, SHORTLIST, argmax, draw, uniforms
from shoplm.request import Sampling


def logits_of(rows: int, vocabulary: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def nucleus(logits: torch.Tensor, sampling: Sampling) -> list[int]:
    """Tokens that may be drawn, by a plain sort: largest first, equal ones by id."""
    scaled = (logits.double() / sampling.temperature).tolist()
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(np.array([scaled[token] for token in order]) - scaled[order[0]])
    before = np.cumsum(weights) - weights
    kept = max(1, int((before < sampling.top_p * weights.sum()).sum()))
    return order[:kept]


@pytest.mark.parametrize("vocabulary", [1, ARGMAX_BLOCK - 1, ARGMAX_BLOCK, ARGMAX_BLOCK + 1, 1000])
def test_greedy_is_the_first_of_the_largest(vocabulary: int) -> None:
    logits = logits_of(5, vocabulary).bfloat16().round()  # many equal ones
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert argmax(logits).tolist() == expected


@pytest.mark.parametrize("top_k", [0, 1, 7, 3000])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_draws_stay_in_the_nucleus_and_fill_it(top_k: int, top_p: float, rounded: bool) -> None:
    logits = logits_of(1, 5000, scale=1.5)
    if rounded:
        logits = logits.round()
    draws = 300
    settings = [Sampling(0.8, top_k, top_p, seed) for seed in range(draws)]
    tokens = draw(logits.expand(draws, -1), settings, [0] * draws)
    allowed = nucleus(logits[0], settings[0])
    assert set(tokens) <= set(allowed)
    if len(allowed) <= 7:
        weights = torch.softmax(logits[0, allowed].double() / 0.8, 0).numpy()
        likely = {token for token, weight in zip(allowed, weights, strict=True) if weight > 0.05}
        assert likely <= set(tokens)


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    draws = 20_000
    for sampling in (Sampling(0.7), Sampling(0.7, top_k=3), Sampling(0.7, top_p=0.8)):
        settings = [Sampling(0.7, sampling.top_k, sampling.top_p, 3)] * draws
        tokens = draw(logits.expand(draws, -1), settings, list(range(draws)))
        allowed = nucleus(logits[0], sampling)
        expected = np.zeros(5)
        expected[allowed] = torch.softmax(logits[0, allowed].double() / 0.7, 0).numpy()
        np.testing.assert_allclose(np.bincount(tokens, minlength=5) / draws, expected, atol=0.015)


def test_a_draw_does_not_depend_on_the_rows_beside_it() -> None:
    logits = logits_of(40, 6000)
    logits[::3] *= 0.01  # nearly flat: their nucleus is larger than the shortlist
    kinds = (Sampling(0.2), Sampling(1.0), Sampling(0.6, 50), Sampling(1.2, 0, 0.9), Sampling(1.0, SHORTLIST + 9, 0.99))
    settings = [Sampling(k.temperature, k.top_k, k.top_p, row) for row, k in zip(range(40), kinds * 8, strict=True)]
    indices = [row % 3 for row in range(40)]
    together = draw(logits, settings, indices)
    alone = [draw(logits[row : row + 1], [settings[row]], [indices[row]])[0] for row in range(40)]
    assert together == alone


def test_a_long_top_k_is_cut_by_top_p_over_all_of_it() -> None:
    """The nucleus is a share of what top-k keeps, also where that is longer than the shortlist."""
    logits = logits_of(1, 5000, scale=0.3)
    sampling = Sampling(1.0, top_k=4000, top_p=0.2)
    draws = 400
    tokens = draw(logits.expand(draws, -1), [Sampling(1.0, 4000, 0.2, seed) for seed in range(draws)], [0] * draws)
    allowed = nucleus(logits[0], sampling)
    assert set(tokens) <= set(allowed)
    assert any(allowed.index(token) > len(allowed) * 0.9 for token in tokens)


def test_seeds_and_indices_give_other_numbers_and_the_same_again() -> None:
    first = uniforms([0, 0, 1, -1, 2**64 - 1], [0, 1, 0, 5, 5])
    assert len(set(first.tolist())) == 4  # seeds count modulo 2^64
    assert np.array_equal(first, uniforms([0, 0, 1, -1, 2**64 - 1], [0, 1, 0, 5, 5]))
    many = uniforms([7] * 10_000, range(10_000))
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.01 and abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.03


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = logits_of(3, 300, scale=50.0)
    assert draw(logits, [Sampling(1e-30, seed=n) for n in range(3)], [0] * 3) == logits.argmax(-1).tolist()
