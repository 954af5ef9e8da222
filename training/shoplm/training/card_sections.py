"""Sections of a card that are measured on the bundle when it is there."""

from __future__ import annotations

_BEFORE = "## Privacy"


def with_section(card: str, section: str) -> str:
    """The card with the section before the one about privacy, in place of an older one of the same heading."""
    heading = section.split("\n", 1)[0]
    start = card.find(f"{heading}\n")
    if start >= 0:
        end = card.find("\n## ", start)
        card = card[:start] + (card[end + 1 :] if end >= 0 else "")
    at = card.find(_BEFORE)
    if at < 0:
        return f"{card.rstrip()}\n\n{section}\n"
    return f"{card[:at]}{section}\n\n{card[at:]}"
