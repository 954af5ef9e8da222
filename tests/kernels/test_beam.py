"""beam under the interpreter: shared prompts, parents, ragged widths and steps in one launch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import BeamCase, Shape, check_beams, make_beam_case, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from shoplm.kernels.attention import beam_attention, score_scale_of
from shoplm.kernels.beam import beam_rows
from shoplm.kernels.tile_config import SHORT_ROWS, tile_config


def run_beam(case: BeamCase, *, window: int | None = None, keys_per_split: int | None = None) -> None:
    """The public op, or its launcher with short splits."""
    if keys_per_split is None:
        beam_attention(case.q, case.kv, case.beams, out=case.out, workspace=case.workspace, window=window)
        return
    shape = case.shape
    rows = max(SHORT_ROWS, case.beams.max_width * shape.group)
    beam_rows(
        case.q, case.kv, case.beams, case.out, case.workspace.beam,
        tile=tile_config(90, shape.head_dim, shape.dtype, rows, case.kv.quantised), keys_per_split=keys_per_split,
        score_scale=score_scale_of(None, shape.head_dim), window=window,
    )  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 1, 2, 16),
        Shape(64, 3, 1, 32),
        Shape(96, 4, 1, 64),
        Shape(96, 7, 1, 16),
        Shape(128, 8, 1, 32),
        Shape(256, 16, 1, 16),
        Shape(128, 2, 2, 16, torch.float32, torch.int8),
        Shape(64, 2, 1, 64, torch.float32, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_equals_reference(shape: Shape) -> None:
    """Groups with their own prompt length, width and step, around page and split boundaries."""
    page = shape.page_size
    groups = [(page - 1, 3, 0), (page, 5, 1), (page + 1, 1, 2), (130, 9, 2), (64, 4, 1), (200, 2, 0)]
    case = make_beam_case(shape, groups)
    run_beam(case, keys_per_split=64)
    check_beams(case)


def test_half_precision() -> None:
    """fp16: the prompt's weights are rounded to fp16 for the tensor cores, own tokens stay in fp32."""
    case = make_beam_case(Shape(128, 4, 1, 16, torch.float16), [(90, 6, 1), (33, 3, 2)])
    run_beam(case)
    check_beams(case)


def test_empty_prompt_and_padding_groups() -> None:
    """No prompt at all (only own tokens), and groups of width 0 as a captured graph pads them."""
    case = make_beam_case(Shape(64, 4, 1, 16), [(0, 3, 1), (20, 0, 0), (18, 2, 0), (0, 0, 0)])
    run_beam(case)
    check_beams(case)


def test_no_prompt_anywhere_skips_the_prompt_kernel() -> None:
    """An upper bound of 0 prompt tokens launches the reduce alone."""
    case = make_beam_case(Shape(64, 2, 1, 16), [(0, 3, 2), (0, 1, 0)])
    run_beam(case)
    check_beams(case)


@pytest.mark.parametrize("window", [1, 2, 30, 500])
def test_window(window: int) -> None:
    """A window of 1 leaves only the newest own token, 2 its parent as well, 30 the prompt's end."""
    case = make_beam_case(Shape(64, 4, 1, 16), [(200, 3, 2), (17, 4, 1), (64, 2, 0)])
    run_beam(case, window=window, keys_per_split=64)
    check_beams(case, window=window)


def test_wide_group_uses_wide_tiles() -> None:
    """More packed rows than one tile: 40 beams x 4 heads over tiles of 128, first beams beside another group's."""
    case = make_beam_case(Shape(64, 4, 1, 64), [(10, 3, 0), (70, 40, 1), (65, 1, 1)], spare=0, first_token=0)
    run_beam(case)
    check_beams(case)


def test_parents_matter() -> None:
    """Re-parenting one beam changes that beam and no other."""
    case = make_beam_case(Shape(64, 2, 1, 16), [(20, 4, 1)])
    run_beam(case)
    before = case.out.clone()
    start = int(case.beams.query_start[0])
    parents = case.beams.parents.clone()
    parents[0, 1, 2] = (parents[0, 1, 2] + 1) % 4
    changed = dataclasses.replace(case, beams=dataclasses.replace(case.beams, parents=parents), out=poisoned(case.q))
    run_beam(changed)
    check_beams(changed)
    same = [token for token in range(start, start + 4) if torch.equal(changed.out[token], before[token])]
    assert same == [start, start + 1, start + 3]


def test_result_does_not_depend_on_neighbours() -> None:
    """A group alone gives the same bits as in a batch (the tile is chosen by the widest group there may be)."""
    case = make_beam_case(Shape(64, 4, 1, 16), [(90, 3, 1), (200, 7, 2), (31, 5, 0)])
    run_beam(case, keys_per_split=64)
    start, width = int(case.beams.query_start[1]), int(case.beams.width[1])
    beams = case.beams
    alone = dataclasses.replace(
        beams, page_table=beams.page_table[1:2], prompt_len=beams.prompt_len[1:2], query_start=beams.query_start[1:3],
        width=beams.width[1:2], step=beams.step[1:2], own_slots=beams.own_slots[1:2], parents=beams.parents[1:2],
    )  # fmt: skip
    again = dataclasses.replace(case, beams=alone, out=poisoned(case.q))
    run_beam(again, keys_per_split=64)
    assert torch.equal(again.out[start : start + width], case.out[start : start + width])


GROUP = st.tuples(st.integers(0, 150), st.integers(0, 6), st.integers(0, 2))


@settings(max_examples=10, derandomize=True)
@given(
    groups=st.lists(GROUP, min_size=1, max_size=4),
    group=st.sampled_from([1, 3, 4, 7, 8, 16]),
    page_size=st.sampled_from([16, 32, 64]),
    window=st.sampled_from([None, 1, 40]),
)
def test_any_mix(groups: list[tuple[int, int, int]], group: int, page_size: int, window: int | None) -> None:
    """Any mix of prompt lengths, widths and steps."""
    case = make_beam_case(Shape(64, group, 1, page_size), groups)
    run_beam(case, window=window, keys_per_split=64)
    check_beams(case, window=window)
