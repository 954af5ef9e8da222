"""paged_attention as a whole: any mix of rows in one call, determinism, what a step may not do, and errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import Case, Row, Shape, check_attention, make_beam_case, make_case, poisoned, poisoned_workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from shoplm.kernels import attention
from shoplm.kernels.attention import BeamGroups, PagedKv, RaggedRows, Workspace, beam_attention, paged_attention
from shoplm.kernels.tile_config import MAX_WIDE_SPLITS, SHORT_ROWS


def run(case: Case, *, window: int | None = None) -> None:
    paged_attention(
        case.q, case.kv, case.rows, out=case.out, workspace=case.workspace, window=window, lse=case.lse
    )  # fmt: skip


MIXED: list[Row] = [(1, 1), (70, 70), (1, 33), (0, 0), (4, 90), (0, 12), (20, 150), (1, 16), (2, 2)]


@pytest.mark.parametrize(
    ("group", "page_size"), [(1, 16), (3, 32), (4, 64), (7, 16), (8, 32), (16, 64), (1, 64), (16, 16)]
)
def test_mixed_step(group: int, page_size: int) -> None:
    """Decode rows, short chunks, long chunks and empty rows in one call, every group and page size."""
    case = make_case(Shape(64, group, 1, page_size), MIXED)
    run(case)
    check_attention(case)


def test_the_largest_group_has_no_short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens of 64 heads are a long chunk: the launch of short ones would compute single tokens again."""
    classes: list[int] = []
    launch = attention.split_attention

    def counted(*arguments: Any, **keywords: Any) -> None:
        classes.append(arguments[4].out.shape[3])
        launch(*arguments, **keywords)

    monkeypatch.setattr(attention, "split_attention", counted)
    for group in (32, 64):
        case = make_case(Shape(64, group, 1, 16), [(1, 20), (2, 9), (0, 0)])
        run(case)
        check_attention(case)
    assert classes == [32, SHORT_ROWS, 64]


@pytest.mark.parametrize(
    "shape",
    [
        Shape(96, 4, 1, 32, torch.float16),
        Shape(128, 3, 1, 16, torch.float16, torch.int8),
        Shape(256, 7, 1, 64, torch.float16, torch.float8_e4m3fn),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 40])
def test_mixed_step_types(shape: Shape, window: int | None) -> None:
    """fp16 and quantised pools, with and without a window."""
    case = make_case(shape, MIXED)
    run(case, window=window)
    check_attention(case, window=window)


def test_long_rows_split_and_merge() -> None:
    """The real split lengths: a decode row of 3 splits, a short chunk of 2, next to short ones."""
    case = make_case(Shape(64, 2, 1, 64, torch.float16), [(1, 1100), (3, 1500), (1, 512), (1, 513)])
    run(case)
    check_attention(case)


ROW = st.tuples(st.one_of(st.integers(0, 3), st.integers(0, 90)), st.integers(0, 120))


@settings(max_examples=12, derandomize=True)
@given(
    rows=st.lists(ROW, min_size=1, max_size=5),
    group=st.sampled_from([1, 3, 4, 7, 8, 16]),
    page_size=st.sampled_from([16, 32, 64]),
    window=st.sampled_from([None, 1, 50]),
)
def test_any_mix(rows: list[tuple[int, int]], group: int, page_size: int, window: int | None) -> None:
    """Any new tokens and cached prefix per row."""
    case = make_case(Shape(64, group, 1, page_size), [(new, new + cached) for new, cached in rows])
    run(case, window=window)
    check_attention(case, window=window)


