"""BG/NBD: how often a customer will buy, from how often, how recently and for how long they have bought.

Fader, Hardie and Lee, "Counting your customers the easy way: an alternative to the Pareto/NBD model", Marketing Science
24 (2005). While active, a customer buys at a rate that is gamma distributed over customers (r, alpha), and after each
purchase leaves for good with a probability that is beta distributed (a, b). With x repeat purchases, the last at t_x
after the first one, and T since the first one, the likelihood is their equation (6),

    L = B(a, b + x) / B(a, b) * G(r + x) alpha^r / G(r)
        * [(alpha + T)^-(r + x) + (x > 0) a / (b + x - 1) (alpha + t_x)^-(r + x)]

and the expected number of purchases in the next t is their equation (10). Its hypergeometric function is taken after
Euler's transformation, which neither over- nor underflows for customers with hundreds of purchases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import betaln, gammaln, hyp2f1
from shoplm.history import SECONDS_PER_DAY, EventKind
from shoplm.training.histories import Histories

Floats = NDArray[np.float64]
FEWEST_CUSTOMERS = 30
_DAYS_PER_WEEK = 7.0
_POLE = 1e-4  # equation (10) divides by a - 1; its limit is finite
_LARGEST_LOG = 12.0


@dataclass(frozen=True)
class Repeats:
    """N customers at a moment. Times in weeks."""

    repeats: Floats  # x: visits with a purchase after the first
    recency: Floats  # t_x: from the first visit to the last
    age: Floats  # T: from the first visit to the moment
    bought: NDArray[np.bool_]  # whether there was a first visit at all

    def __len__(self) -> int:
        return len(self.repeats)

    def __getitem__(self, rows: NDArray[np.bool_]) -> Repeats:
        return Repeats(self.repeats[rows], self.recency[rows], self.age[rows], self.bought[rows])


def repeats_at(histories: Histories, customers: NDArray[np.integer], moments: NDArray[np.floating]) -> Repeats:
    """What was known of these customers at these moments."""
    rows = np.zeros((len(customers), 4))
    for index, (customer, moment) in enumerate(zip(customers.tolist(), moments.tolist(), strict=True)):
        known = histories[customer].before(moment)
        bought = known.kind == EventKind.PURCHASE
        visits = np.unique(known.basket[bought])
        times = known.time[bought]
        if len(visits):
            weeks = _DAYS_PER_WEEK * SECONDS_PER_DAY
            rows[index] = len(visits) - 1, (times[-1] - times[0]) / weeks, (moment - times[0]) / weeks, 1.0
    return Repeats(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] > 0)


@dataclass(frozen=True, slots=True)
class BgNbd:
    """Fitted parameters; time unit: one week."""

    r: float
    alpha: float
    a: float
    b: float

    @classmethod
    def fit(cls, data: Repeats) -> BgNbd | None:
        """Maximum likelihood on the customers that have bought; None where they are fewer than 30."""
        known = data[data.bought]
        if len(known) < FEWEST_CUSTOMERS:
            return None

        def loss(logs: Floats) -> float:
            value = -cls(*np.exp(np.clip(logs, -_LARGEST_LOG, _LARGEST_LOG)).tolist()).log_likelihood(known).mean()
            return float(value) if np.isfinite(value) else 1e10

        options = {"maxiter": 4000, "maxfev": 4000, "xatol": 1e-6, "fatol": 1e-10}
        starts = (np.zeros(4), np.array([0.0, 1.0, -2.0, 1.0]))
        found = min((minimize(loss, start, method="Nelder-Mead", options=options) for start in starts), key=_loss_of)
        return cls(*np.exp(np.clip(found.x, -_LARGEST_LOG, _LARGEST_LOG)).tolist())

    def log_likelihood(self, data: Repeats) -> Floats:
        """[N]."""
        x, r, alpha, a, b = data.repeats, self.r, self.alpha, self.a, self.b
        shared = gammaln(r + x) - gammaln(r) + r * np.log(alpha) + betaln(a, b + x) - betaln(a, b)
        active = -(r + x) * np.log(alpha + data.age)
        left = np.log(a) - np.log(np.maximum(b + x - 1.0, 1e-12)) - (r + x) * np.log(alpha + data.recency)
        result: Floats = shared + np.where(x > 0, np.logaddexp(active, left), active)
        return result

    def expected(self, data: Repeats, days: float) -> Floats:
        """Expected visits with a purchase in the next `days`: [N]; 0 for customers who have never bought, of whom this
        model says nothing."""
        x, r, alpha, b = data.repeats, self.r, self.alpha, self.b
        a = self.a if abs(self.a - 1.0) > _POLE else 1.0 + _POLE
        t = days / _DAYS_PER_WEEK
        z = t / (alpha + data.age + t)
        # (1 - z)^(r + x) 2F1(r + x, b + x; a + b + x - 1; z),
        # by 2F1(p, q; c; z) = (1 - z)^(c - p - q) 2F1(c - p, c - q; c; z)
        series = (1.0 - z) ** (a - 1.0) * hyp2f1(a + b - 1.0 - r, a - 1.0, a + b + x - 1.0, z)
        ever = (a + b + x - 1.0) / (a - 1.0) * (1.0 - series)
        odds = np.exp((r + x) * (np.log(alpha + data.age) - np.log(alpha + data.recency)))
        gone = np.where(x > 0, a / np.maximum(b + x - 1.0, 1e-12) * odds, 0.0)
        result: Floats = np.where(data.bought, np.maximum(ever / (1.0 + gone), 0.0), 0.0)
        return result


def _loss_of(found: object) -> float:
    return float(found.fun)  # type: ignore[attr-defined]
