"""What a customer's latest message asks for: a follow-up such as "And what does it cost?" says it with those before it.

A message has a topic of its own when words are left after those that only hold sentences together, and those that ask
something of any topic (how much, the price). One without a topic is a follow-up, and so is a short one that refers back
(it, them). The words are English: in other languages each message speaks for itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def question_of(messages: Sequence[str]) -> str:
    """The last of a customer's messages, oldest first, behind those that it follows up."""
    return "\n".join(messages[latest_topic(messages) :])


def latest_topic(messages: Sequence[str]) -> int:
    """Which of a customer's messages, oldest first, is the latest with a topic of its own; the first where none has."""
    start = len(messages) - 1
    while start > 0 and _follows_up(messages[start]):
        start -= 1
    return start


def _follows_up(message: str) -> bool:
    words = _words(message)
    topic = words - _CONNECTING - _REFERRING - _ASKING
    return len(topic) <= _SHORT if words & _REFERRING else not topic


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


_SHORT = 2  # words of topic; who says more has said what it is about
_REFERRING = _words("it its that these they them their those one ones")
_ASKING = _words("available cheap cheaper cost costs expensive long many much price prices stock")
_CONNECTING = _words(
    """a about also am an and any are aren as at be been but by can could d did do does doesn don else for from had has
    have how i if in is isn just ll m may me more my no not of off ok okay on only or our please re really s shall
    should so some still t than the then there this to too up us ve was we were what when where which while who whose
    why will with would yes you your"""
)
