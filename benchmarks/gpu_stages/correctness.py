"""Attention on the card against its specification: bf16 and fp16 activations, every pool, real sizes.

The rule is that of the tests: an error against exact arithmetic of at most three times torch's in the same dtype.
"""

from __future__ import annotations

from functools import partial

import torch
from attention_cases import (
    Case,
    Shape,
    check_attention,
    check_beams,
    check_forks,
    make_beam_case,
    make_case,
    make_forks,
)
from attention_cases import Row as Lengths
from shoplm.kernels import reference
from shoplm.kernels.attention import beam_attention, paged_attention
from shoplm.kernels.forks import fork_attention
from shoplm.kernels.span_mass import span_mass

from gpu_stages.common import Stage

BF16, FP16, INT8, FP8 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn

# Every head size, group, page size, dtype and pool at least once; each combination compiles its own kernels.
SHAPES = (
    Shape(64, 3, 3, 16, BF16),
    Shape(64, 7, 2, 64, BF16),
    Shape(64, 1, 4, 32, FP16),
    Shape(96, 4, 2, 32, BF16),
    Shape(128, 2, 8, 16, BF16),
    Shape(128, 8, 2, 64, FP16),
    Shape(128, 16, 1, 32, BF16),
    Shape(256, 4, 2, 32, BF16),
    Shape(64, 3, 3, 16, BF16, INT8),
    Shape(128, 2, 8, 16, BF16, FP8),
    Shape(128, 7, 4, 64, BF16, INT8),
    Shape(256, 1, 2, 16, FP16, FP8),
)


def attention(stage: Stage, part: int = 0, parts: int = 1) -> None:
    """Rows of every kind in one launch, and beams. `part` of `parts`: the shapes' share of one process."""
    torch.set_default_device(stage.device)
    torch.manual_seed(part)
    shapes = (Shape(64, 4, 2, 16),) if stage.smoke else SHAPES
    if part == 0:
        stage.check("the fp32 specification equals fp64", _specification)
    for at in range(part, len(shapes), parts):
        shape, window = shapes[at], 77 if at % 3 == 1 else None
        fp8 = shape.kv_dtype == FP8
        stage.check(f"attention {_name(shape)}", partial(_rows, stage, shape, window), fp8=fp8)
        stage.check(f"beam {_name(shape)}", partial(_beams, stage, shape, window), fp8=fp8)


def _name(shape: Shape) -> str:
    pool = shape.dtype if shape.kv_dtype is None else shape.kv_dtype
    kinds = f"{shape.dtype} {pool}".replace("torch.", "")
    return f"d{shape.head_dim} g{shape.group} p{shape.page_size} {kinds}"


def _specification() -> None:
    """What everything below is measured by: on a card that multiplied fp32 with fewer bits, it would be off itself."""
    case = make_case(Shape(128, 4, 2), [(40, 600), (1, 900)])
    found, lse = reference.paged_attention(case.q, case.kv, case.rows)
    for row, kv_len in enumerate(case.rows.kv_len.tolist()):
        first, last = case.rows.query_start[row : row + 2].tolist()
        keys, values = reference.gather_slots(case.kv, reference.row_slots(case.rows.page_table[row], kv_len, 16))
        keys, values = (part.double().repeat_interleave(4, 1).transpose(0, 1) for part in (keys, values))
        scores = case.q[first:last].double().transpose(0, 1) @ keys.transpose(1, 2) / 128**0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(kv_len - (last - first) + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        want = (scores.softmax(-1) @ values).transpose(0, 1)
        torch.testing.assert_close(found[first:last].double(), want, rtol=0, atol=2e-6)
        want_lse = scores.logsumexp(-1).t() / torch.log(torch.tensor(2.0, dtype=torch.float64))
        torch.testing.assert_close(lse[first:last].double(), want_lse, rtol=0, atol=1e-5)


def _rows(stage: Stage, shape: Shape, window: int | None) -> None:
    """Single tokens over several splits, short chunks, prompts with and without a prefix, empty rows; then the mass of
    spans, and forks."""
    page = shape.page_size
    rows: list[Lengths] = [(1, 1), (1, page), (1, page + 1), (3, 40), (0, 9), (80, 80), (65, 130)]
    if not stage.smoke:
        rows += [(1, 2000), (2, 1500), (300, 1300), (1, 513), (1, 512), (700, 700)]
    case = make_case(shape, rows)
    paged_attention(case.q, case.kv, case.rows, out=case.out, workspace=case.workspace, window=window, lse=case.lse)
    check_attention(case, window=window)
    _spans(case, window)
    _forks(case, window)


def _spans(case: Case, window: int | None) -> None:
    """Products of bf16 and fp16 numbers are exact in fp32, and no weight is rounded: only the sums differ."""
    ids, start, end = (torch.tensor(values, dtype=torch.int32) for values in ([5, 6], [[0, 9]] * 2, [[9, 80]] * 2))
    mass = torch.full((2, case.shape.kv_heads, 2), torch.nan)
    span_mass(case.q, case.kv, case.rows, case.lse, ids, start, end, out=mass, window=window)
    want = reference.span_mass(case.q, case.kv, case.rows, ids, start, end, window=window)
    torch.testing.assert_close(mass, want, rtol=2e-3, atol=1e-6)


def _forks(case: Case, window: int | None) -> None:
    """All rows once more, each token reading a random share of the keys before it."""
    forks, read = make_forks(case, 0.3)
    case.out.fill_(torch.nan)
    fork_attention(case.q, case.kv, forks, out=case.out, window=window)
    check_forks(case, forks, read, window)


def _beams(stage: Stage, shape: Shape, window: int | None) -> None:
    page = shape.page_size
    groups = [(page - 1, 3, 0), (page, 5, 1), (page + 1, 1, 2)]
    if not stage.smoke:
        groups += [(700, 64, 1), (1100, 100, 2), (64, 17, 1)]
    case = make_beam_case(shape, groups)
    beam_attention(case.q, case.kv, case.beams, out=case.out, workspace=case.workspace, window=window)
    check_beams(case, window)
