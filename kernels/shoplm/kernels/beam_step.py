"""One step of trie-constrained beam search for many groups (requests) of differing width, all on the device.

For a live beam b at trie node n(b), over the children c of n(b) and their logits z(b, c):

    log p(c | b) = z(b, c) - log sum_{c'} exp z(b, c')          over every trie-valid child
    score(b, c)  = score(b) + log p(c | b)                      for children with an allowed item below, else excluded

plus, with `bonus`, the entry of the child's first item: at the last level, where a child is an item, that item's other
terms (repeat purchases, popularity), so that the cut is by the whole score. The group keeps its `select` best (b, c),
best first, ties to the lower (b, c). A catalogue of depth 1 is the case
of one live beam whose node's children are all items. Constrained decoding over a flattened trie follows GENRE (De Cao
et al. 2021) and STATIC's CSR layout; normalising before the filter keeps scores equal whether or not a filter is on.

Work follows the children of live nodes, not the catalogue. The candidates of a group are numbered 0..total-1, beam
after beam, by a prefix sum of child counts, and cut into fixed tiles, so that skewed tries waste nothing:

1. `lse_kernel`    partial log-sum-exp of each (beam, piece of its children)
2. `plan_kernel`   per group: candidate offsets, log-sum-exp of each beam
3. `tile_kernel`   each tile scores its candidates and keeps its own top `select`
4. `merge_kernel`  tiles of survivors keep their top `select`; as often as the bounds ask, seldom more than once
5. `final_kernel`  per group: the last tile's top `select`, sorted, decoded to (parent, node, code)

Cost: two gathers of the live children's logits plus 16 bytes each for the filter; 4 to 6 launches, whose shapes come
from bounds alone (capturable), and a few microseconds each of counting.
"""

from __future__ import annotations

from typing import Any

import torch
from shoplm.kernels._beam_step_kernels import final_kernel, lse_kernel, merge_kernel, plan_kernel, tile_kernel
from shoplm.kernels._checks import ACTIVATION_DTYPES, check_tensor, leading_stride
from shoplm.kernels.aot import AotCell, make_cell, pointer
from shoplm.kernels.beam_step_types import (
    TILE_CANDIDATES,
    BeamBounds,
    BeamSelection,
    BeamWorkspace,
    TrieTables,
    next_power_of_two,
)
from shoplm.kernels.inputs import check_aligned

NUM_WARPS = 8

_RowsOfGroups = tuple[torch.Tensor | None, torch.Tensor | None]  # a table over the items, the row of each group


def beam_step(
    logits: torch.Tensor,
    first_row: torch.Tensor,
    trie: TrieTables,
    nodes: torch.Tensor,
    scores: torch.Tensor,
    width: torch.Tensor,
    select: torch.Tensor,
    *,
    max_select: int,
    allowed_cumsum: torch.Tensor | None = None,
    filter_row: torch.Tensor | None = None,
    bonus: torch.Tensor | None = None,
    bonus_row: torch.Tensor | None = None,
    workspace: BeamWorkspace | None = None,
    out: BeamSelection | None = None,
    tile: int = TILE_CANDIDATES,
) -> BeamSelection:
    """Score the children of every live beam and keep each group's best.

    Args:
        logits: [rows, codes], fp32, fp16 or bf16, rows at any stride. Beam b of group g reads row `first_row[g] + b`.
        first_row: [groups], int32.
        trie: tables on the same device; its codes are columns of `logits`.
        nodes: [groups, max_live], int32, trie node of each beam; the live nodes of a group must be distinct.
        scores: [groups, max_live], fp32, summed natural log probability of each beam (0 at the root).
        width: [groups], int32, live beams: 0 (nothing to do) to max_live. Entries past it are not read.
        select: [groups], int32, beams to keep, 1 to `max_select`.
        max_select: most beams that any group keeps, up to 1024.
        allowed_cumsum: [filters, items + 1], int32: entry i = allowed items before item i, over the sorted items (see
            `allowed_prefix`). None: every item is allowed.
        filter_row: [groups], int32, the row of `allowed_cumsum` of each group; with it only.
        bonus: [bonuses, items], fp32, added to the score of a child at its first item. Last levels only. None: 0.
        bonus_row: [groups], int32, the row of `bonus` of each group; with it only.
        workspace: scratch memory for at least these bounds. Allocated when absent.
        out: outputs, [groups, max_select]. Allocated when absent.
        tile: candidates per program, a power of two; the workspace must have been made for the same.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: a shape, stride, device, dtype or bound that the kernels cannot take.
    """
    groups, max_live = _check_beams(logits, first_row, trie, nodes, scores, width, select)
    _check_filter(trie, groups, allowed_cumsum, filter_row)
    _check_bonus(trie, groups, bonus, bonus_row)
    bounds = BeamBounds.of(trie, groups, max_live, max_select, tile)
    workspace = BeamWorkspace.allocate(bounds, logits.device) if workspace is None else workspace
    workspace.check(bounds, logits.device)
    out = BeamSelection.allocate(groups, max_select, logits.device) if out is None else out
    _check_out(out, groups, max_select, logits.device)
    _normalisers(bounds, workspace, logits, first_row, trie, nodes, width)
    _first_cut(
        bounds, workspace, logits, first_row, trie, scores, select, (allowed_cumsum, filter_row), (bonus, bonus_row)
    )
    _select(bounds, workspace, trie, select, out)
    return out


