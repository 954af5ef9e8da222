"""Passages of the shop's texts: how they are cut and found."""

from __future__ import annotations

from pathlib import Path

import pytest
from shoplm.errors import BundleError
from shoplm.retrieval import MAX_PASSAGE_CHARACTERS, Knowledge, read_knowledge, read_texts, split_passages

TEXT = """Welcome to our shop.

# Returns

Return unopened items within 30 days.

Bring the receipt.

## Delivery ##
Delivery is free over 50 dollars.

## Empty

# Opening hours
Open from 8 to 22, on Sundays from 10.
"""


@pytest.fixture
def knowledge() -> Knowledge:
    return Knowledge(split_passages("store-service.md", TEXT))


def test_a_passage_is_what_stands_under_a_heading(knowledge: Knowledge) -> None:
    assert [(passage.title, passage.text.split("\n")[0]) for passage in knowledge.passages] == [
        ("store service", "Welcome to our shop."),
        ("Returns", "Return unopened items within 30 days."),
        ("Delivery", "Delivery is free over 50 dollars."),
        ("Opening hours", "Open from 8 to 22, on Sundays from 10."),
    ]
    assert knowledge.passages[1].text.endswith("Bring the receipt.")


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("What is your return policy?", "Returns"),
        ("returning without a receipt", "Returns"),
        ("How much is DELIVERY", "Delivery"),
        ("are you open on sunday", "Opening hours"),
    ],
)
def test_the_passage_that_answers_comes_first(knowledge: Knowledge, question: str, title: str) -> None:
    assert knowledge.search(question, 2)[0].title == title


@pytest.mark.parametrize("question", ["", "???", "xylophone", "the of and", "\x00\x1b"])
def test_a_question_that_shares_no_word_finds_nothing(knowledge: Knowledge, question: str) -> None:
    assert knowledge.search(question, 3) == []


def test_no_more_than_asked_for_and_none_twice(knowledge: Knowledge) -> None:
    found = knowledge.search("return delivery open receipt", 2)
    assert len(found) == len(set(found)) == 2
    assert knowledge.search("return", 0) == []


def test_long_texts_are_cut_at_blank_lines() -> None:
    paragraphs = [f"paragraph {number} " + "word " * 60 for number in range(10)]
    passages = split_passages("long.md", "# Long\n" + "\n\n".join(paragraphs))
    assert len(passages) > 1
    assert all(passage.title == "Long" and len(passage.text) <= MAX_PASSAGE_CHARACTERS for passage in passages)
    assert "\n\n".join(passage.text for passage in passages).split() == " ".join(paragraphs).split()


def test_a_bundle_without_texts_has_none(tmp_path: Path) -> None:
    assert len(read_knowledge(tmp_path)) == 0
    assert read_knowledge(tmp_path).search("returns", 3) == []


def test_files_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "knowledge").mkdir()
    (tmp_path / "knowledge" / "b.md").write_text("# B\nbeta")
    (tmp_path / "knowledge" / "a.md").write_text("# A\nalpha")
    (tmp_path / "knowledge" / "c.txt").write_text("not read")
    assert [passage.source for passage in read_knowledge(tmp_path).passages] == ["a.md", "b.md"]
    (tmp_path / "knowledge" / "d.md").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"d\.md"):
        read_knowledge(tmp_path)


def test_texts_are_the_md_files_of_a_folder(tmp_path: Path) -> None:
    """Not what a file system or an editor hid beside them; a mark of byte order is no part of the first heading."""
    (tmp_path / "returns.md").write_bytes(b"\xef\xbb\xbf# Returns\n\nWithin 30 days.\n")
    (tmp_path / "._returns.md").write_bytes(b"\x00\x05\x16\x07\xff")
    (tmp_path / "drafts.md").mkdir()
    (tmp_path / "notes.txt").write_text("# Notes\n\nNot for customers.\n")
    assert [(passage.title, passage.text) for passage in read_texts(tmp_path).passages] == [
        ("Returns", "Within 30 days.")
    ]
