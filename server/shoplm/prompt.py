"""A customer becomes tokens: `shop preamble | profile | history, oldest first`, then the task.

The first three are the customer's prefix. It is the same for the three services, so that its keys and values are
computed once; everything volatile (the moment asked for, the conversation, passages) is in the suffix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from shoplm.bundle import PromptSchema
from shoplm.history import SECONDS_PER_DAY, EventKind, History
from shoplm.request import Tokens, token_ids
from shoplm.vocabulary import ShopVocabulary

PROMPT_VERSION = 1  # changes whenever a history becomes other tokens: hidden states of another version do not count
_MARKS = {EventKind.CART: "<cart>", EventKind.VIEW: "<view>", EventKind.RETURN: "<return>"}
_SYSTEM = "system"
_MAX_OPENINGS = 1024
SUFFIX_TOKENS = 2  # of a task behind a history: the gap since the last visit, and what is asked


@dataclass(frozen=True, slots=True)
class _Text:
    """Plain text as a piece: what a system message of our own becomes."""

    text: str
    message: int | None = 0


class TextEncoder(Protocol):
    """What the prompt needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; control tokens in it are text."""
        ...

    def encode_pieces(self, pieces: Sequence[TemplatePiece]) -> list[int]:
        """Token ids of a rendered conversation: control tokens count in template text, and are text in contents."""
        ...


class TemplatePiece(Protocol):
    """A part of a rendered chat template."""

    @property
    def text(self) -> str: ...

    @property
    def message(self) -> int | None:
        """Index of the message whose content this is; None: text of the template."""
        ...


class Template(Protocol):
    """What the prompt needs of a chat template."""

    def pieces(
        self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = True
    ) -> Sequence[TemplatePiece]:
        """The conversation, rendered and split into template text and contents."""
        ...


@dataclass(frozen=True)
class Prefix:
    """The customer's part of a prompt."""

    tokens: tuple[int, ...]
    dropped_baskets: int  # oldest baskets left out to keep the history budget
    cut_baskets: int = 0  # 1: a basket is too large for the budget alone, and its end is left out

    @property
    def truncated_baskets(self) -> int:
        """Baskets that are not in the prompt as a whole."""
        return self.dropped_baskets + self.cut_baskets

    @cached_property
    def packed(self) -> Tokens:
        """The tokens as requests hold them; packed once for all requests of the customer."""
        return token_ids(self.tokens)


@dataclass(frozen=True, slots=True)
class Mention:
    """The tokens `start` .. `end` - 1 of a prefix that name an item, and the event of the history behind them."""

    start: int
    end: int
    event: int


@dataclass(frozen=True, slots=True)
class Visit:
    """The tokens `start` .. `end` - 1 of a prefix that a basket takes: the gap before it, marks, and its items."""

    start: int
    end: int
    basket: int  # of the history
    mentions: tuple[Mention, ...]