def one_row(case: Case, row: int) -> Case:
    """The same row alone in a step: same pool, its own queries and page table."""
    first, last = case.rows.query_start[row : row + 2].tolist()
    kv_len = int(case.rows.kv_len[row])
    q = case.q[first:last].clone()
    rows = RaggedRows(
        page_table=case.rows.page_table[row : row + 1].clone(), kv_len=case.rows.kv_len[row : row + 1].clone(),
        query_start=torch.tensor([0, last - first], dtype=torch.int32), max_query_len=last - first, max_kv_len=kv_len,
    )  # fmt: skip
    workspace = poisoned_workspace(case.shape, rows=1, kv_len=kv_len)
    return Case(case.shape, q, case.kv, rows, poisoned(q), torch.full(q.shape[:2], math.nan), workspace)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit: each row alone, with tight bounds, equals the row in a mixed step with loose ones."""
    mixed = make_case(
        Shape(64, 4, 1, 16, torch.float16), [(1, 600), (70, 130), (3, 40), (1, 17), (16, 1100)], slack=700
    )
    run(mixed)
    starts = mixed.rows.query_start.tolist()
    for row, (first, last) in enumerate(pairwise(starts)):
        alone = one_row(mixed, row)
        run(alone)
        assert torch.equal(alone.out, mixed.out[first:last]), f"row {row}"
        assert torch.equal(alone.lse, mixed.lse[first:last]), f"row {row}"


@pytest.mark.parametrize(
    ("rows", "launches"),
    [
        ([(1, 600), (1, 3)], ["split", "merge"]),
        ([(5, 1100), (1, 3), (16, 16)], ["split", "merge", "split", "merge"]),
        ([(16, 1100), (0, 3)], ["split", "merge"]),
        ([(17, 1100)], ["prefill"]),
        ([(1, 600), (70, 130)], ["split", "merge", "prefill"]),
        ([(1, 600), (2, 9), (70, 1030)], ["split", "merge", "split", "merge", "prefill"]),
    ],
)
def test_kernels_that_no_row_needs_are_left_out(
    rows: list[Row], launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else changes, to the last bit."""
    case = make_case(Shape(64, 4, 1, 16, torch.float16), rows)
    run(case)
    launched: list[str] = []
    for name in ("split_attention", "merge_splits", "prefill_attention"):
        kernel = getattr(attention, name)

        def recorded(*arguments: Any, name: str = name, kernel: Any = kernel, **options: Any) -> None:
            launched.append(name.split("_")[0] if name != "merge_splits" else "merge")
            kernel(*arguments, **options)

        monkeypatch.setattr(attention, name, recorded)
    known = dataclasses.replace(case.rows, query_lens=frozenset(new for new, _ in rows))
    spared = dataclasses.replace(case, rows=known, out=poisoned(case.q), lse=torch.full(case.q.shape[:2], math.nan))
    run(spared)
    assert launched == launches
    assert torch.equal(spared.out.nan_to_num(7.0), case.out.nan_to_num(7.0))
    assert torch.equal(spared.lse.nan_to_num(7.0), case.lse.nan_to_num(7.0))


def test_a_chunked_prompt_equals_the_whole() -> None:
    """Chunks of any size over the same pool: the last chunk's tokens match those of one pass."""
    whole = make_case(Shape(64, 4, 1, 16), [(120, 120)])
    run(whole)
    for size in (1, 3, 16, 50):
        rows = dataclasses.replace(
            whole.rows, query_start=torch.tensor([0, size], dtype=torch.int32), max_query_len=size
        )
        q = whole.q[120 - size : 120].clone()
        chunk = dataclasses.replace(whole, q=q, rows=rows, out=poisoned(q), lse=torch.full(q.shape[:2], math.nan))
        run(chunk)
        torch.testing.assert_close(chunk.out, whole.out[120 - size : 120], rtol=0, atol=2e-6)


def test_queries_and_outputs_may_be_views_of_a_fused_projection() -> None:
    """A token stride other than heads * head_dim."""
    case = make_case(Shape(64, 4, 2, 16), [(1, 20), (3, 9)])
    fused = torch.randn(len(case.q), (case.shape.q_heads + 2 * case.shape.kv_heads) * 64)
    q = fused[:, : case.shape.q_heads * 64].view(len(fused), case.shape.q_heads, 64)
    q.copy_(case.q)
    wide_out = torch.full((len(q), case.shape.q_heads + 3, 64), math.nan)
    view = dataclasses.replace(case, q=q, out=wide_out[:, : case.shape.q_heads])
    run(view)
    check_attention(view)
    assert wide_out[:, case.shape.q_heads :].isnan().all()


