"""When training data end, when things are tuned, and when they are tested: the cuts that no future crosses.

    start ........ train cut-offs ........ tuned_at ........ test_at ........ end
                   labels end by tuned_at  labels end by     labels end by
                                           test_at           end

Item rows and nets are fitted on labels before `tuned_at`; the score's weights on labels between `tuned_at` and
`test_at`; prediction heads on all labels before `test_at`; metrics on labels after `test_at`. The bundle that is served
is the one that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoplm.errors import ConfigurationError
from shoplm.history import SECONDS_PER_DAY, utc_moment

HORIZONS = (7, 14, 30)  # days
TRAIN_CUTOFFS = 4
DENSE_WEEKS = 16  # of cut-offs that need no hidden state
_WINDOWS = 5  # the log must hold so many horizons: history, two cut-offs of training, tuning, test


@dataclass(frozen=True, slots=True)
class Timeline:
    """Moments in Unix seconds, UTC."""

    start: float
    end: float  # just after the last event
    tuned_at: float
    test_at: float
    train_at: tuple[float, ...]  # cut-offs of training, oldest first
    horizons: tuple[int, ...]  # days; empty: the log is too short to predict with

    def __post_init__(self) -> None:
        longest = max(self.horizons, default=0) * SECONDS_PER_DAY
        moments = (self.start, *self.train_at, self.tuned_at, self.test_at, self.end)
        if list(moments) != sorted(moments):
            raise ValueError(f"the moments of the timeline are not in order: {moments}")
        ends = [*(moment + longest for moment in self.train_at)]
        if any(moment > self.tuned_at for moment in ends) or self.tuned_at + longest > self.test_at:
            raise ValueError("labels of one part of the timeline reach into the next")

    @property
    def cutoffs(self) -> tuple[float, ...]:
        """Training, tuning and test, oldest first."""
        return (*self.train_at, self.tuned_at, self.test_at)

    @property
    def weekly(self) -> tuple[float, ...]:
        """Cut-offs of the heads a week apart, oldest first: what reads dense features alone can afford that many.
        Labels end by `test_at`."""
        longest = max(self.horizons, default=0) * SECONDS_PER_DAY
        last = self.test_at - longest
        found = [last - 7 * week * SECONDS_PER_DAY for week in range(DENSE_WEEKS)]
        return tuple(sorted({*self.train_at, self.tuned_at, *(each for each in found if each >= self.train_at[0])}))


def make_timeline(start: float, end: float) -> Timeline:
    """Cuts for a log whose first and last event are at `start` and `end` (Unix seconds).

    The longest horizon is the longest that fits five times. Raises ConfigurationError where all events are at one time.
    """
    if not end > start:
        raise ConfigurationError(f"all events are at {utc_moment(start)}: there is no later one to learn from")
    end = end + 1.0
    days = (end - start) / SECONDS_PER_DAY
    horizons = tuple(horizon for horizon in HORIZONS if days >= _WINDOWS * horizon)
    if not horizons:
        span = end - start
        return Timeline(start, end, start + 0.8 * span, start + 0.9 * span, (start + 0.6 * span,), ())
    step = horizons[-1] * SECONDS_PER_DAY
    test_at = (end - step) // SECONDS_PER_DAY * SECONDS_PER_DAY
    tuned_at = test_at - step
    earliest = start + step
    train = [tuned_at - step * (1 + index) for index in range(TRAIN_CUTOFFS)]
    chosen = tuple(sorted(moment for moment in train if moment >= earliest)) or (max(train[0], start),)
    return Timeline(start, end, tuned_at, test_at, chosen, horizons)
