"""What the server ignored or changed in a request, counted by code."""

from __future__ import annotations

from shoplm.v1 import shop_pb2

TEXTS = {
    "UNKNOWN_ITEM": "items that the catalogue does not have were ignored",
    "UNTYPED_EVENT": "events without a type were read as purchases, the strongest signal: set their type",
    "DUPLICATE_EVENT": "events that equal another one in every field were left out: each counts once",
    "UNKNOWN_ATTRIBUTE": "attributes that the model does not know were ignored",
    "UNKNOWN_ATTRIBUTE_VALUE": "values of attributes that training never saw were read as they are; see GetModel",
    "FUTURE_EVENT": "events after as_of were ignored",
    "EVENTS_TRUNCATED": "the oldest events were left out, in whole blocks: there are more than max_events",
    "HISTORY_TRUNCATED": "baskets are not in the prompt, or not as a whole: they do not fit max_history_tokens",
    "NOT_EXPLAINED": "no more is said than the terms of the score: the customer has no history that counts, items have "
    "codes of several tokens, the context is full, or explanation_forks is 0",
    "EMPTY_HISTORY": "the customer has no history that counts: the answer is what is usual in this shop",
}


class Warnings:
    """Counts by code."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, code: str, count: int = 1) -> None:
        """Note that something happened `count` times; nothing for 0. `code` is a key of TEXTS."""
        if count > 0:
            self._counts[code] = self._counts.get(code, 0) + count

    def __bool__(self) -> bool:
        return bool(self._counts)

    def counts(self) -> dict[str, int]:
        """How often by code."""
        return dict(self._counts)

    def codes(self) -> list[str]:
        return list(self._counts)

    def messages(self) -> list[shop_pb2.Warning]:
        """The warnings as responses carry them, in the order in which they were first noted."""
        return [shop_pb2.Warning(code=code, message=TEXTS[code], count=count) for code, count in self._counts.items()]