def test_rows_may_start_late_in_the_batch() -> None:
    """Tokens before the first row belong to somebody else (beams, say) and are left alone."""
    case = make_case(Shape(64, 4, 1, 16), [(1, 20), (70, 80), (5, 30)])
    run(case)
    ahead = 40
    q = torch.cat([torch.randn(ahead, *case.q.shape[1:]), case.q])
    rows = dataclasses.replace(case.rows, query_start=case.rows.query_start + ahead)
    late = dataclasses.replace(case, q=q, rows=rows, out=poisoned(q), lse=torch.full(q.shape[:2], math.nan))
    run(late)
    assert late.out[:ahead].isnan().all() and late.lse[:ahead].isnan().all()
    assert torch.equal(late.out[ahead : ahead + case.tokens], case.out[: case.tokens])


def test_empty_step() -> None:
    """No rows, or rows without new tokens: nothing is launched, nothing written."""
    for rows in ([], [(0, 0), (0, 40)]):
        case = make_case(Shape(), rows)
        run(case)
        assert case.out.isnan().all()


@pytest.fixture(scope="module")
def recording(launches_of: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return launches_of("launch_recorder.py")


def test_other_lengths_compile_nothing(recording: dict[str, Any]) -> None:
    """Steps with other rows, lengths, widths and bounds need no kernel that the first step had not compiled."""
    assert recording["control"]["specialisations"] == 3, "the recorder must see a counter that is specialised"
    assert len(recording["steps"]["first"]) == 14
    assert recording["steps"]["new"] == []


def test_a_step_neither_allocates_nor_waits(recording: dict[str, Any]) -> None:
    """No torch operator runs inside the ops: no allocation, no copy, no read of a device value."""
    assert recording["control"]["operators"] == ["aten.empty.memory_format"]
    assert recording["steps"]["operators"] == []


def test_budget_cells_are_what_the_launchers_compile(recording: dict[str, Any]) -> None:
    """Signature, constants, alignment, warps and stages of every representative budget cell at sm_90."""
    assert recording["cell_mismatches"] == []


def valid_arguments() -> dict[str, Any]:
    case = make_case(Shape(64, 4, 2, 16), [(1, 20), (3, 9)])
    return {"q": case.q, "kv": case.kv, "rows": case.rows, "out": case.out, "workspace": case.workspace}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("q", torch.zeros(7, 8, 96), r"^q has shape \[7, 8, 96\]"),
        ("q", torch.zeros(7, 5, 64), r"^q has 5 heads"),
        ("q", torch.zeros(7, 8, 64, dtype=torch.float16), "^q is torch.float16 but the KV pool is torch.float32"),
        ("q", torch.zeros(7, 64, 8).transpose(1, 2), "^q has last stride"),
        ("q", torch.zeros(7 * 8 * 64 + 1)[1:].view(7, 8, 64), "^q starts at address"),
        ("q", torch.zeros(7, 8 * 64 + 8)[:, : 8 * 64].view(7, 8, 64), "^q has token stride 520"),
        ("q", torch.zeros(7, 8, 128)[:, :, :64], "^q has head stride 128"),
        ("out", torch.zeros(6, 8, 64), r"^out has shape \[6, 8, 64\]"),
        ("out", torch.zeros(7, 8, 64, dtype=torch.float16), "^out is torch.float16"),
        ("lse", torch.zeros(7, 7), r"^lse has shape \[7, 7\]"),
        ("window", 0, "^window must be at least 1"),
        ("softmax_scale", -0.5, "^softmax_scale must be positive"),
        ("workspace", poisoned_workspace(Shape(64, 4, 2), rows=1, kv_len=20), "^workspace.decode has room for 1 rows"),
        ("workspace", poisoned_workspace(Shape(64, 2, 2), rows=2, kv_len=20), "^workspace.decode is for"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(field: str, value: Any, message: str) -> None:
    """A wrong argument is refused with its name and value before anything is launched."""
    arguments = valid_arguments() | {field: value}
    out = arguments["out"]
    with pytest.raises((ValueError, TypeError), match=message):
        paged_attention(**arguments)
    assert out.isnan().all() or field == "out"


def test_workspace_must_cover_the_longest_row() -> None:
    """Too few splits for the bound on kv_len, which the page table's width caps."""
    case = make_case(Shape(64, 4, 1, 64), [(1, 1100)])
    small = poisoned_workspace(case.shape, rows=1, kv_len=512)
    with pytest.raises(
        ValueError, match=r"^workspace.decode has room for 1 rows of 1 splits, expected at least 1 of 3"
    ):
        paged_attention(case.q, case.kv, case.rows, out=case.out, workspace=small)


def pool(**changes: Any) -> dict[str, Any]:
    size = (3, 2, 16, 64)
    return {"k": torch.zeros(size), "v": torch.zeros(size)} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(3, 2, 8, 64), "v": torch.zeros(3, 2, 8, 64)}, r"^page_size .* got 8"),
        ({"k": torch.zeros(3, 2, 16, 80), "v": torch.zeros(3, 2, 16, 80)}, r"^head_dim .* got 80"),
        ({"v": torch.zeros(3, 2, 16, 128)}, r"^v has shape"),
        ({"v": torch.zeros(3, 2, 16, 64, dtype=torch.float16)}, r"^v is torch.float16"),
        ({"k": torch.zeros(3, 16, 2, 64).transpose(1, 2)}, r"^k has strides"),
        ({"k_scale": torch.zeros(3, 2, 16)}, r"^k_scale must be given for, and only for"),
        ({name: torch.zeros(3, 2, 16, 64, dtype=torch.int8) for name in "kv"}, r"^k_scale must be given"),
        ({"k": torch.zeros(3, 2, 16, 64, dtype=torch.float64)}, r"^k is torch.float64"),
    ],
)
def test_pool_errors(changes: dict[str, Any], message: str) -> None:
    """The pool is validated when it is made."""
    with pytest.raises((ValueError, TypeError), match=message):
        PagedKv(**pool(**changes))


