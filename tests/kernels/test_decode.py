"""decode (split KV) under the interpreter: one-token rows and short chunks, with splits short enough to have many."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from attention_cases import Case, Shape, check_attention, make_case
from shoplm.kernels import decode
from shoplm.kernels.attention import score_scale_of
from shoplm.kernels.decode import split_attention
from shoplm.kernels.merge import merge_splits
from shoplm.kernels.tile_config import MAX_WIDE_SPLITS, SHORT_ROWS, tile_config
from shoplm.kernels.workspace import Partials

SPLIT = 64


def run_split(case: Case, *, short: bool, window: int | None = None, keys_per_split: int = SPLIT) -> Partials:
    """Both kernels with splits of `keys_per_split`, as `paged_attention` launches them."""
    shape = case.shape
    packed = SHORT_ROWS if short else shape.group
    splits = MAX_WIDE_SPLITS if short else max(1, -(-case.rows.max_kv_len // keys_per_split))
    cpu = torch.device("cpu")
    partials = Partials.allocate(case.rows.rows, splits, shape.kv_heads, packed, shape.head_dim, cpu)
    partials.out.fill_(float("nan"))
    partials.lse.fill_(float("nan"))
    partials.count.fill_(2**20)
    split_attention(
        case.q, case.kv, case.rows, case.out, partials,
        tile=tile_config(90, shape.head_dim, shape.dtype, packed, case.kv.quantised), keys_per_split=keys_per_split,
        max_splits=MAX_WIDE_SPLITS if short else 0, splits=splits, score_scale=score_scale_of(None, shape.head_dim),
        window=window, lse=case.lse,
    )  # fmt: skip
    merge_splits(partials, case.rows.query_start, case.out, case.lse)
    return partials


def tokens_of(case: Case, *, short: bool) -> torch.Tensor:
    """bool [tokens]: tokens of the rows that the launch computes."""
    mask = torch.zeros(len(case.q), dtype=torch.bool)
    starts = case.rows.query_start.tolist()
    for first, last in pairwise(starts):
        new = last - first
        mask[first:last] = new > 1 and new * case.shape.group <= SHORT_ROWS if short else new == 1
    return mask


SHAPES = [
    Shape(64, 1, 2, 16),
    Shape(96, 3, 1, 32, torch.float16),
    Shape(128, 4, 1, 64),
    Shape(64, 7, 2, 16, torch.float16, torch.int8),
    Shape(256, 8, 1, 32, torch.float16),
    Shape(128, 16, 1, 16, torch.float16, torch.float8_e4m3fn),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_token_rows(shape: Shape) -> None:
    """Lengths 1, around a page, around a split, and many splits; other rows in the launch stay untouched."""
    page = shape.page_size
    lengths = [1, page - 1, page, page + 1, SPLIT - 1, SPLIT, SPLIT + 1, 5 * SPLIT + 3]
    case = make_case(shape, [(1, kv_len) for kv_len in lengths] + [(0, 0), (0, 20), (3, 70)])
    partials = run_split(case, short=False)
    assert partials.count.tolist() == [max(1, -(-kv_len // SPLIT)) for kv_len in lengths] + [0, 0, 0]
    check_attention(case, mask=tokens_of(case, short=False))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_short_chunks(shape: Shape) -> None:
    """Chunks of 2 tokens up to the limit, alone or behind a prefix; splits cut through the causal edge too."""
    most = SHORT_ROWS // shape.group
    rows = [(2, 2), (most, most), (min(3, most), 5 * SPLIT + 1), (most, SPLIT + 1), (1, 30), (most + 1, 90), (0, 0)]
    case = make_case(shape, rows)
    partials = run_split(case, short=True)
    assert partials.count.max() <= MAX_WIDE_SPLITS
    assert partials.count[-3:].tolist() == [0, 0, 0], "rows of other kernels must be marked as not mine"
    check_attention(case, mask=tokens_of(case, short=True))


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("window", [1, 17, 64, 150])
def test_window(short: bool, window: int) -> None:
    """Splits start at the window, so a short window needs one split whatever the length."""
    new = 5 if short else 1
    case = make_case(Shape(64, 4, 1, 16), [(new, new), (new, 64), (new, 65), (new, 400)])
    partials = run_split(case, short=short, window=window)
    if window == 1 and not short:
        assert partials.count.tolist() == [1, 1, 1, 1]
    check_attention(case, window=window, mask=tokens_of(case, short=short))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
@pytest.mark.parametrize("window", [None, 150])
def test_programs_that_walk_over_splits_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, window: int | None, shape: Shape
) -> None:
    """A program for each of up to 15 splits, and two and three programs that walk over them."""
    lengths = [1, SPLIT, SPLIT + 1, 3 * SPLIT, 15 * SPLIT - 7]
    found = []
    monkeypatch.setattr(decode, "WALKING_PROGRAMS", 0)
    for programs in (16, 2, 3):
        monkeypatch.setattr(decode, "MOST_SPLIT_PROGRAMS", programs)
        torch.manual_seed(0)
        case = make_case(shape, [(1, kv_len) for kv_len in lengths])
        partials = run_split(case, short=False, window=window)
        check_attention(case, window=window)
        found.append((case.out.nan_to_num(9.0), case.lse.nan_to_num(9.0), partials.count))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
def test_a_long_row_does_not_multiply_the_programs_of_all(
    monkeypatch: pytest.MonkeyPatch, kv_dtype: torch.dtype | None
) -> None:
    """Few rows have a program for each split that there may be; of many each has 16 per KV head."""
    grids: list[tuple[int, ...]] = []
    walks: list[bool] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_, **keywords: walks.append(keywords["WALKS"])

    monkeypatch.setattr(decode, "_split_kernel", Recorded())
    shape = Shape(64, 1, 8, 16, torch.float16, kv_dtype)
    for rows, splits in ((1, 70), (2, 70), (100, 70), (100, 16)):
        case = make_case(shape, [(1, splits * SPLIT)] + [(1, 1)] * (rows - 1))
        partials = Partials.allocate(rows, splits, shape.kv_heads, 1, 64, torch.device("cpu"))
        decode.split_attention(
            case.q, case.kv, case.rows, case.out, partials, tile=tile_config(90, 64, shape.dtype, 1),
            keys_per_split=SPLIT, max_splits=0, splits=splits, score_scale=1.0, window=None, lse=None,
        )  # fmt: skip
    assert grids == [(70, 8, 1), (70, 8, 2), (16, 8, 100), (16, 8, 100)]
    assert walks == [True, True, True, False]


def test_split_length_follows_the_row_alone() -> None:
    """A short chunk's splits grow with its own length, never with a neighbour's."""
    alone = make_case(Shape(64, 4, 1, 16), [(4, 270)])
    together = make_case(Shape(64, 4, 1, 16), [(4, 270), (4, 900)])
    assert run_split(alone, short=True).count.tolist() == [3]
    assert run_split(together, short=True).count.tolist() == [3, 4]
