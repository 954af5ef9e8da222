"""The shop's token ids: a table of their own behind the text vocabulary, so no text can spell one.

Order: special tokens, then code tokens level by level (with codes of one token: one per item), then product types.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

# Upper bounds, in days, of the gaps between baskets; the last bucket is open. Each gap is one token.
GAP_DAYS = (0.5, 1.5, 2.5, 4.5, 7.5, 10.5, 14.5, 21.5, 30.5, 45.5, 60.5, 90.5, 180.5)

# What a special token says: its input embedding is made from this text when the bundle stores none.
SPECIAL_TEXTS: dict[str, str] = {
    "<rec>": " The customer will buy next:",
    "<predict>": " What will the customer do next?",
    "<basket>": " First visit, bought:",
    "<view>": " looked at:",
    "<cart>": " put into the cart:",
    "<return>": " returned:",
    **{
        f"<gap:{index}>": f" Then {_text}, bought:"
        for index, _text in enumerate(
            (
                "later the same day",
                "one day later",
                "two days later",
                "four days later",
                "one week later",
                "nine days later",
                "two weeks later",
                "three weeks later",
                "one month later",
                "six weeks later",
                "two months later",
                "three months later",
                "half a year later",
                "more than half a year later",
            )
        )
    },
}
_SPECIAL_INDEX = {name: index for index, name in enumerate(SPECIAL_TEXTS)}


@dataclass(frozen=True)
class ShopVocabulary:
    """Offsets of the shop's token ids behind `text_size` text ids."""

    text_size: int  # rows of the base's embedding
    level_sizes: tuple[int, ...]  # codes per level; one level: number of items
    type_count: int  # product types, inputs only

    @property
    def size(self) -> int:
        """All valid token ids are below this."""
        return self.first_type + self.type_count

    @property
    def shop_size(self) -> int:
        """Rows of the shop's own input table."""
        return self.size - self.text_size

    @cached_property
    def level_starts(self) -> tuple[int, ...]:
        """First token id of each code level."""
        starts = [self.text_size + len(SPECIAL_TEXTS)]
        for size in self.level_sizes[:-1]:
            starts.append(starts[-1] + size)
        return tuple(starts)

    @cached_property
    def _first_gap(self) -> int:
        return self.special("<gap:0>")  # the others follow it

    @cached_property
    def first_type(self) -> int:
        return self.text_size + len(SPECIAL_TEXTS) + sum(self.level_sizes)

    def special(self, name: str) -> int:
        """Token id of a special token such as `<rec>`; KeyError for an unknown name."""
        return self.text_size + _SPECIAL_INDEX[name]

    def gap(self, days: float) -> int:
        """Token id of the gap of `days` between two baskets; negative gaps count as none."""
        return self._first_gap + bisect_left(GAP_DAYS, days)

    def product_type(self, index: int) -> int:
        """Token id of a product type."""
        if not 0 <= index < self.type_count:
            raise ValueError(f"product type {index} outside 0..{self.type_count - 1}")
        return self.first_type + index
