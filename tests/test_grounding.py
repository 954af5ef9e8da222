"""Chat's passages: an item counts when its name stands in the question, habits when the customer asks for them."""

from __future__ import annotations

import numpy as np
import pytest
from shoplm.catalog.items import Catalog, ItemFacts
from shoplm.followup import question_of
from shoplm.grounding import MAX_HABITS, Grounding
from shoplm.history import EventKind, History, build_history
from shoplm.retrieval import Knowledge, Passage

_TITLES = ["Olive oil, 34 oz", "Olive oil, 8 oz", "Oil, motor", "Tea", "", "Olive oil, 34 oz", "Bread"]
_RETURNS = Passage("returns.md", "Returns", "Unopened goods and oil can be returned within 30 days.")


@pytest.fixture(scope="module")
def grounding() -> Grounding:
    catalog = Catalog(
        item_ids=[str(row) for row in range(len(_TITLES))],
        titles=_TITLES,
        categories=["Pantry"] * len(_TITLES),
        prices=np.array([6.99, 3.19, 9.0, np.nan, 1.0, 7.5, 2.0]),
        in_stock=np.array([title != "Bread" for title in _TITLES]),
        type_texts=[],
        rare={},
        rare_facts=(ItemFacts("Reading glasses, 2.0", "Optics", 4.5), ItemFacts("Bread", "Other", 9.0)),
    )
    return Grounding(Knowledge([_RETURNS]), catalog, "EUR", decay_days=30.0)


def _history(items: list[int]) -> History:
    count = len(items)
    return build_history(
        item=np.array(items, np.int32),
        has_item=np.ones(count, bool),
        kind=np.full(count, int(EventKind.PURCHASE), np.int8),
        time=np.arange(count, dtype=np.float64),
        quantity=np.ones(count, np.float32),
        price=np.ones(count, np.float32),
        basket_key=np.array([""] * count),
        as_of=float(count),
        attributes=(),
    )


def _titles(passages: list[Passage]) -> list[str]:
    return [passage.title for passage in passages]


def test_items_that_are_not_recommended_are_found_too(grounding: Grounding) -> None:
    glasses = grounding.search("Have you got reading glasses?", None, 2)[0]
    assert (glasses.title, glasses.text) == ("Reading glasses, 2.0", "yes, we sell it, category Optics, price 4.50 EUR")
    bread = grounding.search("I need bread", None, 2)[0]  # rows come first
    assert bread.text == "yes, we sell it, but it is out of stock, category Pantry, price 2.00 EUR"
    assert max(grounding.rows_with_facts) < len(_TITLES)


def test_who_asks_for_more_than_an_item_is_is_not_told_that_it_is_sold(grounding: Grounding) -> None:
    assert (
        grounding.search("Do you sell bread knives?", None, 2)[0].text
        == "out of stock, category Pantry, price 2.00 EUR"
    )
    assert grounding.search("What do olive oil lamps cost?", None, 2)[0].text == "category Pantry, price 6.99 EUR"


def test_an_item_is_found_by_its_name(grounding: Grounding) -> None:
    found = grounding.search("What does OLIVE OIL cost?", _history([]), 4)
    assert _titles(found) == [
        "Olive oil, 34 oz",
        "Olive oil, 8 oz",
        "Returns",
    ]  # not the motor oil: its words are taken
    assert found[0].text.endswith("price 6.99 EUR")  # of two items with this title, the first
    assert _titles(grounding.search("Can I return olive trees?", _history([]), 4)) == ["Returns"]
    assert _titles(grounding.search("bread and olive oil", _history([]), 2)) == ["Olive oil, 34 oz", "Returns"]


def test_texts_that_share_no_more_than_words_that_ask_are_left_out_beside_items() -> None:
    catalog = Catalog(["0"], ["Olive oil, 8 oz"], ["Pantry"], np.array([3.19]), np.ones(1, bool), [], {})
    delivery = Passage("delivery.md", "Delivery", "Delivery costs 5 euros.")
    grounding = Grounding(Knowledge([_RETURNS, delivery]), catalog, "EUR", decay_days=30.0)
    assert _titles(grounding.search("What does olive oil cost?", None, 4)) == ["Olive oil, 8 oz", "Returns"]
    assert _titles(grounding.search("What does delivery cost?", None, 4)) == ["Delivery"]
    both = grounding.search("What does the delivery of olive oil cost?", None, 4)
    assert set(_titles(both)) >= {"Olive oil, 8 oz", "Delivery"}


