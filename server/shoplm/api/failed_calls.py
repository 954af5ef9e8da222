"""Warns of calls that end with one status, where a line for each would say no more: while there is no engine that is
every call, and a stranger without a token may call as often as he likes."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context

_SECONDS = 5.0

log = logging.getLogger("shoplm.api")


class FailedCalls:
    """A line for the first one, and one with the number of the others every few seconds until there are none."""

    def __init__(self, status: str, seconds: float = _SECONDS) -> None:
        self._status = status
        self._seconds = seconds
        self._untold = 0
        self._is_counting = False

    def add(self, error: Exception) -> None:
        """One more, in the task that serves it."""
        if self._is_counting:
            self._untold += 1
            return
        log.warning("calls end with %s: %s", self._status, error)
        self._count()

    def _count(self) -> None:
        self._is_counting = True
        # In a context of its own: the number has no request id.
        asyncio.get_running_loop().call_later(self._seconds, self._tell, context=Context())

    def _tell(self) -> None:
        self._is_counting = False
        if self._untold:
            log.warning("%d more calls ended with %s", self._untold, self._status)
            self._untold = 0
            self._count()
