"""The rows of an explanation: which positions its forks' tokens have, and which keys each of them must not read.

A prompt with forks is `history | suffix of fork 0 | suffix of fork 1 | …` in one sequence of pages. The forks' tokens
all follow the history: token i of every suffix is at position `history + i`, wherever its keys and values are kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from shoplm.batch import ForkReadout
from shoplm.request import Explain, HeadValues


def fork_positions(at: NDArray[np.int64], task: Explain, start: int) -> NDArray[np.int64]:
    """The positions of the prompt's tokens `at`, the forks beginning at token `start`."""
    return np.where(at < start, at, start + (at - start) % task.suffix_tokens)


def fork_mask(task: Explain, start: int, first: int, count: int) -> NDArray[np.bool_] | None:
    """[count, first + count]: what the prompt's tokens `first` .. `first + count - 1` must not read of what lies before
    them: the other forks, and the spans that are hidden from their own. None: there is no fork among them."""
    end = first + count
    if end <= start:
        return None
    hidden = np.zeros((count, end), np.bool_)
    for token in range(max(first, start), end):
        fork = (token - start) // task.suffix_tokens
        row = hidden[token - first]
        row[start : start + fork * task.suffix_tokens] = True
        for from_key, to_key in task.hidden[fork]:
            row[from_key:to_key] = True
    return hidden


def fork_readout(task: Explain, start: int, first: int, count: int) -> ForkReadout | None:
    """What is read of the tokens `first` .. `first + count - 1`: the forks that end among them; None: none does."""
    ends = start + task.suffix_tokens * (1 + np.arange(len(task.hidden))) - 1
    forks = np.flatnonzero((ends >= first) & (ends < first + count)).tolist()
    if not forks:
        return None
    reads = task.reads
    if isinstance(reads, HeadValues):
        reads = HeadValues(reads.features[forks[0] : forks[-1] + 1])
    return ForkReadout(reads, tuple((ends[forks] - first).tolist()))
