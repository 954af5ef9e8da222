"""Attention over the KV pool for a ragged batch, in torch operations that a CPU runs well.

Query heads that share a key-value head are rows of one product: [kv_heads, tokens * group, head_dim]. On CPUs a batched
product, a softmax and another product are faster for such shapes than torch's fused attention, which multiplies few
rows at a time; a span's queries go in blocks, so that the causal half that nobody sees is mostly not computed.
Queries arrive scaled by 1 / sqrt(head_dim).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from shoplm.model.attention_plan import AttentionPlan, Padded, Span
from shoplm.model.kv_pool import KVPool
from torch import Tensor

BLOCK_TOKENS = 128  # queries of a span that are multiplied at once


def attend(plan: AttentionPlan, pool: KVPool, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of T new tokens: [T, heads * head_dim].

    `queries` [T, heads, head_dim]; `keys` and `values` [T, kv_heads, head_dim], which the pool already holds too.
    """
    output = torch.empty(queries.shape, dtype=queries.dtype)
    for span in plan.spans:
        _attend_span(span, plan.window, pool, layer, queries, keys, values, output)
    for padded in plan.padded:
        _attend_padded(padded, pool, layer, queries, keys.shape[1], output)
    return output.flatten(1)


def _attend_span(
    span: Span,
    window: int | None,
    pool: KVPool,
    layer: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
) -> None:
    tokens = slice(span.start, span.end)
    count, kv_heads, head_dim = span.end - span.start, keys.shape[1], keys.shape[2]
    group = queries.shape[1] // kv_heads
    if span.rows is None:
        seen_keys, seen_values = keys[tokens].transpose(0, 1).contiguous(), values[tokens].transpose(0, 1).contiguous()
    else:
        gathered = pool.read(layer, span.rows)
        seen_keys, seen_values = (part.view(kv_heads, -1, head_dim) for part in gathered)
    packed = queries[tokens].view(count, kv_heads, group, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    target = output[tokens].view(count, kv_heads, group, head_dim).transpose(0, 1)
    for begin in range(0, count, BLOCK_TOKENS):
        end = min(count, begin + BLOCK_TOKENS)
        last = span.past + end
        first = 0 if window is None else max(0, span.past + begin - window + 1)
        scores = packed[:, begin * group : end * group] @ seen_keys[:, first:last].transpose(1, 2)
        if window is None:
            mask = _causal_mask(end - begin, end - begin, 0, None, group, scores.dtype)
        else:
            mask = _causal_mask(end - begin, last - first, span.past + begin - first, window, group, scores.dtype)
        scores[:, :, scores.shape[2] - mask.shape[1] :] += mask
        block = torch.softmax(scores, dim=-1) @ seen_values[:, first:last]
        target[:, begin:end] = block.view(kv_heads, end - begin, group, head_dim)


@lru_cache(maxsize=64)
def _causal_mask(queries: int, keys: int, offset: int, window: int | None, group: int, dtype: torch.dtype) -> Tensor:
    """Additive [queries * group, keys]: query i is at key `offset` + i, and sees it and those before, in the window."""
    position = torch.arange(queries)[:, None] + offset
    key = torch.arange(keys)
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    mask = torch.zeros(queries, keys, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return mask.repeat_interleave(group, dim=0)


def _attend_padded(padded: Padded, pool: KVPool, layer: int, queries: Tensor, kv_heads: int, output: Tensor) -> None:
    rows, width, length = padded.shape
    head_dim = queries.shape[2]
    chosen = queries[padded.queries].view(rows, width, kv_heads, -1, head_dim)
    group = chosen.shape[3]
    packed = chosen.transpose(1, 2).reshape(rows * kv_heads, width * group, head_dim)
    keys, values = (part.view(rows * kv_heads, length, head_dim) for part in pool.read(layer, padded.rows))
    scores = torch.bmm(packed, keys.transpose(1, 2))
    if padded.mask is not None:
        scores.view(rows, kv_heads, width * group, length).add_(padded.mask)
    if padded.own_rows is None:
        result = torch.bmm(torch.softmax(scores, dim=-1), values)
    else:
        result = _with_own(padded, pool, layer, chosen, scores, values)
    result = result.view(rows, kv_heads, width, group, head_dim).transpose(1, 2).reshape(rows * width, -1, head_dim)
    output[padded.targets] = result if padded.kept is None else result[padded.kept]


def _with_own(padded: Padded, pool: KVPool, layer: int, chosen: Tensor, scores: Tensor, values: Tensor) -> Tensor:
    """One softmax over the prompt's keys, shared by all lanes, and each lane's own: [rows * kv_heads, lanes * group,
    head_dim]."""
    assert padded.own_rows is not None
    rows, lanes, kv_heads, group, head_dim = chosen.shape
    own_shape = (rows, lanes, kv_heads, padded.own_steps, head_dim)
    own_keys, own_values = (part.view(own_shape) for part in pool.read(layer, padded.own_rows))
    own_scores = (chosen @ own_keys.transpose(-1, -2)).transpose(1, 2).reshape(rows * kv_heads, lanes * group, -1)
    shares = torch.softmax(torch.cat((scores, own_scores), dim=-1), dim=-1)
    of_prompt, of_own = shares[..., : padded.shape[2]], shares[..., padded.shape[2] :]
    own = of_own.reshape(rows, kv_heads, lanes, group, -1).transpose(1, 2) @ own_values
    shared: Tensor = torch.bmm(of_prompt, values)
    return shared + own.transpose(1, 2).reshape(rows * kv_heads, lanes * group, head_dim)
