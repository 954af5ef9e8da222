"""prefill under the interpreter against the reference: every head size, group, page size and KV type."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attention_cases import SHAPES, Case, Shape, check_attention, make_case
from shoplm.kernels.attention import score_scale_of
from shoplm.kernels.prefill import prefill_attention
from shoplm.kernels.tile_config import SHORT_ROWS, TileConfig, tile_config


def run_prefill(case: Case, *, window: int | None = None, tile: TileConfig | None = None) -> None:
    shape = case.shape
    prefill_attention(
        case.q, case.kv, case.rows, case.out,
        tile=tile or tile_config(90, shape.head_dim, shape.dtype, 2 * SHORT_ROWS, case.kv.quantised),
        score_scale=score_scale_of(None, shape.head_dim), window=window, lse=case.lse,
    )  # fmt: skip


def prefill_tokens(case: Case) -> torch.Tensor:
    """bool [tokens]: tokens of rows that this kernel computes."""
    mask = torch.zeros(len(case.q), dtype=torch.bool)
    starts = case.rows.query_start.tolist()
    for first, last in pairwise(starts):
        mask[first:last] = (last - first) * case.shape.group > SHORT_ROWS
    return mask


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape: Shape) -> None:
    """Long rows with and without a cached prefix, page and tile boundaries, and rows left to other kernels."""
    least = SHORT_ROWS // shape.group + 1
    page = shape.page_size
    rows = [
        (least, least),
        (1, 9),
        (least + 5, 2 * page + least + 5),
        (0, 0),
        (least - 1, least + 30),
        (0, 7),
        (70, 3 * page + 71),
    ]
    case = make_case(shape, rows)
    run_prefill(case)
    check_attention(case, mask=prefill_tokens(case))


@pytest.mark.parametrize("window", [1, 5, 33, 64, 200, 1000])
def test_window(window: int) -> None:
    """Windows narrower than a tile, equal to one, and longer than every row."""
    case = make_case(Shape(64, 3, 1, 16), [(50, 190), (23, 23), (90, 100)])
    run_prefill(case, window=window)
    check_attention(case, window=window, mask=prefill_tokens(case))


@pytest.mark.parametrize(
    "tile", [TileConfig(16, 64, 4, 2), TileConfig(64, 32, 4, 3), TileConfig(128, 128, 8, 3)], ids=str
)
@pytest.mark.parametrize("page_size", [16, 64])
def test_any_tile(tile: TileConfig, page_size: int) -> None:
    """A tile is a matter of speed: tiles that straddle tokens, pages and rows all agree with the reference."""
    case = make_case(Shape(64, 7, 1, page_size), [(10, 10), (37, 133), (12, 75)])
    run_prefill(case, tile=tile)
    check_attention(case, mask=prefill_tokens(case))


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_boundaries(offset: int) -> None:
    """Lengths at a page or tile boundary, one less and one more."""
    shape = Shape(64, 4, 1, 32)
    case = make_case(
        shape, [(32 + offset, 32 + offset), (32 + offset, 64 + offset), (17, 128 + offset), (64 + offset, 65)]
    )
    run_prefill(case)
    check_attention(case, mask=prefill_tokens(case))


def test_many_rows_find_their_tiles() -> None:
    """More rows than one block of the search for a tile's owner (128), most of them empty."""
    rows = [(0, 0)] * 130 + [(17, 17)] + [(0, 3)] * 10 + [(18, 30)]
    case = make_case(Shape(64, 4, 1, 16), rows)
    run_prefill(case)
    check_attention(case, mask=prefill_tokens(case))
