"""Few log lines for many failed calls. Without an engine every call fails, and a client that is wrong, or has no token,
may call as often as it likes: a line for each call would say no more, and fill the disk."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context

_SECONDS = 5.0

log = logging.getLogger("shoplm.api")


class FailedCalls:
    """A line for the first one in some seconds, and at their end one with the number of the others."""

    def __init__(self, status: str, level: int = logging.WARNING, seconds: float = _SECONDS) -> None:
        self._status = status
        self._level = level
        self._seconds = seconds
        self._unreported = 0
        self._is_counting = False

    def add(self, why: str, **fields: str) -> None:
        """One more, in the task that serves it. The fields go with its line."""
        if self._is_counting:
            self._unreported += 1
            return
        log.log(self._level, "calls end with %s: %s", self._status, why, extra=fields)
        self._is_counting = True
        # In a context of its own: the number has no request id.
        asyncio.get_running_loop().call_later(self._seconds, self._report, context=Context())

    def _report(self) -> None:
        self._is_counting = False
        if self._unreported:
            log.log(self._level, "%d more calls ended with %s", self._unreported, self._status)
            self._unreported = 0
