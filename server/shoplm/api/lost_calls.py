"""Warns of calls that find no engine: while there is none that is every call, and a line for each would say no more."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context

_SECONDS = 5.0

log = logging.getLogger("shoplm.api")


class LostCalls:
    """A line for the first one, and one with the number of the others every few seconds until there are none."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._untold = 0
        self._is_counting = False

    def add(self, error: Exception) -> None:
        """One more, in the task that serves it."""
        if self._is_counting:
            self._untold += 1
            return
        log.warning("calls end with UNAVAILABLE: %s", error)
        self._count()

    def _count(self) -> None:
        self._is_counting = True
        # In a context of its own: the number has no request id.
        asyncio.get_running_loop().call_later(self._seconds, self._tell, context=Context())

    def _tell(self) -> None:
        self._is_counting = False
        if self._untold:
            log.warning("%d more calls ended with UNAVAILABLE", self._untold)
            self._untold = 0
            self._count()
