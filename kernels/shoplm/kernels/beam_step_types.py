"""Data that `beam_step` works on: the trie's tables, the bounds that fix launch shapes, scratch memory and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from shoplm.kernels._checks import check_tensor

TILE_CANDIDATES = 4096  # 16 keys a thread with 8 warps: the selection stays in registers
MAX_SELECT = 1024


def ceil_div(count: int, size: int) -> int:
    """Pieces of `size` that hold `count`."""
    return -(-count // size)


def next_power_of_two(count: int) -> int:
    """Smallest power of two that is at least `count`, itself at least 1."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True)
class TrieTables:
    """The item trie on the device: one level, or all levels with nodes numbered breadth first. Built once a catalogue.

    A node's children are consecutive: `child_start[node] .. child_start[node + 1] - 1`. With one level's tables a child
    index is a node of the next level; with breadth-first tables it is a node of the same numbering.
    """

    child_start: torch.Tensor  # int32 [nodes + 1]
    child_code: torch.Tensor  # int32 [children], column of the child's logit
    item_lo: torch.Tensor  # int32 [children], first sorted item below the child
    item_hi: torch.Tensor  # int32 [children], one past the last sorted item below the child
    max_children: int  # largest number of children of one node
    columns: int  # one past the largest child code: what `logits` must have at least
    items: int  # items of the catalogue: what a filter must cover

    @staticmethod
    def build(
        child_start: torch.Tensor, child_code: torch.Tensor, item_lo: torch.Tensor, item_hi: torch.Tensor
    ) -> TrieTables:
        """Tables with their host-side bounds, read from the device once."""
        most = int((child_start[1:] - child_start[:-1]).max())
        return TrieTables(
            child_start, child_code, item_lo, item_hi, most, int(child_code.max()) + 1, int(item_hi.max())
        )

    @staticmethod
    def stack(levels: Sequence[TrieTables], column_starts: Sequence[int]) -> TrieTables:
        """One breadth-first numbering for all levels, so that groups at different levels share a step.

        Node 0 is the root and the levels' nodes follow in order; the leaves have no children. `column_starts[l]` is the
        column of `logits` where level l's codes begin.
        """
        if len(levels) != len(column_starts) or not levels:
            raise ValueError(f"got {len(levels)} levels and {len(column_starts)} column_starts, expected one each")
        root = levels[0].child_code.new_zeros(1)  # nobody's child: its entries are never read
        starts, codes, first_child = [], [root], 1
        for level, column in zip(levels, column_starts, strict=True):
            starts.append(level.child_start[:-1] + first_child)
            codes.append(level.child_code + column)
            first_child += level.child_code.shape[0]
        leaves = levels[-1].child_code.shape[0]
        starts.append(root.new_full((leaves + 1,), first_child))
        return TrieTables.build(
            torch.cat(starts),
            torch.cat(codes),
            torch.cat([root, *(level.item_lo for level in levels)]),
            torch.cat([root, *(level.item_hi for level in levels)]),
        )

    def __post_init__(self) -> None:
        device = self.child_start.device
        children = self.child_code.shape[0]
        check_tensor("child_start", self.child_start, (None,), (torch.int32,), device)
        if self.child_start.shape[0] < 2:
            raise ValueError(f"child_start has {self.child_start.shape[0]} entries, expected nodes + 1, at least 2")
        for name in ("child_code", "item_lo", "item_hi"):
            check_tensor(name, getattr(self, name), (children,), (torch.int32,), device)
        if not 1 <= self.max_children <= children:
            raise ValueError(f"max_children is {self.max_children}, expected 1 to the {children} children")


