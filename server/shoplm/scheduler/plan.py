"""What a step computes, before it becomes tensors."""

from __future__ import annotations

import msgspec
from shoplm.request import Generate
from shoplm.scheduler.cost import StepLoad, kv_tokens
from shoplm.scheduler.sequence import Sequence


class PlanRow(msgspec.Struct, frozen=True, gc=False):
    """A prompt's part of a step, tokens `start` .. `start + count - 1`, or an answer's with a draft, or a search's: its
    beams at `level`."""

    sequence: Sequence
    start: int
    count: int  # tokens; for beams, lanes
    reads: bool  # the last token's hidden state is read
    level: int = 0  # Select: the level of the trie that is read
    is_beam: bool = False
    sample_index: int = 0  # Generate: how many tokens were drawn before the one that this row draws
    epoch: int = 0
    again: bool = False  # its one token's keys and values are in a page of others; those of this step go behind it
    draft: tuple[int, ...] = ()  # of an answer, whose known token comes first: guesses of those behind it

    @property
    def draws(self) -> bool:
        """A token of an answer is drawn."""
        return self.reads and isinstance(self.sequence.request.task, Generate)

    @property
    def keys(self) -> int:
        """Keys that its queries read. A lane of a search reads the prompt and its own few tokens."""
        return self.count * self.start if self.is_beam else kv_tokens(self.start, self.count)


class Plan(msgspec.Struct, frozen=True):
    """One step. Its results are those of the answers, then those of the rows."""

    rows: tuple[PlanRow, ...] = ()  # prompts, searches and answers with drafts
    answers: tuple[Sequence, ...] = ()  # that go on by one token each: most of a busy engine's step, so without rows
    starts: tuple[int, ...] = ()  # the positions of these tokens
    answers_of: dict[str, int] = {}  # how many of each service
    load: StepLoad = StepLoad(0, 0, 0)
    planned_seconds: float = 0.0  # when

    @property
    def tokens(self) -> int:
        return self.load.tokens
