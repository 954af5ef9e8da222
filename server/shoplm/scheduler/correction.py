"""How far the forecast of waits is off, learnt from the requests that were let in."""

from __future__ import annotations

import math

_QUANTILE = 0.8  # of the requests, that come no later than the corrected forecast
_RATE = 0.02  # by which the logarithm of the factor moves with a request, at most
_LEAST, _MOST = 0.8, 2.0


class Correction:
    """A factor on predicted waits: the quantile of what was observed beside what was predicted.

    It follows the quantile by small steps, so no single request moves it, and it is bounded.
    """

    def __init__(self) -> None:
        self.factor = 1.0

    def saw(self, predicted_seconds: float, observed_seconds: float) -> None:
        """A wait ended, or will never: then `observed_seconds` is infinite. Both are positive."""
        was_late = observed_seconds > self.factor * predicted_seconds
        step = _RATE * (_QUANTILE if was_late else _QUANTILE - 1)
        self.factor = min(max(self.factor * math.exp(step), _LEAST), _MOST)