def _normalisers(
    bounds: BeamBounds,
    workspace: BeamWorkspace,
    logits: torch.Tensor,
    first_row: torch.Tensor,
    trie: TrieTables,
    nodes: torch.Tensor,
    width: torch.Tensor,
) -> None:
    """Launches 1 and 2: log-sum-exp and candidate offset of every live beam."""
    lse_kernel[(bounds.pieces, bounds.max_live, bounds.groups)](
        logits,
        leading_stride(logits),
        first_row,
        nodes,
        leading_stride(nodes),
        width,
        trie.child_start,
        trie.child_code,
        workspace.partial_max,
        workspace.partial_sum,
        bounds.max_live,
        PIECE=bounds.piece,
        num_warps=_lse_warps(bounds.piece),
    )
    beams = next_power_of_two(bounds.max_live)
    plan_kernel[(bounds.groups,)](
        nodes,
        leading_stride(nodes),
        width,
        trie.child_start,
        workspace.partial_max,
        workspace.partial_sum,
        workspace.offsets,
        workspace.shift,
        workspace.lse,
        bounds.max_live,
        bounds.pieces,
        PIECE=bounds.piece,
        BEAMS=beams,
        PIECES_AT_ONCE=_pieces_at_once(bounds),
        num_warps=4,
    )


def _first_cut(
    bounds: BeamBounds,
    workspace: BeamWorkspace,
    logits: torch.Tensor,
    first_row: torch.Tensor,
    trie: TrieTables,
    scores: torch.Tensor,
    select: torch.Tensor,
    filters: _RowsOfGroups,
    bonuses: _RowsOfGroups,
) -> None:
    """Launch 3: each tile's best candidates."""
    allowed_cumsum, filter_row = filters
    bonus, bonus_row = bonuses
    tile_kernel[(bounds.tiles, bounds.groups)](
        logits,
        leading_stride(logits),
        first_row,
        scores,
        leading_stride(scores),
        select,
        trie.child_code,
        trie.item_lo,
        trie.item_hi,
        allowed_cumsum,
        0 if allowed_cumsum is None else leading_stride(allowed_cumsum),
        filter_row,
        bonus,
        0 if bonus is None else leading_stride(bonus),
        bonus_row,
        workspace.offsets,
        workspace.shift,
        workspace.lse,
        workspace.keys[0],
        workspace.indices[0],
        bounds.max_live,
        bounds.max_select,
        TILE=bounds.tile,
        BEAMS=next_power_of_two(bounds.max_live),
        SELECT=next_power_of_two(bounds.max_select),
        HAS_FILTER=allowed_cumsum is not None,
        HAS_BONUS=bonus is not None,
        num_warps=NUM_WARPS,
    )


