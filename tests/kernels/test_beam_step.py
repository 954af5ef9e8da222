"""beam_step under the interpreter against its specification, on tries of every shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from shoplm.kernels import reference_ops
from shoplm.kernels.beam_step import beam_step
from shoplm.kernels.beam_step_types import BeamBounds, BeamSelection, BeamWorkspace, TrieTables, allowed_prefix

# numpy warns where masked-off lanes and the -inf cases compute what a select then drops; a GPU does so in silence.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")

TILE = 64  # small tiles: many of them, and merge rounds, at shapes that the interpreter can afford


@dataclasses.dataclass(frozen=True)
class Case:
    """One call's tensors."""

    logits: torch.Tensor
    first_row: torch.Tensor
    trie: TrieTables
    nodes: torch.Tensor
    scores: torch.Tensor
    width: torch.Tensor
    select: torch.Tensor

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def make_trie(child_counts: list[int], codes: int, generator: torch.Generator, items_per_child: int = 3) -> TrieTables:
    """One level: node n has `child_counts[n]` children with ascending codes and up to `items_per_child` items each."""
    counts = torch.tensor(child_counts)
    code = [torch.randperm(codes, generator=generator)[:count].sort().values for count in child_counts]
    children = int(counts.sum())
    items = torch.randint(1, items_per_child + 1, (children,), generator=generator)
    item_hi = items.cumsum(0)
    start = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))
    return TrieTables.build(start.int(), torch.cat(code).int(), (item_hi - items).int(), item_hi.int())


