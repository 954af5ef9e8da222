"""What a step costs, learnt from the engine's own steps.

    seconds = step + token * tokens + kv * kv_tokens + row * rows

`kv_tokens` are keys that the step's queries read, summed over the queries: the work of attention. The coefficients
minimise the squared error relative to what was measured, old steps forgotten exponentially, with a weak pull towards
what was known before, at first a prior, and none below zero. So what steps that are all alike do not tell stays as it
was learnt. Pulled to the prior, where the constant part is long, tokens would seem dear again and steps be kept small,
from which nothing else could be learnt. Steps that fit badly weigh less (Huber's weights), and a slow spell of the
machine, which scales everything, is followed by one factor instead of being learnt into the coefficients.
"""

from __future__ import annotations

from typing import NamedTuple

MIN_SAMPLES = 8  # steps before the predictions count as such
_FORGET = 0.995  # per step
_PULL = 0.002  # weight of what was known before, in steps
_SWEEPS = 6  # of coordinate descent per step; it starts from the last solution
_HUBER = 2.5  # errors up to so many times the typical one count in full
_LEAST_HUBER = 0.05
_MOST_RATIO = 4.0  # a step that takes longer than so many times the prediction counts as so long
_PACE_FORGET = 0.95
_SLOWEST, _FASTEST = 4.0, 0.25


class StepLoad(NamedTuple):
    """What a step computes."""

    tokens: int
    kv_tokens: int
    rows: int  # requests, and guesses of how answers go on, each of which is read like a request


class Coefficients(NamedTuple):
    """Seconds of a step, and of each unit of its load."""

    step: float
    token: float
    kv: float
    row: float

    def seconds(self, load: StepLoad) -> float:
        """Seconds of a step with this load."""
        return self.step + self.token * load.tokens + self.kv * load.kv_tokens + self.row * load.rows


PRIOR = Coefficients(step=3e-3, token=2e-4, kv=1e-7, row=3e-4)  # between a laptop and a GPU: too hopeful to refuse by


def kv_tokens(start: int, count: int) -> int:
    """Keys that the tokens `start` .. `start + count - 1` of one sequence read: each those before it and its own."""
    return count * start + count * (count + 1) // 2


class CostModel:
    """Predicts a step's seconds; each measured step refines it. A constant amount of work per step."""

    def __init__(self, prior: Coefficients = PRIOR) -> None:
        self._prior = prior
        self.samples = 0
        self.coefficients = prior  # at the machine's present pace
        self._pace_seconds = self._pace_predicted = 0.0  # forgotten sums
        self._pace = 1.0
        # Normal equations for z = coefficients / prior; without a sample z = 1.
        self._gram = [[_PULL if i == j else 0.0 for j in range(4)] for i in range(4)]
        self._moment = [_PULL] * 4
        self._solution = [1.0] * 4
        self._typical_error = 1.0

    @property
    def is_fitted(self) -> bool:
        """Enough steps were seen to refuse work by the predictions."""
        return self.samples >= MIN_SAMPLES

    def seconds(self, load: StepLoad) -> float:
        """Predicted seconds of a step."""
        return self.coefficients.seconds(load)

    def work_seconds(self, tokens: int, kv: int, rows: int) -> float:
        """Seconds that this load adds to a step."""
        each = self.coefficients
        return each.token * tokens + each.kv * kv + each.row * rows

    def observe(self, load: StepLoad, seconds: float) -> float:
        """Learn from a step that took `seconds` > 0; returns |predicted - measured| / measured of before."""
        predicted = self.seconds(load)
        error = abs(predicted - seconds) / seconds
        fitted = predicted / self._pace
        # At the pace at which the coefficients hold, so that a slow spell does not bend them.
        self._learn(load, min(seconds, _MOST_RATIO * predicted if self.is_fitted else seconds) / self._pace)
        self.samples += 1
        if self.samples > MIN_SAMPLES:
            self._follow_pace(fitted, min(seconds, _MOST_RATIO * predicted))
        scales = (z * self._pace for z in self._solution)
        self.coefficients = Coefficients(*(scale * each for scale, each in zip(scales, self._prior, strict=True)))
        return error

    def _learn(self, load: StepLoad, seconds: float) -> None:
        prior, z, gram, moment = self._prior, self._solution, self._gram, self._moment
        parts = (prior.step, prior.token * load.tokens, prior.kv * load.kv_tokens, prior.row * load.rows)
        fitted = parts[0] * z[0] + parts[1] * z[1] + parts[2] * z[2] + parts[3] * z[3]
        # Relative to the larger of the two, so that neither a far too slow nor a far too fast step can pull hard.
        scale = max(seconds, fitted)
        target = seconds / scale
        shares = [part / scale for part in parts]
        error = abs(seconds - fitted) / scale
        bound = max(_LEAST_HUBER, _HUBER * self._typical_error)
        weight = 1.0 if error <= bound else bound / error
        self._typical_error += 0.05 * (min(error, bound) - self._typical_error)
        for i, share in enumerate(shares):
            row = gram[i]
            for j in range(4):
                row[j] = _FORGET * row[j] + weight * share * shares[j]
            # What was known is not forgotten where nothing new is seen.
            row[i] += (1 - _FORGET) * _PULL
            moment[i] = _FORGET * moment[i] + weight * share * target + (1 - _FORGET) * _PULL * z[i]
        for _ in range(_SWEEPS):
            for i in range(4):
                row = gram[i]
                rest = row[0] * z[0] + row[1] * z[1] + row[2] * z[2] + row[3] * z[3] - row[i] * z[i]
                z[i] = max(0.0, (moment[i] - rest) / row[i])

    def _follow_pace(self, fitted: float, seconds: float) -> None:
        self._pace_seconds = _PACE_FORGET * self._pace_seconds + seconds
        self._pace_predicted = _PACE_FORGET * self._pace_predicted + fitted
        ratio = self._pace_seconds / self._pace_predicted if self._pace_predicted > 0 else 1.0
        self._pace = min(max(ratio, _FASTEST), _SLOWEST)
