"""Prompts: the customer is a stable prefix, the task the only thing behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoplm.bundle import PromptSchema
from shoplm.history import SECONDS_PER_DAY, EventKind, History, build_history
from shoplm.prompt import PromptBuilder, TemplatePiece
from shoplm.vocabulary import ShopVocabulary

DAY = SECONDS_PER_DAY
SHOP = ShopVocabulary(1000, (50,), 5)
BUDGET, BLOCK = 40, 16


@dataclass(frozen=True)
class Piece:
    text: str
    message: int | None


class Characters:
    """One token per character, other ones for a template's own text."""

    def encode_pieces(self, pieces: Sequence[TemplatePiece]) -> list[int]:
        return [ord(c) % 500 + (500 if piece.message is None else 0) for piece in pieces for c in piece.text]


class Marked:
    """[role]content, with the template's own text in brackets."""

    def pieces(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = True) -> Sequence[Piece]:
        parts: list[Piece] = []
        for index, (role, content) in enumerate(messages):
            parts += [Piece(f"[{role}]", None), Piece(content, index)]
        return [*parts, Piece("[assistant]", None)] if add_generation_prompt else parts


def builder(budget: int = BUDGET, block: int = BLOCK) -> PromptBuilder:
    schema = PromptSchema(
        preamble="Hello.", attributes=("age",), history_budget_tokens=budget, history_block_tokens=block
    )
    return PromptBuilder(Characters(), Marked(), schema, SHOP)


def purchases(
    baskets: Sequence[tuple[float, Sequence[int]]], as_of: float = 1e4, attributes: tuple[tuple[str, str], ...] = ()
) -> History:
    """(day, item rows) per basket."""
    rows = [(day, item) for day, items in baskets for item in items]
    return build_history(
        item=np.array([item for _, item in rows], np.int32),
        has_item=np.ones(len(rows), bool),
        kind=np.zeros(len(rows), np.int8),
        time=np.array([day * DAY for day, _ in rows], np.float64),
        quantity=np.ones(len(rows), np.float32),
        price=np.ones(len(rows), np.float32),
        basket_key=[f"{day}" for day, _ in rows],
        as_of=as_of * DAY,
        attributes=attributes,
    )


def shop_tokens(tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token >= SHOP.text_size]


def test_a_basket_is_the_gap_before_it_and_its_items_once_each_in_order() -> None:
    prefix = builder().prefix(purchases([(1.0, [3, 1, 3]), (8.0, [2])]))
    item = SHOP.level_starts[0]
    assert shop_tokens(prefix.tokens) == [SHOP.special("<basket>"), item + 1, item + 3, SHOP.gap(7.0), item + 2]


def test_other_kinds_are_marked_once_and_rare_items_stand_for_their_type() -> None:
    known = build_history(
        item=np.array([4, 5, 2, 6], np.int32),
        has_item=np.array([True, True, False, True]),
        kind=np.array([EventKind.VIEW, EventKind.VIEW, EventKind.PURCHASE, EventKind.CART], np.int8),
        time=np.full(4, DAY),
        quantity=np.ones(4, np.float32),
        price=np.ones(4, np.float32),
        basket_key=["x"] * 4,
        as_of=2 * DAY,
    )
    item = SHOP.level_starts[0]
    assert shop_tokens(builder().prefix(known).tokens) == [
        SHOP.special("<basket>"),
        SHOP.product_type(2),
        SHOP.special("<cart>"),
        item + 6,
        SHOP.special("<view>"),
        item + 4,
        item + 5,
    ]


def test_the_task_is_a_suffix_and_carries_what_is_volatile() -> None:
    made = builder()
    early, late = (purchases([(1.0, [3])], as_of=day) for day in (3.0, 40.0))
    assert made.prefix(early) == made.prefix(late)
    prefix = made.prefix(early)
    assert made.recommend(prefix, early) == (*prefix.tokens, SHOP.gap(2.0), SHOP.special("<rec>"))
    assert made.predict(prefix, late) == (*prefix.tokens, SHOP.gap(39.0), SHOP.special("<predict>"))
    assert made.chat(prefix, [("user", "Hi")])[: len(prefix.tokens)] == prefix.tokens


