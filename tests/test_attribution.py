"""Parts of a history and the forks without them: what is hidden, what is counted again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from shoplm.attribution import (
    Forks,
    Part,
    gone_with,
    item_parts,
    leave_out,
    likeliest,
    prefix_without,
    visit_parts,
)
from shoplm.bundle import PromptSchema
from shoplm.history import SECONDS_PER_DAY, EventKind, History, build_history
from shoplm.prompt import Prefix, PromptBuilder, TemplatePiece, Visit
from shoplm.request import ItemScores
from shoplm.vocabulary import ShopVocabulary

SHOP = ShopVocabulary(1000, (50,), 5)
ITEM = SHOP.level_starts[0]
BASKETS = ((0.0, (1, 2)), (7.0, (2, 3)), (9.0, (4,)), (30.0, (2, 5)))  # day, items


@dataclass(frozen=True)
class Piece:
    text: str
    message: int | None


class Characters:
    """One token per character, and no template around the messages."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_pieces(self, pieces: Sequence[TemplatePiece]) -> list[int]:
        return [token for piece in pieces for token in self.encode(piece.text)]

    def pieces(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = True) -> list[Piece]:
        return [Piece(content, index) for index, (_, content) in enumerate(messages)]


def builder(budget: int = 40) -> PromptBuilder:
    schema = PromptSchema(preamble="Hello.", history_budget_tokens=budget, history_block_tokens=16)
    return PromptBuilder(Characters(), Characters(), schema, SHOP)


def history(baskets: tuple[tuple[float, tuple[int, ...]], ...] = BASKETS, view: int | None = None) -> History:
    rows = [(day, item) for day, items in baskets for item in items]
    kinds = [EventKind.VIEW if item == view else EventKind.PURCHASE for _, item in rows]
    return build_history(
        item=np.array([item for _, item in rows], np.int32),
        has_item=np.ones(len(rows), bool),
        kind=np.array(kinds, np.int8),
        time=np.array([day for day, _ in rows]) * SECONDS_PER_DAY,
        quantity=np.ones(len(rows), np.float32),
        price=np.full(len(rows), np.nan, np.float32),
        basket_key=[f"{day}" for day, _ in rows],
        as_of=40 * SECONDS_PER_DAY,
    )


def parts(of: History, budget: int = 40) -> tuple[Prefix, tuple[Visit, ...], dict[int, Part]]:
    prefix = builder(budget).prefix(of)
    visits = builder(budget).visits(of, prefix)
    return prefix, visits, {int(of.item[part.events[0]]): part for part in item_parts(of, visits)}


def hidden_tokens(prefix: Prefix, part: Part) -> list[int]:
    return [token for start, end in part.spans for token in prefix.tokens[start:end]]


def test_a_part_hides_every_token_of_its_item_and_no_other() -> None:
    prefix, _, items = parts(history())
    for item, part in items.items():
        assert hidden_tokens(prefix, part) == [ITEM + item] * len(part.events)
    assert len(items[2].events) == 3
    assert sorted(items) == [1, 2, 3, 4, 5]


def test_a_visit_is_its_gap_marks_and_items() -> None:
    prefix, visits, items = parts(history(view=3))
    assert [visit.basket for visit in visits] == [0, 1, 2, 3]
    second = visit_parts(visits)[1]
    expected = [SHOP.gap(7), ITEM + 2, SHOP.special("<view>"), ITEM + 3]
    assert hidden_tokens(prefix, second) == expected
    assert hidden_tokens(prefix, items[3]) == [ITEM + 3]  # the mark stays
    assert visits[-1].end == len(prefix.tokens)


def test_a_history_that_was_cut_names_what_the_prompt_holds() -> None:
    long = history(tuple((float(day), (day, day + 1)) for day in range(30)))
    prefix, visits, items = parts(long)
    assert prefix.dropped_baskets > 0
    assert visits[0].basket == prefix.dropped_baskets
    assert min(items) == prefix.dropped_baskets
    for item, part in items.items():
        assert set(hidden_tokens(prefix, part)) == {ITEM + item}


def test_what_is_left_out_is_left_out_everywhere() -> None:
    whole = history()
    _, visits, items = parts(whole)
    left = leave_out(whole, gone_with(whole, [items[2]]))
    assert left.item.tolist() == [1, 3, 4, 5]
    assert left.basket.tolist() == [0, 1, 2, 3]
    without_visit = leave_out(whole, gone_with(whole, visit_parts(visits)[1:2]))
    assert without_visit.item.tolist() == [1, 2, 4, 2, 5]
    assert without_visit.basket.tolist() == [0, 0, 1, 2, 2]


def test_a_prompt_without_a_part_keeps_its_oldest_visit() -> None:
    long = history(tuple((float(day), (day, 49)) for day in range(30)))
    prefix, visits, items = parts(long)
    oldest = visits[0].basket
    for part in (items[49], items[oldest + 2]):
        shorter = prefix_without(builder(), long, prefix, gone_with(long, [part]))
        gone = hidden_tokens(prefix, part)
        named = [token for token in prefix.tokens if token >= ITEM and token not in gone]
        assert [token for token in shorter.tokens if token >= ITEM] == named
    shorter = prefix_without(builder(), long, prefix, gone_with(long, visit_parts(visits)[2:3]))
    assert len(shorter.tokens) == len(prefix.tokens) - 3  # its gap and two items; no older visit moves up
    assert ITEM + oldest in shorter.tokens and ITEM + oldest - 1 not in shorter.tokens


def test_forks_count_again_and_see_a_longer_gap() -> None:
    whole = history()
    prefix, visits, items = parts(whole)
    last = visit_parts(visits)[-1]
    forks = Forks.of(whole, prefix, [items[1], last], builder().recommend_suffix)
    suffixes = [forks.tokens[len(prefix.tokens) + 2 * fork :][:2] for fork in range(3)]
    rec = SHOP.special("<rec>")
    assert suffixes == [(SHOP.gap(10), rec), (SHOP.gap(10), rec), (SHOP.gap(31), rec)]
    assert [len(each) for each in forks.histories] == [7, 6, 5]
    task = forks.task(ItemScores((1,)))
    assert task.hidden == ((), items[1].spans, last.spans)
    assert forks.values(range(6)).tolist() == [[0, 1], [2, 3], [4, 5]]
    longer = forks.repeated(2)
    assert longer.tokens == forks.tokens + suffixes[0] * 2
    assert longer.task(ItemScores((1,))).hidden[3:] == ((), ())


def test_a_part_that_is_the_whole_history_has_no_fork() -> None:
    one = history(((0.0, (1,)), (1.0, (1,))))
    prefix, _, items = parts(one)
    assert Forks.of(one, prefix, [items[1]], builder().recommend_suffix).parts == ()


def test_often_and_lately_come_first_and_weights_count() -> None:
    whole = history()
    _, _, items = parts(whole)
    found = likeliest(list(items.values()), whole, 3)
    assert [int(whole.item[part.events[0]]) for part in found] == [2, 5, 4]
    found = likeliest(list(items.values()), whole, 2, lambda event: 100.0 if whole.item[event] == 1 else 1.0)
    assert [int(whole.item[part.events[0]]) for part in found] == [1, 2]
