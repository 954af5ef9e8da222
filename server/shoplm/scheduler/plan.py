"""What a step computes, before it becomes tensors."""

from __future__ import annotations

from dataclasses import dataclass

from shoplm.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A sequence's part of a step: tokens `start` .. `start + count - 1`, or its beams at `level`."""

    sequence: Sequence
    start: int
    count: int  # tokens; for beams, lanes
    reads: bool  # the last token's hidden state is read
    from_state: bool = False  # the token is what an earlier step draws
    level: int = 0  # Select: the level of the trie that is read
    is_beam: bool = False
    sample_index: int = 0  # Generate: how many tokens were drawn before this one
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One step."""

    rows: tuple[PlanRow, ...]

    @property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows)
