"""What each service was asked for of late, and what of it was begun: how services share a busy engine where no weights
are set.

Each gets the same part of its requests begun, so an overload costs all of them alike. Requests count when they are
begun, whole: an answer's tokens are computed later, and until then a service would seem to have had too little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from shoplm.request import Service

_FORGET_SECONDS = 30.0  # what was so long ago weighs 1 / e
_MOST_RATE = 2.0  # engines' worth of work a second, that the flood of one service counts as
_LEAST_SHARE = 0.1  # of a busy engine, for a service however little it is asked for
_TYPICAL_WEIGHT = 0.02  # of the latest request in what a service's requests typically cost


class Demand:
    """Forgotten counts of requests, and what they typically cost."""

    def __init__(self) -> None:
        self.typical_seconds = dict.fromkeys(Service, 0.0)  # of work of a request: the mean of the latest ones
        self._seen = dict.fromkeys(Service, 0)
        self._asked = dict.fromkeys(Service, 0.0)
        self._begun = dict.fromkeys(Service, 0.0)
        self._now = 0.0
        self._leads: dict[Service, float] | None = None  # as of the last request that came or was begun; None: unknown

    def asked(self, service: Service, work_seconds: float | None, now: float) -> None:
        """A request that is so much work, or as much as is typical, came, whether or not it is let in."""
        if now > self._now:
            kept = math.exp((self._now - now) / _FORGET_SECONDS)
            for each in Service:
                self._asked[each] *= kept
                self._begun[each] *= kept
            self._now = now
        if work_seconds is not None:
            self._seen[service] += 1
            weight = max(_TYPICAL_WEIGHT, 1 / self._seen[service])
            self.typical_seconds[service] += weight * (work_seconds - self.typical_seconds[service])
        self._asked[service] += 1
        self._leads = None

    def begun(self, service: Service, asked: float) -> None:
        """A request was started that was asked for at `asked`. It counts as it does among those: who waits long would
        seem to have more begun than asked for, and wait longer."""
        self._begun[service] += math.exp(min(asked - self._now, 0.0) / _FORGET_SECONDS)
        self._leads = None

    def leads(self) -> Mapping[Service, float]:
        """Seconds of work that each service has had beyond its part."""
        if self._leads is None:
            self._leads = self._find_leads()
        return self._leads

    def _find_leads(self) -> dict[Service, float]:
        asked = self._asked_seconds()
        begun = {service: count * self.typical_seconds[service] for service, count in self._begun.items()}
        total = sum(begun.values())
        part = total / (sum(asked.values()) or 1.0)
        return {s: begun[s] - max(part * asked[s], min(asked[s], _LEAST_SHARE * total)) for s in Service}

    def shares(self) -> dict[Service, float]:
        """What part of a busy engine each may have at most."""
        asked = self._asked_seconds()
        total = sum(asked.values()) or 1.0
        return {service: max(each / total, _LEAST_SHARE) for service, each in asked.items()}

    def _asked_seconds(self) -> dict[Service, float]:
        most = _MOST_RATE * _FORGET_SECONDS
        return {service: min(count * self.typical_seconds[service], most) for service, count in self._asked.items()}