def make_case(
    trie: TrieTables,
    widths: list[int],
    max_live: int,
    select: list[int],
    codes: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Random beams on distinct nodes; poison wherever the op must not look."""
    groups, nodes_of_level = len(widths), trie.child_start.shape[0] - 1
    nodes = torch.full((groups, max_live), 2**30, dtype=torch.int32)
    scores = torch.full((groups, max_live), float("nan"))
    for group, width in enumerate(widths):
        nodes[group, :width] = torch.randperm(nodes_of_level, generator=generator)[:width].int()
        scores[group, :width] = -torch.rand(width, generator=generator).cumsum(0)
    first_row = torch.tensor(widths).cumsum(0) - torch.tensor(widths)
    logits = torch.full((max(1, sum(widths)), codes + 3), float("nan"), dtype=dtype)[:, :codes]
    logits.copy_(torch.randn(logits.shape, generator=generator) * 3)
    return Case(
        logits,
        first_row.int(),
        trie,
        nodes,
        scores,
        torch.tensor(widths, dtype=torch.int32),
        torch.tensor(select, dtype=torch.int32),
    )


def poisoned(groups: int, max_select: int) -> BeamSelection:
    out = BeamSelection.allocate(groups, max_select, "cpu")
    for field in dataclasses.fields(out):
        getattr(out, field.name).fill_(-77)
    return out


def assert_matches(
    case: Case, max_select: int, allowed: torch.Tensor | None = None, filter_row: torch.Tensor | None = None
) -> BeamSelection:
    """Run op and specification and compare everything they return."""
    cumsum = None if allowed is None else allowed_prefix(allowed)
    keywords: dict[str, Any] = {"max_select": max_select, "allowed_cumsum": cumsum, "filter_row": filter_row}
    want = reference_ops.beam_step(*case.arguments(), **keywords)
    got = beam_step(*case.arguments(), **keywords, out=poisoned(len(case.width), max_select), tile=TILE)
    torch.testing.assert_close(got.width, want.width)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-5, atol=1e-5)
    for name in ("parents", "nodes", "codes"):
        assert getattr(got, name).tolist() == getattr(want, name).tolist(), name
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("items", [1, TILE - 1, TILE, TILE + 1, 600, 2300])
def test_flat_catalogue(items: int, dtype: torch.dtype) -> None:
    """Depth 1: one live beam whose children are all items, through up to four merge rounds."""
    generator = torch.Generator().manual_seed(items)
    trie = make_trie([items], items, generator, items_per_child=1)
    # Distinct logits: in fp16 random ones collide, and equal logits have a test of their own.
    case = make_case(trie, [1], 1, [24], items, generator, dtype)
    if dtype == torch.float16:
        case.logits.copy_(torch.randperm(items, generator=generator) / 64 - 20)
    assert_matches(case, max_select=24)


def test_flat_catalogue_with_the_real_tile() -> None:
    items, select = 20_000, 256
    generator = torch.Generator().manual_seed(5)
    case = make_case(make_trie([items], items, generator, items_per_child=1), [1], 1, [select], items, generator)
    case.logits.copy_(torch.randperm(items, generator=generator) / 1024)
    want = reference_ops.beam_step(*case.arguments(), max_select=select)
    got = beam_step(*case.arguments(), max_select=select)
    assert got.nodes.tolist() == want.nodes.tolist()
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, derandomize=True)
@given(data=st.data())
def test_mixed_groups_on_a_deep_level(data: st.DataObject) -> None:
    """Widths from 0 up, skewed child counts (leaves included), filters that may forbid everything."""
    seed = data.draw(st.integers(0, 2**20), label="seed")
    generator = torch.Generator().manual_seed(seed)
    child_counts = data.draw(st.lists(st.sampled_from([0, 1, 2, 7, 30, 64, 65]), min_size=3, max_size=12))
    codes = data.draw(st.integers(max(1, *child_counts), 90))
    if not any(child_counts):
        child_counts[-1] = 1
    trie = make_trie(child_counts, codes, generator)
    max_live = data.draw(st.integers(1, len(child_counts)))
    widths = data.draw(st.lists(st.integers(0, max_live), min_size=1, max_size=4))
    max_select = data.draw(st.sampled_from([1, 2, 5, 16, 32]))
    select = [data.draw(st.integers(1, max_select)) for _ in widths]
    case = make_case(trie, widths, max_live, select, codes, generator)
    if data.draw(st.booleans(), label="filtered"):
        share = data.draw(st.sampled_from([0.0, 0.1, 0.9]), label="share allowed")
        allowed = torch.rand(3, int(trie.item_hi[-1]), generator=generator) < share
        filter_row = torch.randint(0, 3, (len(widths),), generator=generator, dtype=torch.int32)
        assert_matches(case, max_select, allowed, filter_row)
    else:
        assert_matches(case, max_select)


def test_ties_go_to_the_lower_beam_and_child() -> None:
    generator = torch.Generator().manual_seed(0)
    trie = make_trie([40, 40, 40], 40, generator)
    case = make_case(trie, [3], 3, [32], 40, generator)
    case.nodes[0] = torch.tensor([2, 0, 1])
    case.scores.zero_()
    case.logits.zero_()
    case.logits[:, 7] = -0.0  # equal to 0.0, so it must not lose the tie
    got = assert_matches(case, 32)
    assert got.parents[0].tolist() == [0] * 32
    assert got.nodes[0].tolist() == list(range(80, 112))


def test_fewer_candidates_than_beams_leave_marked_places() -> None:
    generator = torch.Generator().manual_seed(1)
    case = make_case(make_trie([2, 1], 8, generator), [2, 0], 2, [9, 9], 8, generator)
    got = assert_matches(case, 16)
    assert got.width.tolist() == [3, 0]
    assert torch.isneginf(got.scores[0, 3:]).all() and torch.isneginf(got.scores[1]).all()


def test_filter_does_not_change_the_scores_of_what_it_leaves() -> None:
    generator = torch.Generator().manual_seed(2)
    trie = make_trie([50], 50, generator)
    case = make_case(trie, [1], 1, [32], 50, generator)
    allowed = torch.zeros(1, int(trie.item_hi[-1]), dtype=torch.bool)
    allowed[0, int(trie.item_hi[10]) - 1] = True
    allowed[0, int(trie.item_lo[20])] = True
    got = assert_matches(case, 32, allowed, torch.zeros(1, dtype=torch.int32))
    free = reference_ops.beam_step(*case.arguments(), max_select=50)
    scores = dict(zip(free.nodes[0].tolist(), free.scores[0].tolist(), strict=True))
    assert sorted(got.nodes[0, :2].tolist()) == [10, 20]
    assert got.scores[0, :2].tolist() == pytest.approx([scores[node] for node in got.nodes[0, :2].tolist()], abs=1e-5)


@pytest.mark.parametrize("filtered", [False, True])
def test_the_last_level_is_cut_by_the_whole_score(filtered: bool) -> None:
    """Items whose model score alone would not pass the cut: their other terms carry them over it, group by group."""
    generator = torch.Generator().manual_seed(9)
    trie = make_trie([70, 90], 90, generator, items_per_child=1)
    case = make_case(trie, [2, 1, 2], 2, [12, 5, 12], 90, generator)
    bonus = torch.randn(2, trie.items + 3, generator=generator)[:, : trie.items] * 4
    keywords: dict[str, Any] = {"bonus": bonus, "bonus_row": torch.tensor([1, 0, 0], dtype=torch.int32)}
    if filtered:
        allowed = torch.rand(1, trie.items, generator=generator) < 0.5
        keywords |= {"allowed_cumsum": allowed_prefix(allowed), "filter_row": torch.zeros(3, dtype=torch.int32)}
    want = reference_ops.beam_step(*case.arguments(), max_select=12, **keywords)
    got = beam_step(*case.arguments(), max_select=12, **keywords, tile=TILE)
    assert got.nodes.tolist() == want.nodes.tolist()
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-5, atol=1e-5)
    without = beam_step(*case.arguments(), max_select=12, tile=TILE)
    assert set(got.nodes[0].tolist()) != set(without.nodes[0].tolist())


def test_logits_of_minus_infinity_come_last_and_never_nan() -> None:
    generator = torch.Generator().manual_seed(3)
    case = make_case(make_trie([10, 10], 10, generator), [2], 2, [20], 10, generator)
    case.logits[0] = float("-inf")
    case.logits[1, 3] = float("-inf")
    got = assert_matches(case, 20)
    assert not got.scores.isnan().any()
    assert got.parents[0, :9].tolist() == [1] * 9


def test_result_does_not_depend_on_the_other_groups() -> None:
    """Bit for bit, also when a workspace made for larger steps is reused."""
    generator = torch.Generator().manual_seed(4)
    trie = make_trie([70, 3, 65, 20], 90, generator)
    case = make_case(trie, [4, 2, 3], 4, [30, 30, 30], 90, generator)
    workspace = BeamWorkspace.allocate(BeamBounds.of(trie, 6, 8, 32, TILE), "cpu")
    for tensor in (workspace.partial_max, workspace.partial_sum, workspace.lse):
        tensor.fill_(float("nan"))
    for tensor in (*workspace.keys, *workspace.indices, workspace.offsets, workspace.shift):
        tensor.fill_(2**30)
    together = beam_step(*case.arguments(), max_select=30, workspace=workspace, tile=TILE)
    for group in range(3):
        alone = dataclasses.replace(
            case,
            **{
                name: getattr(case, name)[group : group + 1]
                for name in ("first_row", "nodes", "scores", "width", "select")
            },
        )
        single = beam_step(*alone.arguments(), max_select=30, tile=TILE)
        for field in dataclasses.fields(single):
            assert torch.equal(getattr(single, field.name)[0], getattr(together, field.name)[group]), field.name


def level_of(paths: list[tuple[int, ...]], depth: int) -> TrieTables:
    """Tables from the nodes of `depth` to their children; `paths` sorted and distinct."""
    parents = sorted({path[:depth] for path in paths})
    children = sorted({path[: depth + 1] for path in paths})
    below = [[row for row, path in enumerate(paths) if path[: depth + 1] == child] for child in children]
    starts = [sum(child[:-1] < parent for child in children) for parent in parents]
    return TrieTables.build(
        torch.tensor([*starts, len(children)], dtype=torch.int32),
        torch.tensor([child[-1] for child in children], dtype=torch.int32),
        torch.tensor([rows[0] for rows in below], dtype=torch.int32),
        torch.tensor([rows[-1] + 1 for rows in below], dtype=torch.int32),
    )


def test_three_levels_find_the_best_items() -> None:
    """A search as wide as the catalogue is exhaustive: items come out by their full path probability."""
    generator = torch.Generator().manual_seed(6)
    codes = 5
    paths = sorted({tuple(torch.randint(0, codes, (3,), generator=generator).tolist()) for _ in range(60)})
    prefixes = [prefix for depth in range(4) for prefix in sorted({path[:depth] for path in paths})]
    # Each level has its own columns, so that one product serves beams of any level.
    trie = TrieTables.stack([level_of(paths, depth) for depth in range(3)], [0, codes, 2 * codes])
    nodes = torch.zeros(1, 1, dtype=torch.int32)
    scores, width = torch.zeros(1, 1), torch.ones(1, dtype=torch.int32)
    select, first_row = torch.tensor([32], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    found = {0: 0.0}
    for _ in range(3):
        logits = torch.randn(32, 3 * codes, generator=generator)
        step = beam_step(logits, first_row, trie, nodes, scores, width, select, max_select=32, tile=TILE)
        found = {
            child: score + torch.log_softmax(logits[beam, trie.child_code[first:last].long()], 0)[child - first].item()
            for beam, (node, score) in enumerate(zip(nodes[0].tolist(), scores[0].tolist(), strict=True))
            if beam < int(width)
            for first, last in [(int(trie.child_start[node]), int(trie.child_start[node + 1]))]
            for child in range(first, last)
        }
        nodes, scores, width = step.nodes, step.scores, step.width
        best = sorted(found, key=lambda child: -found[child])[:32]
        assert nodes[0, : int(width)].tolist() == best
        # What lies below a node are the items whose path begins with it.
        for node in nodes[0, : int(width)].tolist():
            below = paths[int(trie.item_lo[node]) : int(trie.item_hi[node])]
            assert below == [path for path in paths if path[: len(prefixes[node])] == prefixes[node]]
    assert {len(prefixes[node]) for node in nodes[0, : int(width)].tolist()} == {3}


def test_groups_at_different_levels_share_a_step() -> None:
    """One at the root, one at a leaf's parent, one at a leaf, which has no children."""
    generator = torch.Generator().manual_seed(8)
    paths = sorted({tuple(torch.randint(0, 4, (2,), generator=generator).tolist()) for _ in range(12)})
    trie = TrieTables.stack([level_of(paths, 0), level_of(paths, 1)], [0, 4])
    case = Case(
        torch.randn(3, 8, generator=generator),
        torch.arange(3, dtype=torch.int32),
        trie,
        torch.tensor([[0], [1], [trie.child_code.shape[0] - 1]], dtype=torch.int32),
        torch.zeros(3, 1),
        torch.ones(3, dtype=torch.int32),
        torch.full((3,), 8, dtype=torch.int32),
    )
    got = assert_matches(case, 8)
    assert got.width.tolist() == [len({path[0] for path in paths}), sum(path[0] == paths[0][0] for path in paths), 0]
    assert (got.codes[0, : got.width[0]] < 4).all() and (got.codes[1, : got.width[1]] >= 4).all()


def test_a_million_items_take_two_cuts() -> None:
    bounds = BeamBounds(groups=1, max_live=1, max_select=256, max_children=10**6, max_candidates=10**6)
    assert (bounds.piece, bounds.pieces, bounds.tiles, bounds.merge_rounds) == (4096, 245, 245, (16,))
    deep = BeamBounds(groups=1, max_live=256, max_select=256, max_children=256, max_candidates=65536)
    assert (deep.piece, deep.pieces, deep.tiles, deep.merge_rounds) == (256, 1, 16, ())


def test_allowed_prefix_counts_items_before() -> None:
    mask = torch.tensor([[True, False, True, True], [False, False, False, True]])
    assert allowed_prefix(mask).tolist() == [[0, 1, 1, 2, 3], [0, 0, 0, 0, 1]]


def test_bad_arguments_are_named() -> None:
    generator = torch.Generator().manual_seed(7)
    trie = make_trie([4, 4], 8, generator)
    case = make_case(trie, [1], 2, [2], 8, generator)
    cases: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
        ({"nodes": case.nodes.long()}, {}, TypeError, "nodes is torch.int64"),
        ({"scores": case.scores[:, :1]}, {}, ValueError, "scores has shape"),
        ({"width": torch.ones(2, dtype=torch.int32)}, {}, ValueError, "width has shape"),
        ({"logits": case.logits[:, :1]}, {}, ValueError, "logits has 1 columns, the trie's codes need"),
        ({"logits": torch.zeros(8, 9).t()}, {}, ValueError, "logits has last stride"),
        ({}, {"max_select": 33}, ValueError, "max_select is 33, expected at most 32"),
        ({}, {"filter_row": torch.zeros(1, dtype=torch.int32)}, ValueError, "pass both or neither"),
        ({}, {"bonus": torch.zeros(1, trie.items)}, ValueError, "one of bonus and bonus_row"),
        ({}, {"out": BeamSelection.allocate(1, 3, "cpu")}, ValueError, "out.scores has shape"),
        (
            {},
            {"workspace": BeamWorkspace.allocate(BeamBounds(1, 1, 1, 1, 1, TILE), "cpu")},
            ValueError,
            "allocate it for the largest bounds",
        ),
    ]
    for changed, keywords, error, message in cases:
        with pytest.raises(error, match=message):
            beam_step(
                *dataclasses.replace(case, **changed).arguments(),
                **{"max_select": 2, "tile": TILE} | keywords,
            )
    with pytest.raises(ValueError, match="max_children is 9"):
        dataclasses.replace(trie, max_children=9)
