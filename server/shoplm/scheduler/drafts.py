"""Guesses of how an answer goes on, which a step then checks: several tokens of it for the price of few.

An answer that speaks of what its prompt holds, such as a passage, an item or the customer's words, often repeats it. So
what followed the last two tokens when they last occurred is drafted as what follows now (prompt lookup decoding, Saxena
2023; speculative decoding, arXiv:2211.17192). The step computes the drafted tokens beside the one that is known and
draws behind each of them. Drawn tokens count as long as the draft foretold the one before: the answer is the same, to
the last token, as if each had taken a step of its own, at any temperature, since a draw depends on its position alone.
"""

from __future__ import annotations

import math
from itertools import cycle, islice, takewhile

from shoplm.request import Tokens
from shoplm.scheduler.cost import CostModel
from shoplm.scheduler.sequence import Sequence

_GUESSED, _RIGHT = 3.0, 2.0  # what the share of right tokens begins with, as if seen
_LEAST_GAIN = 0.1  # a draft must be allowed to fail that often: else nobody need look for one


class Lookup:
    """What followed each pair of tokens of one sequence, and how often that was a good guess."""

    __slots__ = ("_after", "_guessed", "_known", "_right")

    def __init__(self) -> None:
        self._after: dict[int, int] = {}  # a pair, as one number: where it was followed
        self._known = 2  # tokens that were looked at
        self._guessed, self._right = _GUESSED, _RIGHT

    @property
    def accuracy(self) -> float:
        """How likely a drafted token is right, those before it being right."""
        return self._right / self._guessed

    def guess(self, tokens: Tokens, most: int) -> tuple[int, ...]:
        """So many tokens behind these, which may have grown since the last call; empty: no idea. What followed is taken
        to repeat itself where it ends."""
        after, length = self._after, len(tokens)
        for at in range(self._known, length):
            after[tokens[at - 2] << 32 | tokens[at - 1]] = at
        self._known = max(length, self._known)
        last = after.get(tokens[-2] << 32 | tokens[-1]) if length >= 2 else None
        return () if last is None else tuple(islice(cycle(tokens[last:]), most))

    def saw(self, drafted: int, right: int) -> None:
        """Of a draft's tokens, so many were right; behind the first wrong one nothing is known."""
        self._right += right
        self._guessed += right + (right < drafted)


class Drafter:
    """Says how far to guess."""

    def __init__(self, most: int, cost: CostModel) -> None:
        """`most` tokens of an answer in a step; 0: none."""
        self._most = most
        self._cost = cost

    def drafts(self, answers: int) -> Drafts | None:
        """For a step of so many answers; None where it pays for none of them."""
        if not self._most or not answers:
            return None
        each = self._cost.coefficients
        drafts = Drafts(self._most, each.token, each.kv, each.row + each.step / answers)
        return drafts if drafts.threshold(0) <= 1.0 - _LEAST_GAIN else None


class Drafts:
    """Those of one step. A drafted token costs what any token does. One that is right saves a token's work later, with
    its row and its part of a step."""

    def __init__(self, most: int, token: float, kv: float, overhead: float) -> None:
        self._most = most
        self._token = token
        self._kv = kv
        self._overhead = overhead

    def threshold(self, keys: int) -> float:
        """How likely a token that reads so many keys must be right."""
        work = self._token + self._kv * keys
        return work / (work + self._overhead) if work > 0 else 0.0

    def of(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """The next tokens of an answer, as far as it pays, at most `most`; empty: no idea."""
        lookup = sequence.lookup
        if lookup is None:
            lookup = sequence.lookup = Lookup()
        # The last token of an answer is drawn behind the draft.
        most = min(most, self._most, self._worthwhile(lookup.accuracy, sequence.computed))
        most = min(most, sequence.most_length - len(sequence.tokens) - 1)
        return lookup.guess(sequence.tokens, most) if most > 0 else ()

    def _worthwhile(self, accuracy: float, keys: int) -> int:
        """The longest draft whose last token is likely enough to be reached and right."""
        threshold = self.threshold(keys)
        return int(math.log(threshold) / math.log(accuracy)) if threshold > 0.0 else self._most


def accepted(draft: tuple[int, ...], drawn: list[int]) -> list[int]:
    """Of the tokens drawn behind the known one and behind each drafted one, those that an answer goes on by."""
    right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft, drawn, strict=False)))
    return drawn[: right + 1]