def test_an_item_whose_whole_title_is_named_stands_alone(grounding: Grounding) -> None:
    assert _titles(grounding.search("Can I return Olive oil 8 oz?", _history([]), 4)) == ["Olive oil, 8 oz"]
    both = grounding.search("olive oil, 34 oz, or olive oil, 8 oz?", _history([0]), 4)
    assert _titles(both) == ["Olive oil, 34 oz", "Olive oil, 8 oz"]
    assert _titles(grounding.search("Bread returned?", _history([]), 4)) == ["Bread", "Returns"]  # one word is a name


def test_an_item_whose_name_holds_what_is_asked_for_is_found(grounding: Grounding) -> None:
    assert _titles(grounding.search("Do you sell OLIVES?", _history([]), 4)) == ["Olive oil, 34 oz", "Olive oil, 8 oz"]
    found = grounding.search("What is the price of oils?", _history([]), 4)
    assert _titles(found) == ["Oil, motor", "Olive oil, 34 oz", "Returns"]  # the closest name first
    # What the name lacks is asked for, too; and words that ask are no item's.
    assert _titles(grounding.search("Do you sell olive trees?", _history([]), 4)) == []
    assert _titles(grounding.search("What do you have in stock?", None, 4)) == []


@pytest.mark.parametrize("titles", [["?"], ["牛奶"], ["a", "b"], []])
def test_titles_of_few_words_or_none_are_no_hindrance(titles: list[str]) -> None:
    count = len(titles)
    catalog = Catalog(titles, titles, [""] * count, np.ones(count), np.ones(count, bool), [], {})
    grounding = Grounding(Knowledge([Passage("x.md", "?", "!")]), catalog, "EUR", decay_days=30.0)
    found = grounding.search("Do you have 牛奶 ?", None, 3)
    assert _titles(found) == [title for title in titles if title == "牛奶"]


def test_an_item_without_a_price_or_a_title_is_none(grounding: Grounding) -> None:
    assert grounding.search("Do you have tea?", _history([]), 3) == []


def test_the_count_is_a_bound(grounding: Grounding) -> None:
    assert grounding.search("olive oil", _history([]), 0) == []
    assert len(grounding.search("olive oil, oil, returned?", _history([]), 2)) == 2


def test_habits_are_offered_to_whoever_asks_for_theirs(grounding: Grounding) -> None:
    bought = _history([6, 6, 6, 0, 1])
    (habits, *_) = grounding.search("What do I usually buy?", bought, 2)
    assert (habits.source, habits.text) == ("customer", "Bread; Olive oil")
    assert grounding.search("What do I usually buy?", _history([]), 2) == []
    assert "customer" not in {each.source for each in grounding.search("Where is most of the bread?", bought, 3)}
    assert len(grounding.habits(_history([0, 2, 3, 6] * 3))[0].text.split(";")) <= MAX_HABITS


_MILK = "Do you sell chocolate milk?"


@pytest.mark.parametrize(
    "follow_up",
    [
        "And what does it cost?",
        "How much is it?",
        "And the price?",
        "How much?",
        "What's the price of that?",
        "Can I return it?",
        "Are they gluten-free?",
        "Which one is cheaper?",
        "Do you still have it in stock?",
        "Yes, please.",
        "Why?",
        "?",
    ],
)
def test_a_follow_up_is_asked_with_what_it_follows(follow_up: str) -> None:
    assert question_of([_MILK, follow_up]) == f"{_MILK}\n{follow_up}"
    # Back to the message that names the topic, and no further.
    assert question_of(["Where are you?", _MILK, "How much?", follow_up]) == f"{_MILK}\nHow much?\n{follow_up}"


@pytest.mark.parametrize(
    "new_topic",
    [
        "And what are your opening hours?",
        "How much is delivery?",
        "What about returns?",
        "And white bread?",
        "Do you deliver?",
        "When do you open?",
        "What do I usually buy?",
        "Is it possible to pay with a gift card?",
        "Where do I find the loyalty card and what does it cost me?",
        "Was kostet das?",
        "Thanks!",
    ],
)
def test_a_new_topic_is_asked_alone(new_topic: str) -> None:
    assert question_of([_MILK, new_topic]) == new_topic
    assert question_of([_MILK, "How much?", new_topic]) == new_topic


@pytest.mark.parametrize("only", [_MILK, "And what does it cost?", "How much?", "", "\u0000"])
def test_a_first_message_is_asked_as_it_is(only: str) -> None:
    assert question_of([only]) == only


def test_what_it_costs_is_the_price_of_the_item_asked_for(grounding: Grounding) -> None:
    conversation = ["Do you sell olive oil?", "And what does it cost?"]
    assert _titles(grounding.search(question_of(conversation), _history([]), 3))[:2] == _TITLES[:2]
    assert _titles(grounding.search(question_of([*conversation, "Can bread be returned?"]), _history([]), 2)) == [
        "Bread",
        "Returns",
    ]