def test_nobody_gets_the_preamble_and_no_gap() -> None:
    made = builder()
    nobody = made.prefix(None)
    assert shop_tokens(nobody.tokens) == []
    assert made.recommend(nobody, None) == (*nobody.tokens, SHOP.special("<rec>"))
    assert made.prefix(purchases([])) == nobody


def test_attributes_change_the_prefix_and_come_sorted() -> None:
    one = builder().prefix(purchases([(1.0, [3])], attributes=(("b", "2"), ("a", "1"))))
    two = builder().prefix(purchases([(1.0, [3])], attributes=(("a", "1"), ("b", "2"))))
    assert one == two != builder().prefix(purchases([(1.0, [3])]))


@settings(max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_new_baskets_only_append_until_a_whole_block_is_dropped(sizes: list[int]) -> None:
    made = builder()
    baskets = [(float(day), list(range(size))) for day, size in enumerate(sizes)]
    drops = 0
    last = made.prefix(purchases(baskets[:1]))
    for count in range(2, len(baskets) + 1):
        prefix = made.prefix(purchases(baskets[:count]))
        history_tokens = len(shop_tokens(prefix.tokens))
        assert history_tokens <= BUDGET
        if prefix.dropped_baskets == last.dropped_baskets:
            assert prefix.tokens[: len(last.tokens)] == last.tokens
        else:
            drops += 1
            assert prefix.dropped_baskets > last.dropped_baskets
        last = prefix
    total = sum(size + 1 for size in sizes)
    assert drops <= -(-max(total - BUDGET, 0) // BLOCK)


def test_a_basket_beyond_the_budget_is_cut() -> None:
    prefix = builder(budget=10, block=5).prefix(purchases([(1.0, list(range(30)))]))
    assert len(shop_tokens(prefix.tokens)) == 10
    assert (prefix.dropped_baskets, prefix.truncated_baskets) == (0, 1)
    whole = builder(budget=31).prefix(purchases([(1.0, list(range(30)))]))
    assert whole.truncated_baskets == 0
    after_another = builder(budget=10, block=5).prefix(purchases([(1.0, [3]), (2.0, list(range(30)))]))
    assert (after_another.dropped_baskets, after_another.truncated_baskets) == (1, 2)


def test_a_system_message_and_passages_come_behind_the_history() -> None:
    made = builder()
    prefix = made.prefix(purchases([(1.0, [3])]))
    tokens = made.chat(prefix, [("system", "S"), ("user", "U")], ["fact"])
    behind = tokens[len(prefix.tokens) :]
    facts = "\n\nS\n\nFacts of the shop:\n- fact"
    expected = [Piece(facts, 0), Piece("[user]", None), Piece("U", 1), Piece("[assistant]", None)]
    assert list(behind) == Characters().encode_pieces(expected)


def test_without_a_bundle_there_is_only_chat() -> None:
    made = PromptBuilder(Characters(), Marked())
    assert made.prefix(None).tokens == ()
    assert made.chat(made.prefix(None), [("user", "Hi")])
    with pytest.raises(ValueError, match="no bundle"):
        made.recommend(made.prefix(None), None)
    with pytest.raises(ValueError, match="come together"):
        PromptBuilder(Characters(), Marked(), None, SHOP)


def test_items_of_several_codes_are_several_tokens() -> None:
    shop = ShopVocabulary(1000, (4, 6), 0)
    codes = np.array([[0, 1], [3, 5]], np.int32)
    made = PromptBuilder(Characters(), Marked(), PromptSchema(preamble="x"), shop, codes)
    tokens = [token for token in made.prefix(purchases([(1.0, [1])])).tokens if token >= 1000]
    assert tokens[1:] == [shop.level_starts[0] + 3, shop.level_starts[1] + 5]
