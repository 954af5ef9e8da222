"""span_mass under the interpreter: fractions of the last token's attention, without its matrix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import Case, Shape, int32, make_case
from shoplm.kernels import reference
from shoplm.kernels.span_mass import span_mass


def run_span_mass(
    case: Case, row_ids: torch.Tensor, start: torch.Tensor, end: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """The op on the reference's log-sum-exps, so that a fault in the attention kernels cannot hide one here."""
    _, lse = reference.paged_attention(case.q, case.kv, case.rows, window=window)
    out = torch.full((len(row_ids), case.shape.kv_heads, start.shape[1]), math.nan)
    return span_mass(case.q, case.kv, case.rows, lse, row_ids, start, end, out=out, window=window)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 1, 2, 16),
        Shape(96, 3, 1, 32),
        Shape(128, 4, 2, 64),
        Shape(64, 7, 1, 16, torch.float16),
        Shape(256, 16, 1, 32, torch.float16),
        Shape(64, 8, 1, 16, torch.float16, torch.int8),
        Shape(64, 8, 1, 16, torch.float16, torch.float8_e4m3fn),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 40])
def test_equals_reference(shape: Shape, window: int | None) -> None:
    """Spans at and across page and tile boundaries, overlapping, empty, reversed and reaching past the end."""
    case = make_case(shape, [(3, 150), (1, 1), (5, 64), (0, 10)])
    row_ids = int32([0, 2, 1, 3])
    spans = [(0, 150), (0, 64), (63, 65), (64, 64), (90, 20), (140, 999)]
    start = int32([first for first, _ in spans]).repeat(4, 1).contiguous()
    end = int32([last for _, last in spans]).repeat(4, 1).contiguous()
    mass = run_span_mass(case, row_ids, start, end, window)
    expected = reference.span_mass(case.q, case.kv, case.rows, row_ids, start, end, window=window)
    torch.testing.assert_close(mass, expected, rtol=2e-3 if shape.dtype == torch.float16 else 1e-5, atol=1e-6)
    assert (mass[3] == 0).all(), "a row without new tokens has no last token"


def test_a_partition_sums_to_one() -> None:
    """Spans that cover the prompt once share all of the mass."""
    case = make_case(Shape(64, 4, 2, 16), [(4, 137)])
    cuts = [0, 1, 16, 40, 64, 100, 136, 137]
    mass = run_span_mass(case, int32([0]), int32(cuts[:-1])[None], int32(cuts[1:])[None])
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2), rtol=1e-5, atol=1e-5)
    assert (mass > 0).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("row_ids", torch.zeros(1, dtype=torch.int64), "row_ids"),
        ("span_end", torch.zeros(1, 2, dtype=torch.int32), "span_end"),
        ("out", torch.zeros(1, 1, 3), "out"),
        ("lse", torch.zeros(7, 4, dtype=torch.float16), "lse"),
    ],
)
def test_errors_name_the_argument(field: str, value: torch.Tensor, message: str) -> None:
    """Wrong dtypes and shapes are refused before anything is launched."""
    case = make_case(Shape(64, 4, 1, 16), [(4, 20)])
    arguments: dict[str, Any] = {
        "lse": torch.zeros(7, 4), "row_ids": int32([0]), "span_start": int32([0])[None], "span_end": int32([4])[None],
        "out": torch.zeros(1, 1, 1),
    } | {field: value}  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=f"^{message} "):
        span_mass(case.q, case.kv, case.rows, **arguments)
