"""fp32 torch version of every op: the specification that the kernels are tested against.

Attention is here; the element-wise, sampling and beam-search ops are in `reference_ops.py` and re-exported. Written for
clarity, one row at a time, on any device; rows are read on the host, so never call this in a step.
"""

from __future__ import annotations

import math

import torch
from shoplm.kernels.inputs import BeamGroups, PagedKv, RaggedRows
from shoplm.kernels.reference_ops import (
    add_rms_norm,
    beam_step,
    gumbel_noise,
    kv_write,
    quantise_heads,
    quantise_rows,
    rms_norm,
    rotate,
    sample,
    swiglu,
)

__all__ = [
    "add_rms_norm",
    "attend",
    "beam_attention",
    "beam_path",
    "beam_step",
    "dequantise",
    "fork_attention",
    "gather_slots",
    "gumbel_noise",
    "kv_write",
    "merge_splits",
    "paged_attention",
    "quantise_heads",
    "quantise_rows",
    "rms_norm",
    "rotate",
    "row_slots",
    "sample",
    "span_mass",
    "swiglu",
]


def dequantise(stored: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """fp32 values of pool rows [..., head_dim], times their scales [...] if quantised."""
    values = stored.float()
    return values if scale is None else values * scale.float()[..., None]


def gather_slots(kv: PagedKv, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values fp32 [n, kv_heads, head_dim] of pool slots int64 [n]."""
    page, offset = slots // kv.page_size, slots % kv.page_size
    k_scale = None if kv.k_scale is None else kv.k_scale[page, :, offset]
    v_scale = None if kv.v_scale is None else kv.v_scale[page, :, offset]
    return dequantise(kv.k[page, :, offset], k_scale), dequantise(kv.v[page, :, offset], v_scale)


def row_slots(page_table_row: torch.Tensor, kv_len: int, page_size: int) -> torch.Tensor:
    """Pool slots int64 [kv_len] of a row's tokens in order."""
    position = torch.arange(kv_len, device=page_table_row.device)
    return page_table_row[position // page_size].long() * page_size + position % page_size


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention: out [n, q_heads, d], base-2 log-sum-exp [n, q_heads], weights [n, q_heads, keys].

    q [n, q_heads, d], k and v [keys, kv_heads, d], visible bool [n, keys]. A query that sees no key gives 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,khd->nhk", q.float(), k.repeat_interleave(group, 1)) * softmax_scale
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    out = torch.einsum("nhk,khd->nhd", weights, v.repeat_interleave(group, 1))
    return out, torch.logsumexp(scores, -1) * math.log2(math.e), weights


def _visible(query_position: torch.Tensor, key_position: torch.Tensor, window: int | None) -> torch.Tensor:
    distance = query_position[:, None] - key_position[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def paged_attention(
    q: torch.Tensor, kv: PagedKv, rows: RaggedRows, *, softmax_scale: float | None = None, window: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 output [tokens, q_heads, head_dim] and base-2 LSE [tokens, q_heads]; NaN where no row owns the token."""
    scale = 1.0 / math.sqrt(kv.head_dim) if softmax_scale is None else softmax_scale
    out = torch.full(q.shape, math.nan, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], math.nan, dtype=torch.float32, device=q.device)
    starts, lengths = rows.query_start.tolist(), rows.kv_len.tolist()
    for row, kv_len in enumerate(lengths):
        first, last = starts[row], starts[row + 1]
        if last > first:
            k, v = gather_slots(kv, row_slots(rows.page_table[row], kv_len, kv.page_size))
            position = torch.arange(kv_len, device=q.device)
            visible = _visible(position[kv_len - (last - first) :], position, window)
            out[first:last], lse[first:last], _ = attend(q[first:last], k, v, visible, scale)
    return out, lse


def fork_attention(
    q: torch.Tensor,
    kv: PagedKv,
    slots: torch.Tensor,
    readable: torch.Tensor,
    position: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """fp32 output [n, q_heads, head_dim] of one prompt's new tokens, `q` [n, q_heads, head_dim].

    `slots` int64 [kv_len] are the pool slots of all its tokens, `readable` bool [n, kv_len] what each new one reads,
    `position` int [n] where it stands in its fork: of the keys kept at `position - window` and before it reads none.
    """
    scale = 1.0 / math.sqrt(kv.head_dim) if softmax_scale is None else softmax_scale
    k, v = gather_slots(kv, slots)
    if window is not None:
        readable = readable & (torch.arange(len(slots), device=q.device) > position[:, None] - window)
    return attend(q, k, v, readable, scale)[0]


def span_mass(
    q: torch.Tensor,
    kv: PagedKv,
    rows: RaggedRows,
    row_ids: torch.Tensor,
    span_start: torch.Tensor,
    span_end: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """fp32 [explained, kv_heads, spans]: mass of the last new token's attention, mean over each KV head's group."""
    scale = 1.0 / math.sqrt(kv.head_dim) if softmax_scale is None else softmax_scale
    mass = torch.zeros(len(row_ids), kv.kv_heads, span_start.shape[1], device=q.device)
    for index, row in enumerate(row_ids.tolist()):
        first, last, kv_len = int(rows.query_start[row]), int(rows.query_start[row + 1]), int(rows.kv_len[row])
        if last == first:
            continue
        k, v = gather_slots(kv, row_slots(rows.page_table[row], kv_len, kv.page_size))
        position = torch.arange(kv_len, device=q.device)
        _, _, weights = attend(q[last - 1 : last], k, v, _visible(position[-1:], position, window), scale)
        per_head = weights[0].reshape(kv.kv_heads, -1, kv_len).mean(1)
        for span, (start, end) in enumerate(zip(span_start[index].tolist(), span_end[index].tolist(), strict=True)):
            mass[index, :, span] = per_head[:, max(start, 0) : max(end, 0)].sum(-1)
    return mass


def beam_path(beams: BeamGroups, group: int, beam: int, step: int) -> list[int]:
    """Pool slots of a beam's own tokens, oldest first, found by walking the parents."""
    slots: list[int] = []
    for level in range(step, -1, -1):
        slots.append(int(beams.own_slots[group, level, beam]))
        if level:
            beam = int(beams.parents[group, level, beam])
    return slots[::-1]


def beam_attention(
    q: torch.Tensor, kv: PagedKv, beams: BeamGroups, *, softmax_scale: float | None = None, window: int | None = None
) -> torch.Tensor:
    """fp32 output [tokens, q_heads, head_dim]; NaN where no beam owns the token."""
    scale = 1.0 / math.sqrt(kv.head_dim) if softmax_scale is None else softmax_scale
    out = torch.full(q.shape, math.nan, dtype=torch.float32, device=q.device)
    for group in range(beams.groups):
        prompt_len, step, first = int(beams.prompt_len[group]), int(beams.step[group]), int(beams.query_start[group])
        prompt = row_slots(beams.page_table[group], prompt_len, kv.page_size)
        position = torch.arange(prompt_len + step + 1, device=q.device)
        for beam in range(int(beams.width[group])):
            own = torch.tensor(beam_path(beams, group, beam, step), device=q.device)
            k, v = gather_slots(kv, torch.cat([prompt, own]))
            token = slice(first + beam, first + beam + 1)
            out[token], _, _ = attend(q[token], k, v, _visible(position[-1:], position, window), scale)
    return out


def merge_splits(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge normalised outputs [splits, ..., head_dim] with base-2 log-sum-exps [splits, ...] over the splits."""
    merged = torch.logsumexp(lse.double() * math.log(2.0), 0)
    weight = torch.exp(lse.double() * math.log(2.0) - merged).nan_to_num(0.0)
    return (weight[..., None] * out.double()).sum(0).float(), (merged / math.log(2.0)).float()
