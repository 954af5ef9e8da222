# mypy: allow-untyped-decorators
"""Exact, deterministic top-k of a register tile without sorting it: shared by beam_step and sample.

A score becomes an unsigned key whose integer order is the score's order, so the k-th largest is found bit by bit: 32
counts decide 32 bits. Counting is integer work: the result does not depend on thread order, and ties can be given to
the lower index with one prefix sum. Key 0 is no number's key and means "no candidate".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_key(score: tl.tensor) -> tl.tensor:
    """uint32 key of an fp32 score: larger score, larger key; NaN sorts beyond infinity. A sum is never -0.0 here."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def key_score(key: tl.tensor) -> tl.tensor:
    """The fp32 score of a key: inverse of `ordered_key`."""
    bits = tl.where((key >> 31) != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def kth_largest_key(keys: tl.tensor, k: tl.tensor) -> tl.tensor:
    """Largest t with at least `k` keys >= t: the k-th largest key, or 0 where the tile holds fewer than `k`."""
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        trial = threshold | bit
        count = tl.sum((keys >= trial).to(tl.int32), axis=0)
        threshold = tl.where(count >= k, trial, threshold)
        bit = bit >> 1
    return threshold


@triton.jit
def choose_top(keys: tl.tensor, k: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The top `k` of a tile, ties to the lower index: (chosen [tile] bool, position [tile] int32, count).

    `position` numbers the chosen elements in index order; `count` = min(k, candidates in the tile).
    """
    threshold = kth_largest_key(keys, k)
    above = keys > threshold
    tied = (keys == threshold) & (keys > 0)
    quota = k - tl.sum(above.to(tl.int32), axis=0)
    # Both prefix sums in one scan: a tile has far fewer than 2^15 elements.
    running = tl.cumsum(above.to(tl.int32) + (tied.to(tl.int32) << 16), axis=0)
    tied_before = running >> 16
    chosen = above | (tied & (tied_before <= quota))
    position = (running & 0xFFFF) + tl.minimum(tied_before, quota) - 1
    return chosen, position, tl.sum(chosen.to(tl.int32), axis=0)
