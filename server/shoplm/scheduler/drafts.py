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

MOST_ANSWERS = 32  # of a step; with more, nobody looks for guesses, which would cost the planner more than they save
FARTHEST = 4096  # tokens back that are looked at
_GUESSED, _RIGHT = 3.0, 2.0  # what the share of right guesses begins with, as if seen
_FORGET = 0.95  # per token


class Lookup:
    """What followed each pair of tokens of one sequence, and how often the next token of its answer was that."""

    __slots__ = ("_after", "_answer", "_guessed", "_known", "_right")

    def __init__(self, length: int, answer: int) -> None:
        """`length` tokens are known by now; those from `answer` on are the answer's."""
        self._after: dict[int, int] = {}  # a pair, as one number: where it was followed
        self._answer = answer
        self._known = max(2, length - FARTHEST)
        self._guessed, self._right = _GUESSED, _RIGHT

    @property
    def accuracy(self) -> float:
        """How likely a guess is right."""
        return self._right / self._guessed

    def follow(self, tokens: Tokens) -> None:
        """Take note of the tokens that are new. Whether they would have been guessed counts, whether or not they were:
        who was seldom right is thus tried again once that has changed."""
        after, answer = self._after, self._answer
        for at in range(self._known, len(tokens)):
            pair = tokens[at - 2] << 32 | tokens[at - 1]
            if at >= answer and (before := after.get(pair)) is not None:
                self._guessed = _FORGET * self._guessed + 1.0
                self._right = _FORGET * self._right + (tokens[before] == tokens[at])
            after[pair] = at
        self._known = max(self._known, len(tokens))

    def guess(self, tokens: Tokens, most: int) -> tuple[int, ...]:
        """So many tokens behind these, all of which were followed; empty: no idea. What was found is taken to repeat
        itself where it ends."""
        at = self._after.get(tokens[-2] << 32 | tokens[-1]) if len(tokens) > 1 else None
        return () if at is None else tuple(islice(cycle(tokens[at : at + most]), most))


class Drafter:
    """Says how far the answers of a step are guessed.

    A drafted token costs what any token does, with what is read behind it. One that is right saves the same later, and
    the answer's part of a step's constant. So it pays where it is likelier to be right, all before it being right, than
    `work / (work + step / answers)`.
    """

    def __init__(self, most: int, cost: CostModel) -> None:
        """`most` tokens of an answer in a step; 0: none."""
        self._most = most
        self._cost = cost

    def looks(self, answers: int) -> bool:
        """Whether a step of so many answers holds guesses at all."""
        return self._most > 0 and answers <= MOST_ANSWERS

    def draft(self, sequence: Sequence, answers: int, most: int) -> tuple[int, ...]:
        """The next tokens of one of so many answers, as far as it pays, at most `most`; empty: no idea, or no gain."""
        # The last token of an answer is drawn behind the draft.
        most = min(most, self._most, sequence.most_length - len(sequence.tokens) - 1)
        if most < 1 or not self.looks(answers):
            return ()
        if (lookup := sequence.lookup) is None:
            lookup = sequence.lookup = Lookup(len(sequence.tokens), sequence.prompt_length)
        lookup.follow(sequence.tokens)
        most = min(most, self._worthwhile(lookup.accuracy, sequence.computed, answers))
        draft = lookup.guess(sequence.tokens, most) if most > 0 else ()
        # Behind a token that ends the answer nothing counts, and that it comes is seen without having guessed it.
        return tuple(takewhile(lambda token: token not in sequence.stop_token_ids, draft))

    def _worthwhile(self, accuracy: float, keys: int, answers: int) -> int:
        """The longest draft whose last token is likely enough to be right."""
        work = self._cost.work_seconds(1, keys, 1)
        if work <= 0.0 or accuracy >= 1.0:
            return self._most
        threshold = work / (work + self._cost.coefficients.step / answers)
        return int(math.log(threshold) / math.log(accuracy)) if accuracy > 0.0 else 0


def accepted(draft: tuple[int, ...], drawn: list[int]) -> list[int]:
    """Of the tokens drawn behind the known one and behind each drafted one, those that an answer goes on by."""
    right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft, drawn, strict=False)))
    return drawn[: right + 1]