@dataclass(frozen=True)
class BeamSelection:
    """What a step selected, per group, best first. Entries at and past `width` are score -inf and index 0."""

    scores: torch.Tensor  # fp32 [groups, max_select], natural log
    parents: torch.Tensor  # int32 [groups, max_select], beam index in the step before
    nodes: torch.Tensor  # int32 [groups, max_select], child index: the trie node to go on from
    codes: torch.Tensor  # int32 [groups, max_select], logit column of that node
    width: torch.Tensor  # int32 [groups], live beams now

    @staticmethod
    def allocate(groups: int, max_select: int, device: torch.device | str) -> BeamSelection:
        """Uninitialised outputs for `beam_step(out=...)`."""
        return BeamSelection(
            scores=torch.empty(groups, max_select, dtype=torch.float32, device=device),
            parents=torch.empty(groups, max_select, dtype=torch.int32, device=device),
            nodes=torch.empty(groups, max_select, dtype=torch.int32, device=device),
            codes=torch.empty(groups, max_select, dtype=torch.int32, device=device),
            width=torch.empty(groups, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class BeamBounds:
    """Upper bounds of a step: they fix every launch shape, so a captured step serves any group within them."""

    groups: int
    max_live: int  # beams entering the step, the most of any group
    max_select: int  # beams leaving it
    max_children: int
    max_candidates: int  # children of all live nodes of a group together
    tile: int = TILE_CANDIDATES

    def __post_init__(self) -> None:
        for name in ("groups", "max_live", "max_select", "max_children", "max_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.max_select > min(MAX_SELECT, self.tile // 2):
            limit = min(MAX_SELECT, self.tile // 2)
            raise ValueError(f"max_select is {self.max_select}, expected at most {limit}; narrow the beams")
        if self.tile & (self.tile - 1):
            raise ValueError(f"tile is {self.tile}, expected a power of two")

    @staticmethod
    def of(trie: TrieTables, groups: int, max_live: int, max_select: int, tile: int = TILE_CANDIDATES) -> BeamBounds:
        """Bounds of a step over `trie`. A group's live nodes are distinct, so its candidates are distinct children."""
        candidates = min(max_live * trie.max_children, trie.child_code.shape[0])
        return BeamBounds(groups, max_live, max_select, trie.max_children, candidates, tile)

    @property
    def piece(self) -> int:
        """Children per partial log-sum-exp."""
        return min(self.tile, next_power_of_two(self.max_children))

    @property
    def pieces(self) -> int:
        """Partial log-sum-exps per beam."""
        return ceil_div(self.max_children, self.piece)

    @property
    def tiles(self) -> int:
        """Candidate tiles of a group."""
        return ceil_div(self.max_candidates, self.tile)

    @property
    def merge_rounds(self) -> tuple[int, ...]:
        """Tiles left after each merge round; empty where one tile holds every survivor of the first cut."""
        rounds, tiles = [], self.tiles
        while tiles * self.max_select > self.tile:
            tiles = ceil_div(tiles * self.max_select, self.tile)
            rounds.append(tiles)
        return tuple(rounds)


@dataclass(frozen=True)
class BeamWorkspace:
    """Scratch memory of `beam_step`, allocated once for the largest bounds; smaller steps use its front."""

    partial_max: torch.Tensor  # fp32 [groups * max_live * pieces]
    partial_sum: torch.Tensor  # fp32, same
    offsets: torch.Tensor  # int32 [groups * (max_live + 1)], first candidate of each beam, then the total
    shift: torch.Tensor  # int32 [groups * max_live], child index = candidate index + shift
    lse: torch.Tensor  # fp32 [groups * max_live]
    keys: tuple[torch.Tensor, torch.Tensor]  # int32 [groups * tiles * max_select], survivors, two in turn
    indices: tuple[torch.Tensor, torch.Tensor]  # int32, their candidate indices

    @staticmethod
    def sizes(bounds: BeamBounds) -> tuple[int, int, int, int]:
        """Elements of (partials, offsets, per-beam values, survivors) that a step within `bounds` needs."""
        beams = bounds.groups * bounds.max_live
        survivors = bounds.groups * bounds.tiles * bounds.max_select
        return beams * bounds.pieces, beams + bounds.groups, beams, survivors

    @staticmethod
    def allocate(bounds: BeamBounds, device: torch.device | str) -> BeamWorkspace:
        """Workspace for every step within `bounds`."""
        partials, offsets, beams, survivors = BeamWorkspace.sizes(bounds)

        def new(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        return BeamWorkspace(
            new(partials, torch.float32),
            new(partials, torch.float32),
            new(offsets, torch.int32),
            new(beams, torch.int32),
            new(beams, torch.float32),
            (new(survivors, torch.int32), new(survivors, torch.int32)),
            (new(survivors, torch.int32), new(survivors, torch.int32)),
        )

    def check(self, bounds: BeamBounds, device: torch.device) -> None:
        """Raise ValueError unless a step within `bounds` fits."""
        have = (self.partial_max.numel(), self.offsets.numel(), self.lse.numel(), self.keys[0].numel())
        need = self.sizes(bounds)
        if self.lse.device != device or any(h < n for h, n in zip(have, need, strict=True)):
            raise ValueError(
                f"workspace on {self.lse.device} holds {have} elements, this step needs {need} on {device}; "
                "allocate it for the largest bounds"
            )


def allowed_prefix(allowed: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Item masks as the prefix sums that `beam_step` filters with; run it when a mask changes, not per step.

    Args:
        allowed: [filters, items] bool or uint8 (0 or 1), over the sorted items.
        out: [filters, items + 1] int32, contiguous. Allocated when absent.

    Returns:
        `out`: entry i = number of allowed items before item i.
    """
    filters, items = allowed.shape
    out = torch.empty(filters, items + 1, dtype=torch.int32, device=allowed.device) if out is None else out
    check_tensor("out", out, (filters, items + 1), (torch.int32,), allowed.device)
    out[:, 0] = 0
    out[:, 1:] = torch.cumsum(allowed, dim=1, dtype=torch.int32)
    return out
