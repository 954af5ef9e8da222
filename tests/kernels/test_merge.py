"""merge under the interpreter: weights from log-sum-exps, rows to skip, empty splits."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import prefix_sums
from shoplm.kernels import merge, reference
from shoplm.kernels.merge import merge_splits
from shoplm.kernels.workspace import Partials


def random_partials(counts: list[int], splits: int, kv_heads: int, packed: int, head_dim: int) -> Partials:
    """Partials with poison in the splits that do not exist."""
    partials = Partials.allocate(len(counts), splits, kv_heads, packed, head_dim, torch.device("cpu"))
    partials.out.copy_(torch.randn(partials.out.shape))
    partials.lse.copy_(torch.randn(partials.lse.shape) * 20)
    for row, count in enumerate(counts):
        partials.out[row, count:] = math.nan
        partials.lse[row, count:] = math.nan
    partials.count.copy_(torch.tensor(counts))
    return partials


@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_equals_reference(head_dim: int, group: int) -> None:
    """One-token rows with 2, 7, 8, 9 and 20 splits; rows with fewer than 2 are left alone."""
    counts = [2, 7, 0, 8, 9, 1, 20]
    partials = random_partials(counts, 21, 2, group, head_dim)
    query_start = prefix_sums([1] * len(counts))
    out = torch.full((len(counts), 2 * group, head_dim), math.nan)
    lse = torch.full(out.shape[:2], math.nan)
    merge_splits(partials, query_start, out, lse)
    for row, count in enumerate(counts):
        if count < 2:
            assert out[row].isnan().all() and lse[row].isnan().all()
            continue
        expected, expected_lse = reference.merge_splits(partials.out[row, :count], partials.lse[row, :count])
        torch.testing.assert_close(out[row], expected.reshape(2 * group, head_dim), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[row], expected_lse.reshape(-1), rtol=1e-6, atol=1e-4)


def test_chunks_map_packed_rows_to_tokens_and_heads() -> None:
    """Packed row p of KV head h is head h * group + p % group of token p // group; packed rows past the end stop."""
    group, kv_heads = 3, 2
    partials = random_partials([3, 2], 4, kv_heads, 16, 64)
    query_start = prefix_sums([4, 2])
    out = torch.full((6, kv_heads * group, 64), math.nan)
    merge_splits(partials, query_start, out)
    for row, first, tokens in ((0, 0, 4), (1, 4, 2)):
        count = int(partials.count[row])
        expected, _ = reference.merge_splits(partials.out[row, :count], partials.lse[row, :count])
        for packed in range(tokens * group):
            got = out[first + packed // group].reshape(kv_heads, group, 64)[:, packed % group]
            torch.testing.assert_close(got, expected[:, packed], rtol=1e-5, atol=1e-6)


def test_programs_that_share_packed_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for each packed row, and three that walk over up to 14 of a row; 17 splits are read in three turns."""
    partials = random_partials([17, 1, 3], 17, 2, 16, 64)
    found = []
    for programs in (16, 3):
        monkeypatch.setattr(merge, "MOST_WALKERS", programs)
        out, lse = torch.full((16, 4, 64), math.nan), torch.full((16, 4), math.nan)
        merge_splits(partials, prefix_sums([7, 4, 5]), out, lse)
        assert out[7:11].isnan().all() and not out[11:].isnan().any()
        found.append((out.nan_to_num(9.0), lse.nan_to_num(9.0)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_empty_splits() -> None:
    """Splits in which a token sees nothing carry -inf: first, last, and all of them."""
    partials = random_partials([3, 3, 3], 3, 1, 1, 64)
    partials.lse[0, 0] = partials.lse[1, 1:] = partials.lse[2] = -math.inf
    partials.out[0, 0] = partials.out[1, 1:] = partials.out[2] = 0.0
    out, lse = torch.full((3, 1, 64), math.nan), torch.full((3, 1), math.nan)
    merge_splits(partials, prefix_sums([1, 1, 1]), out, lse)
    first, _ = reference.merge_splits(partials.out[0, 1:], partials.lse[0, 1:])
    torch.testing.assert_close(out[0], first[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[1], partials.out[1, 0, 0], rtol=1e-6, atol=1e-6)
    assert (out[2] == 0).all() and lse[2].item() == -math.inf


def test_rounds_once_to_the_output_dtype() -> None:
    """fp16 output is the fp32 result rounded."""
    partials = random_partials([5], 5, 1, 2, 64)
    full, half = torch.empty(1, 2, 64), torch.empty(1, 2, 64, dtype=torch.float16)
    merge_splits(partials, prefix_sums([1]), full)
    merge_splits(partials, prefix_sums([1]), half)
    assert torch.equal(full.half(), half)
