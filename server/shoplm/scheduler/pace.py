"""How fast a queue moves: seconds of its work that are done per second, while more of it waits."""

from __future__ import annotations

import math

_FORGET_SECONDS = 2.0  # what was seen so long ago weighs 1 / e
_PRIOR_SECONDS = 0.5  # of watching, that the guess weighs


class Pace:
    """Watches the whole queue, or one service's part of it. It sees everything that no model of the engine holds:
    answers that have yet to begin, and what steps cost beside their load."""

    def __init__(self) -> None:
        self._done = self._watched = 0.0  # forgotten sums
        self._step_work = 0.0  # of the step that runs
        self._since: float | None = None  # when it was planned; None: nothing was left waiting

    def planned(self, work_seconds: float, more_waits: bool, now: float) -> None:
        """A step was planned that does so much of the queue's work, and more of it waits or none."""
        if not more_waits:  # how fast it could have gone is not seen
            self._done = self._watched = 0.0
            self._since = None
            return
        if self._since is not None:
            seconds = now - self._since
            kept = math.exp(-seconds / _FORGET_SECONDS)
            self._done = kept * self._done + self._step_work
            self._watched = kept * self._watched + seconds
        self._step_work, self._since = work_seconds, now

    def wait_seconds(self, work_seconds: float, guess: float) -> float:
        """How long this work takes, where `guess` > 0 is what a model makes of it."""
        done = self._done + _PRIOR_SECONDS * work_seconds / guess
        return work_seconds * (self._watched + _PRIOR_SECONDS) / done