def _select(
    bounds: BeamBounds, workspace: BeamWorkspace, trie: TrieTables, select: torch.Tensor, out: BeamSelection
) -> None:
    """The remaining launches: merge the tiles' survivors, sort and decode."""
    source, target, tiles = 0, 1, bounds.tiles
    width = next_power_of_two(bounds.max_select)
    for merged, tiles_left in enumerate(bounds.merge_rounds):
        merge_kernel[(tiles_left, bounds.groups)](
            select,
            workspace.offsets,
            workspace.keys[source],
            workspace.indices[source],
            workspace.keys[target],
            workspace.indices[target],
            tiles * bounds.max_select,
            bounds.max_live,
            bounds.max_select,
            TILE=bounds.tile,
            SELECT=width,
            MERGED=merged,
            num_warps=NUM_WARPS,
        )
        source, target, tiles = target, source, tiles_left
    final_kernel[(bounds.groups,)](
        select,
        trie.child_code,
        workspace.offsets,
        workspace.shift,
        workspace.keys[source],
        workspace.indices[source],
        workspace.keys[target],
        workspace.indices[target],
        out.scores,
        out.parents,
        out.nodes,
        out.codes,
        out.width,
        leading_stride(out.scores),
        tiles * bounds.max_select,
        bounds.max_live,
        bounds.max_select,
        TILE=bounds.tile,
        LAST=next_power_of_two(tiles * bounds.max_select),
        BEAMS=next_power_of_two(bounds.max_live),
        SELECT=width,
        MERGED=len(bounds.merge_rounds),
        num_warps=NUM_WARPS,
    )


