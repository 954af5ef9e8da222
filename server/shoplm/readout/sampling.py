"""Drawing tokens: temperature, top-k and top-p, for a batch of rows that each have their own settings.

A row's draw depends on its logits, its settings and the pair (seed, index) only, never on the rows beside it: the
random number is a hash of the pair, turned into a token by the inverse of the cumulative distribution. Tokens of equal
logits are ordered by id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.request import Sampling
from torch import Tensor
from torch.nn import functional

SHORTLIST = 1024  # most likely tokens that are sorted first; nearly every top-k and top-p ends among them
ARGMAX_BLOCK = 192
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def draw(logits: Tensor, samplings: Sequence[Sampling], indices: Sequence[int]) -> list[int]:
    """One token id per row of `logits` [rows, vocabulary] (any float type), of samplings that are not greedy.

    `indices` counts each request's tokens, so that one seed gives a sequence of draws.
    """
    draws = uniforms([item.seed for item in samplings], indices)
    temperatures = torch.tensor([s.temperature for s in samplings], dtype=torch.float32, device=logits.device)
    rows = logits.float()
    # The largest logit becomes 0 first: a tiny temperature must not overflow to infinity.
    rows = (rows - rows.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    return _draw(rows, samplings, draws)


def argmax(logits: Tensor) -> Tensor:
    """The token of the largest logit of each row [rows], the first of equal ones. By maxima of blocks: torch's own
    argmax is not vectorised on CPUs and takes ten times as long."""
    rows, vocabulary = logits.shape
    padding = -vocabulary % ARGMAX_BLOCK
    padded = functional.pad(logits, (0, padding), value=-torch.inf) if padding else logits
    blocks = padded.view(rows, -1, ARGMAX_BLOCK)
    block = blocks.float().amax(dim=-1).argmax(dim=-1)
    return block * ARGMAX_BLOCK + blocks[torch.arange(rows, device=logits.device), block].argmax(dim=-1)


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one per pair, by two rounds of SplitMix64's finaliser (Steele et al., OOPSLA 2014)."""
    seed = np.array([value & _MASK for value in seeds], np.uint64)
    index = np.array([value & _MASK for value in indices], np.uint64)
    mixed = _splitmix(_splitmix(seed) + index)
    result: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def _splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = state + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    result: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return result


def _draw(logits: Tensor, samplings: Sequence[Sampling], draws: NDArray[np.float64]) -> list[int]:
    """`logits` fp32, temperature applied."""
    vocabulary, device = logits.shape[1], logits.device
    tokens = torch.zeros(len(samplings), dtype=torch.long, device=device)
    uniform = torch.from_numpy(draws).to(device)
    is_free = [not 0 < s.top_k < vocabulary and s.top_p >= 1 for s in samplings]
    free = [row for row, is_row_free in enumerate(is_free) if is_row_free]
    if free:
        tokens[free] = _inverse_cdf(torch.softmax(logits[free].double(), dim=-1), uniform[free])
    bound = [row for row, is_row_free in enumerate(is_free) if not is_row_free]
    for shortlist in (min(SHORTLIST, vocabulary), vocabulary):
        if bound:
            chosen, settled = _draw_from_top(
                logits[bound], [samplings[row] for row in bound], uniform[bound], shortlist
            )
            done = [row for row, ok in zip(bound, settled, strict=True) if ok]
            tokens[done] = chosen[torch.tensor(settled, device=device)]
            bound = [row for row, ok in zip(bound, settled, strict=True) if not ok]
    result: list[int] = tokens.tolist()
    return result


def _draw_from_top(
    logits: Tensor, samplings: Sequence[Sampling], uniform: Tensor, shortlist: int
) -> tuple[Tensor, list[bool]]:
    """Draws from the `shortlist` largest logits, and whether each row's cut ended before the shortlist did.

    Where it did not, the shortlist may have missed tokens, or dropped the wrong ones of several equal logits.
    """
    vocabulary, device = logits.shape[1], logits.device
    ids = torch.topk(logits, shortlist, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    top_k = torch.tensor([s.top_k if 0 < s.top_k < vocabulary else vocabulary for s in samplings], device=device)
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)
    in_k = torch.arange(shortlist, device=device) < top_k[:, None]
    # Nucleus of the distribution that top-k leaves: normalised over its tokens, all of them where top-k is off.
    weights = torch.where(in_k, values.double().exp(), 0.0)
    total = torch.where(top_k < vocabulary, weights.sum(-1), logits.double().exp().sum(-1))
    before = weights.cumsum(-1) - weights
    kept = in_k & (before < top_p[:, None] * total[:, None])
    kept[:, 0] = True
    last = values.gather(-1, kept.sum(-1, keepdim=True) - 1)
    settled = torch.ones(len(samplings), dtype=torch.bool, device=device)
    if shortlist < vocabulary:
        settled = (last[:, 0] > values[:, -1]) & ((top_k <= shortlist) | (top_k == vocabulary))
    picked = _inverse_cdf(torch.where(kept, weights, 0.0), uniform)
    return ids.gather(-1, picked[:, None])[:, 0], settled.tolist()


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index per row of `weights` [rows, n] (fp64, not normalised) at which the cumulative share exceeds `uniform`."""
    cumulative = weights.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding can leave the target at the very total: the last index of positive weight is meant then.
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).long().argmax(-1)
    return torch.minimum(index, last)