def test_row_and_beam_errors() -> None:
    """Rows and groups are validated when they are made, once per step."""
    case = make_case(Shape(), [(1, 3), (2, 9)])
    with pytest.raises(TypeError, match=r"^kv_len is torch.int64"):
        dataclasses.replace(case.rows, kv_len=case.rows.kv_len.long())
    with pytest.raises(ValueError, match=r"^query_start has shape \[2\], expected \[3\]"):
        dataclasses.replace(case.rows, query_start=case.rows.query_start[:2])
    with pytest.raises(ValueError, match=r"^max_query_len must not be negative, got -1"):
        dataclasses.replace(case.rows, max_query_len=-1)
    with pytest.raises(ValueError, match=r"^query_lens go up to 3, but max_query_len is 2"):
        dataclasses.replace(case.rows, query_lens=frozenset((1, 3)))
    beams: BeamGroups = make_beam_case(Shape(), [(9, 2, 1)]).beams
    with pytest.raises(TypeError, match=r"^own_slots is torch.int32"):
        dataclasses.replace(beams, own_slots=beams.own_slots.int())
    with pytest.raises(ValueError, match=r"^parents has shape"):
        dataclasses.replace(beams, parents=beams.parents[:, :1].contiguous())


def test_beam_workspace_must_cover_the_tokens() -> None:
    """One slot per token handed to the op."""
    case = make_beam_case(Shape(), [(9, 2, 1)])
    small = poisoned_workspace(case.shape, beams=len(case.q) - 1)
    with pytest.raises(ValueError, match=r"^workspace.beam has room for"):
        beam_attention(case.q, case.kv, case.beams, out=case.out, workspace=small)


def test_workspace_bytes_follow_the_documented_formula() -> None:
    """What the server subtracts before it sizes the KV pool."""
    workspace = Workspace.allocate(
        device=torch.device("cpu"),
        max_rows=8,
        max_kv_len=4096,
        max_beam_tokens=64,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
    )
    rows = 8 * 32 * (4096 // 512) + MAX_WIDE_SPLITS * 64 * 32 + 8 * 8 * MAX_WIDE_SPLITS * SHORT_ROWS
    assert 0 <= workspace.nbytes - 4 * 128 * rows < 0.01 * workspace.nbytes
