"""Rows of a step: the next tokens of a prompt, or the next level of a search's beams."""

from __future__ import annotations

from shoplm.request import Explain, Generate, Select
from shoplm.scheduler.plan import PlanRow
from shoplm.scheduler.sequence import Sequence


def next_level(sequence: Sequence) -> PlanRow:
    """All lanes of the next level of a search."""
    row = PlanRow(sequence, sequence.prompt_length, sequence.lanes, True, sequence.level, True, 0, sequence.epoch)
    sequence.level += 1
    return row


def next_tokens(sequence: Sequence, size: int, *, again: bool = False) -> PlanRow:
    """The next `size` tokens of a prompt; `again`: the keys and values of the one token are in a page of others."""
    start = sequence.computed
    sequence.computed += size
    task = sequence.request.task
    if isinstance(task, Explain):  # each fork that ends
        forks = [(end - sequence.shareable) // task.suffix_tokens for end in (start, sequence.computed)]
        reads = max(forks[0], 0) < forks[1]
    else:
        reads = sequence.computed == sequence.length
    index = sequence.length - sequence.prompt_length
    row = PlanRow(sequence, start, size, reads, 0, False, index, sequence.epoch, again)
    if reads and isinstance(task, Generate):
        sequence.unknown += 1
    elif reads and isinstance(task, Select):
        sequence.level = 1
    return row
