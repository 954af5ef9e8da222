"""Attention of an explanation's forks, which do not read some of the keys before them. In torch operations.

    o_i = sum_j p_ij v_j      p_ij = softmax_j(softmax_scale * q_i . k_j)      over the keys j that i may read

Explanations are few beside everything else, and any mask will do here; a kernel of its own would save launches alone.
Nothing waits for the device, and nothing compiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from shoplm.kernels.inputs import PagedKv
from shoplm.kernels.reference import attend, gather_slots


@dataclass(frozen=True, slots=True)
class ForkRow:
    """The tokens `start` .. `end` - 1 of a step: one prompt's. All tensors on the device."""

    start: int
    end: int
    slots: torch.Tensor  # int64 [kv_len]: pool slots of the prompt's tokens
    visible: torch.Tensor  # bool [tokens, kv_len]
    positions: torch.Tensor  # int64 [tokens]: a window goes by them, not by where a token is kept


def fork_attention(
    q: torch.Tensor, kv: PagedKv, row: ForkRow, *, out: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Writes the row's tokens of `out` [tokens, q_heads, head_dim], for `q` of the same shape; returns `out`.

    `window`: number of visible keys counting the token itself; None for all.
    """
    keys, values = gather_slots(kv, row.slots)
    visible = row.visible
    if window is not None:
        visible = visible & (torch.arange(len(keys), device=q.device) > row.positions[:, None] - window)
    found, _, _ = attend(q[row.start : row.end], keys, values, visible, 1.0 / math.sqrt(kv.head_dim))
    out[row.start : row.end] = found.to(out.dtype)
    return out
