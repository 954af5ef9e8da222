"""Forks on the GPU backend under the interpreter equal the torch backend's, among other work and in chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shoplm.kernels.forks import ForkRow, fork_attention
from shoplm.kernels.inputs import PagedKv
from shoplm.request import Explain, HeadValues, ItemScores
from toy_backend import FEATURES, ITEMS, assert_same, backends, run, work

HISTORY = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6]
HIDDEN = ((), ((2, 9),), ((0, 1), (15, 23)))


@pytest.mark.parametrize("traits", [False, True], ids=["llama", "every-trait"])
def test_forks_equal_the_torch_backend(traits: bool) -> None:
    reference, backend = backends(traits=traits)
    tokens = HISTORY + [11, 12] * len(HIDDEN)
    features = tuple((0.5 * at,) * FEATURES for at in range(len(HIDDEN)))
    jobs = [
        work()[0],
        (tokens, Explain(2, HIDDEN, ItemScores((0, ITEMS - 1, 7)))),
        (tokens, Explain(2, HIDDEN, HeadValues(features))),
    ]
    _, expected = run(reference, 9, jobs)
    _, found = run(backend, 9, jobs)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    values = np.array(expected[1]).reshape(len(HIDDEN), 3)
    assert np.abs(values[1:] - values[0]).max() > 0.01


def test_a_token_reads_what_it_may_and_the_window_counts_positions() -> None:
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(2, 1, 16, 64, generator=generator) for _ in range(2))
    q, out = torch.randn(3, 2, 64, generator=generator), torch.full((3, 2, 64), torch.nan)
    slots = torch.tensor([20, 21, 3, 4, 17])
    visible = torch.tensor([[True, False, True, True, False]] * 2)
    row = ForkRow(1, 3, slots, visible, torch.tensor([4, 3]))
    fork_attention(q, PagedKv(keys, values), row, out=out, window=2)
    pool_keys, pool_values = (part[slots // 16, 0, slots % 16] for part in (keys, values))
    for token, seen in ((1, [3]), (2, [2, 3])):  # of positions 4 and 3; the window is two keys
        weights = torch.softmax(q[token] @ pool_keys[seen].T / 8.0, dim=-1)
        torch.testing.assert_close(out[token], weights @ pool_values[seen])
    assert out[0].isnan().all()