def _lse_warps(piece: int) -> int:
    return min(NUM_WARPS, max(1, piece // 256))


def _pieces_at_once(bounds: BeamBounds) -> int:
    """Partials merged per turn: a flat root has one beam of many pieces, a deep level many beams of one."""
    room = max(1, 4096 // next_power_of_two(bounds.max_live))
    return min(next_power_of_two(bounds.pieces), room)


def _check_beams(
    logits: torch.Tensor,
    first_row: torch.Tensor,
    trie: TrieTables,
    nodes: torch.Tensor,
    scores: torch.Tensor,
    width: torch.Tensor,
    select: torch.Tensor,
) -> tuple[int, int]:
    check_tensor("logits", logits, (None, None), ACTIVATION_DTYPES, trie.child_start.device)
    if logits.shape[1] < trie.columns:
        raise ValueError(f"logits has {logits.shape[1]} columns, the trie's codes need {trie.columns}")
    check_tensor("nodes", nodes, (None, None), (torch.int32,), logits.device)
    groups, max_live = nodes.shape
    check_tensor("scores", scores, (groups, max_live), (torch.float32,), logits.device)
    for name, tensor in (("first_row", first_row), ("width", width), ("select", select)):
        check_tensor(name, tensor, (groups,), (torch.int32,), logits.device)
    return groups, max_live


def _check_filter(
    trie: TrieTables, groups: int, allowed_cumsum: torch.Tensor | None, filter_row: torch.Tensor | None
) -> None:
    if allowed_cumsum is None and filter_row is None:
        return
    if allowed_cumsum is None or filter_row is None:
        raise ValueError("got one of allowed_cumsum and filter_row; pass both or neither")
    device = trie.child_start.device
    check_tensor("allowed_cumsum", allowed_cumsum, (None, trie.items + 1), (torch.int32,), device)
    check_tensor("filter_row", filter_row, (groups,), (torch.int32,), device)


def _check_bonus(trie: TrieTables, groups: int, bonus: torch.Tensor | None, bonus_row: torch.Tensor | None) -> None:
    if bonus is None and bonus_row is None:
        return
    if bonus is None or bonus_row is None:
        raise ValueError("got one of bonus and bonus_row; pass both or neither")
    device = trie.child_start.device
    check_tensor("bonus", bonus, (None, trie.items), (torch.float32,), device)
    check_aligned("bonus", bonus)
    check_tensor("bonus_row", bonus_row, (groups,), (torch.int32,), device)


def _check_out(out: BeamSelection, groups: int, max_select: int, device: torch.device) -> None:
    check_tensor("out.scores", out.scores, (groups, max_select), (torch.float32,), device)
    for name in ("parents", "nodes", "codes"):
        tensor: torch.Tensor = getattr(out, name)
        check_tensor(f"out.{name}", tensor, (groups, max_select), (torch.int32,), device)
        if leading_stride(tensor) != leading_stride(out.scores):
            raise ValueError(f"out.{name} has row stride {tensor.stride(0)}, expected that of out.scores")
    check_tensor("out.width", out.width, (groups,), (torch.int32,), device)


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """A flat catalogue of a million items and a deep level; 256 beams each, in full 16 and 1,024 too."""
    cells = []
    for select in (256, *([16, 1024] if full else [])):
        deep = BeamBounds(8, max_live=select, max_select=select, max_children=256, max_candidates=256 * select)
        flat = BeamBounds(8, max_live=1, max_select=select, max_children=10**6, max_candidates=10**6)
        cells += [*_cells_within(arch, f"flat-w{select}", flat), *_cells_within(arch, f"deep-w{select}", deep)]
    return cells


def _cells_within(arch: int, variant: str, bounds: BeamBounds) -> list[AotCell]:
    """The cells of one step, in launch order."""
    beams, select = next_power_of_two(bounds.max_live), next_power_of_two(bounds.max_select)
    rounds = len(bounds.merge_rounds)
    last = next_power_of_two((bounds.merge_rounds or (bounds.tiles,))[-1] * bounds.max_select)
    tile: dict[str, object] = {"TILE": bounds.tile, "BEAMS": beams, "SELECT": select}
    plan: dict[str, object] = {"PIECE": bounds.piece, "BEAMS": beams, "PIECES_AT_ONCE": _pieces_at_once(bounds)}
    # A flat catalogue's level is its last, where the items' other terms are added; a deep one stands for the others.
    bonus: dict[str, object] = {"HAS_BONUS": True}
    if bounds.max_live > 1:
        bonus = {"HAS_BONUS": False, "bonus_ptr": None, "bonus_row_ptr": None}
    merge: dict[str, object] = {"TILE": bounds.tile, "SELECT": select, "MERGED": 0}
    cases: list[tuple[Any, dict[str, object], int]] = [
        (lse_kernel, {"PIECE": bounds.piece}, _lse_warps(bounds.piece)),
        (plan_kernel, plan, 4),
        (tile_kernel, tile | {"HAS_FILTER": True} | bonus, NUM_WARPS),
        *[(merge_kernel, merge, NUM_WARPS)] * min(1, rounds),
        (final_kernel, tile | {"LAST": last, "MERGED": rounds}, NUM_WARPS),
    ]
    return [_cell(arch, variant, kernel, constants, warps) for kernel, constants, warps in cases]


def _cell(arch: int, variant: str, kernel: Any, constants: dict[str, object], num_warps: int) -> AotCell:
    """Types follow from the arguments' names: counts are int32, scores and partial sums fp32, indices int32 tensors."""
    wide = ("score_ptr", "bonus_ptr", "out_score_ptr", "partial_max_ptr", "partial_sum_ptr", "lse_ptr")
    types = {name: "*i32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names if name not in constants}
    types |= {name: "*fp32" for name in wide if name in types}
    types |= {"logits_ptr": pointer(torch.bfloat16)}
    unaligned = {param.name for param in kernel.params if param.do_not_specialize}
    pointers = {name for name in kernel.arg_names if name.endswith(("_ptr", "logits_stride"))}
    aligned = tuple(name for name in types if name in pointers - unaligned)
    return make_cell(
        "beam_step",
        kernel,
        types,
        constants,
        aligned=aligned,
        num_warps=num_warps,
        num_stages=3,
        arch=arch,
        head_dim=0,
        dtype=torch.bfloat16,
        expect_wgmma=False,
        variant=variant,
    )