class PromptBuilder:
    """Renders prompts for one base model and, where there is one, one bundle."""

    def __init__(
        self,
        encoder: TextEncoder,
        template: Template,
        schema: PromptSchema | None = None,
        vocabulary: ShopVocabulary | None = None,
        codes: NDArray[np.int32] | None = None,
    ) -> None:
        """`codes` [items, depth] are the items' codes; None where an item's code is its row (depth 1)."""
        if (schema is None) != (vocabulary is None):
            raise ValueError("a prompt schema and a shop vocabulary come together")
        self._encoder = encoder
        self._template = template
        self._schema = schema
        self._vocabulary = vocabulary
        self._codes = codes
        self._openings: dict[str, tuple[int, ...]] = {}

    def prefix(self, history: History | None, dropped_baskets: int | None = None) -> Prefix:
        """Preamble, profile and history; None or an empty history gives the shop's preamble alone.

        So many of the oldest baskets are left out; None: as few as the budget allows."""
        if self._schema is None:
            return Prefix((), 0)
        tokens = list(self._opening_of(history))
        dropped = cut = 0
        if history is not None and len(history):
            baskets = self._baskets(history)
            dropped = self._dropped(list(map(len, baskets))) if dropped_baskets is None else dropped_baskets
            budget = self._schema.history_budget_tokens
            read = [token for basket in baskets[dropped:] for token in basket]
            tokens += read[:budget]
            cut = int(len(read) > budget)
        return Prefix(tuple(tokens), dropped, cut)

    def visits(self, history: History, prefix: Prefix) -> tuple[Visit, ...]:
        """What the tokens of the history's prefix stand for, oldest first."""
        origins: list[list[int | None]] = []
        baskets = self._baskets(history, origins)[prefix.dropped_baskets :]
        numbers = np.unique(history.basket)[prefix.dropped_baskets :].tolist()
        size, start = len(prefix.tokens), len(self._opening_of(history))
        found = []
        for number, tokens, events in zip(numbers, baskets, origins[prefix.dropped_baskets :], strict=True):
            end = min(start + len(tokens), size)
            mentions = [
                Mention(start + first, start + last, event)
                for event, first, last in _runs(events)
                if event is not None and start + last <= end
            ]
            if end > start:
                found.append(Visit(start, end, number, tuple(mentions)))
            start = end
        return tuple(found)

    def _opening_of(self, history: History | None) -> tuple[int, ...]:
        """The prefix before the first basket."""
        assert self._schema is not None
        profile = "; ".join(f"{name}: {value}" for name, value in history.attributes) if history is not None else ""
        text = self._schema.preamble + (f"\nCustomer profile: {profile}." if profile else "")
        text += "\nPurchase history, oldest first." if history is not None and len(history) else ""
        return self._opening(text)

    def _opening(self, text: str) -> tuple[int, ...]:
        """The system turn up to the end of `text`. Few profiles are there, and rendering a template takes longer than
        all that comes after it."""
        tokens = self._openings.get(text)
        if tokens is None:
            before, _ = self._around_system(())
            tokens = tuple(self._encoder.encode_pieces([*before, _Text(text)]))
            if len(self._openings) >= _MAX_OPENINGS:
                self._openings.clear()
            self._openings[text] = tokens
        return tokens

    def recommend(self, prefix: Prefix, history: History | None) -> tuple[int, ...]:
        """The prompt whose last hidden state selects items."""
        return prefix.tokens + self.recommend_suffix(history)

    def predict(self, prefix: Prefix, history: History | None) -> tuple[int, ...]:
        """The prompt whose last hidden state the heads read."""
        return prefix.tokens + self.predict_suffix(history)

    def recommend_suffix(self, history: History | None) -> tuple[int, ...]:
        """What `recommend` adds to the customer's prefix."""
        return self._task_suffix("<rec>", history)

    def predict_suffix(self, history: History | None) -> tuple[int, ...]:
        """What `predict` adds to the customer's prefix."""
        return self._task_suffix("<predict>", history)

    def chat(
        self, prefix: Prefix, messages: Sequence[tuple[str, str]], passages: Sequence[str] = ()
    ) -> tuple[int, ...]:
        """The conversation after the prefix. The caller's leading system message and the passages join the prefix's
        own system turn, behind the history; without a prefix this is the base model's plain chat template.
        """
        facts = "\n\nFacts of the shop:\n" + "\n".join(f"- {passage}" for passage in passages) if passages else ""
        if not prefix.tokens:
            if facts:
                if messages and messages[0][0] == _SYSTEM:
                    messages = [(_SYSTEM, messages[0][1] + facts), *messages[1:]]
                else:
                    messages = [(_SYSTEM, facts.strip()), *messages]
            return tuple(self._encoder.encode_pieces(self._template.pieces(messages)))
        if messages and messages[0][0] == _SYSTEM:
            facts = f"\n\n{messages[0][1]}{facts}"
            messages = messages[1:]
        _, closing = self._around_system(messages)
        return prefix.tokens + tuple(self._encoder.encode_pieces([_Text(facts), *closing] if facts else closing))

    def _around_system(
        self, messages: Sequence[tuple[str, str]]
    ) -> tuple[Sequence[TemplatePiece], Sequence[TemplatePiece]]:
        """What stands before and after the content of a leading system message, which itself is left out."""
        pieces = list(self._template.pieces([(_SYSTEM, "\u200b"), *(messages or [("user", "\u200b")])]))
        at = next(index for index, piece in enumerate(pieces) if piece.message == 0)
        return pieces[:at], pieces[at + 1 :]

    def _task_suffix(self, name: str, history: History | None) -> tuple[int, ...]:
        vocabulary = self._shop()
        if history is None or not len(history):
            return (vocabulary.special(name),)
        days = (history.as_of - float(history.time[-1])) / SECONDS_PER_DAY
        return (vocabulary.gap(days), vocabulary.special(name))

    def _baskets(self, history: History, origins: list[list[int | None]] | None = None) -> list[list[int]]:
        """Tokens of each basket: the gap since the one before, then its items; each item once per kind.

        `origins` receives the event that each token names, None for gaps and marks."""
        vocabulary = self._shop()
        gap, product_type, item_tokens = vocabulary.gap, vocabulary.product_type, self._item_tokens
        marks = {int(kind): vocabulary.special(name) for kind, name in _MARKS.items()}
        purchase = int(EventKind.PURCHASE)
        baskets: list[list[int]] = []
        tokens: list[int] = []
        seen: set[tuple[int, bool, int]] = set()
        current, marked, last = -1, purchase, 0.0
        columns = (history.basket, history.time, history.kind, history.has_item, history.item)
        for index, (basket, now, kind, known, item) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            if basket != current:
                first = gap((now - last) / SECONDS_PER_DAY) if baskets else vocabulary.special("<basket>")
                current, marked, last, tokens, seen = basket, purchase, now, [first], set()
                baskets.append(tokens)
                if origins is not None:
                    origins.append([None])
            event = (kind, known, item)
            if event in seen:
                continue
            seen.add(event)
            if kind != marked:
                tokens.append(marks[kind])
                marked = kind
            if known:
                tokens += item_tokens(item)
            else:
                tokens.append(product_type(item))
            if origins is not None:
                own, named = origins[-1], len(item_tokens(item)) if known else 1
                own += [None] * (len(tokens) - len(own) - named) + [index] * named
        return baskets

    def _item_tokens(self, row: int) -> list[int]:
        starts = self._shop().level_starts
        if self._codes is None:
            return [starts[0] + row]
        return [start + int(code) for start, code in zip(starts, self._codes[row], strict=True)]

    def _dropped(self, lengths: Sequence[int]) -> int:
        """How many of the oldest baskets go. Whole blocks of tokens, counted from the very first basket: a new event
        changes the answer only once per block, so the prefix stays the same in between."""
        assert self._schema is not None
        budget, block = self._schema.history_budget_tokens, self._schema.history_block_tokens
        excess = sum(lengths) - budget
        if excess <= 0:
            return 0
        target = -(-excess // block) * block
        gone = 0
        for index, length in enumerate(lengths[:-1]):
            if gone >= target:
                return index
            gone += length
        return len(lengths) - 1

    def _shop(self) -> ShopVocabulary:
        if self._vocabulary is None:
            raise ValueError("this prompt builder has no bundle: only chat without a customer is possible")
        return self._vocabulary


def _runs(events: Sequence[int | None]) -> Iterator[tuple[int | None, int, int]]:
    """(event, start, end) of the runs of tokens that name the same event, or none."""
    start = 0
    for event, run in itertools.groupby(events):
        end = start + len(list(run))
        yield event, start, end
        start = end
