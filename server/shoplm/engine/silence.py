"""How long an engine that owes something has said nothing."""

from __future__ import annotations


class Silence:
    """Counted in looks that come at regular times, and not by a clock: when this process was stopped itself, or had
    no time to read what came, that is one look more and no long silence.

    An engine owes something while a call waits for it, and since anything was sent to it: it reports what it has done,
    also of calls that their callers have left.
    """

    __slots__ = ("_looks", "_received", "_sent")

    def __init__(self) -> None:
        self._looks = 0
        self._sent = self._received = False

    def sent(self) -> None:
        """Something was sent to the engine."""
        self._sent = True

    def received(self) -> None:
        """Something came from it."""
        self._received = True

    def look(self, *, calls_wait: bool) -> int:
        """One more look; how many in a row have now found nothing of what is owed."""
        if self._received:
            self._looks, self._sent = 0, False
        elif self._sent or calls_wait:
            self._looks += 1
        self._received = False
        return self._looks
