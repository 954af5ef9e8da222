"""A sequence's own bookkeeping."""

from __future__ import annotations

from shoplm.request import Explain, ItemScores, Request, Service, token_ids
from shoplm.scheduler.sequence import Sequence


def test_a_preempted_explanation_forgets_what_its_forks_have_read() -> None:
    task = Explain(2, ((), ((0, 3),)), ItemScores((1,)))
    tokens = token_ids(range(24))
    sequence = Sequence(Request("r", Service.RECOMMENDATION, tokens, task, 0.0), 0.0, tokens)
    assert sequence.shareable == 20  # the history, and no fork
    sequence.computed, sequence.parts = 22, (-1.5,)
    sequence.restart()
    assert (sequence.computed, sequence.parts, sequence.epoch) == (0, (), 1)
