"""One training pass as tensors: a customer's prefix, and branches that each attend to its beginning and to themselves.

Branches are the moments at which baskets and behaviour are learnt (two tokens each) and conversations (the question and
its answer). All read one prefix, as they do when they are served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that follow the first `length` tokens of the prefix."""

    length: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PassInputs:
    """What the model takes: T tokens, batch of one."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [1, T]
    mask: Tensor  # bool [1, 1, T, T]: True where a token may attend
    starts: tuple[int, ...]  # of each branch


def pass_inputs(prefix: Sequence[int], branches: Sequence[Branch]) -> PassInputs:
    """Flatten prefix and branches; each branch is causal behind its own part of the prefix."""
    tokens, positions = [*prefix], [*range(len(prefix))]
    starts = []
    for branch in branches:
        if not 0 <= branch.length <= len(prefix):
            raise ValueError(f"a branch of length {branch.length} on a prefix of {len(prefix)} tokens")
        starts.append(len(tokens))
        tokens += branch.tokens
        positions += range(branch.length, branch.length + len(branch.tokens))
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    count = len(prefix)
    mask[:count, :count] = torch.ones(count, count, dtype=torch.bool).tril()
    for start, branch in zip(starts, branches, strict=True):
        end = start + len(branch.tokens)
        mask[start:end, : branch.length] = True
        mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return PassInputs(torch.tensor(tokens), torch.tensor([positions]), mask[None, None], tuple(starts))
