"""BG/NBD: published numbers, and the parameters of simulated customers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import hyp2f1
from shoplm.training import pipeline
from shoplm.training.bg_nbd import BgNbd, Repeats, repeats_at
from shoplm.training.log import ShopLog
from shoplm.training.shop import Shop

CDNOW = BgNbd(r=0.243, alpha=4.414, a=0.793, b=2.426)  # the paper's estimates for the CDNOW sample, in weeks


def repeats(*rows: tuple[float, float, float]) -> Repeats:
    x, recency, age = np.array(rows, np.float64).T
    return Repeats(x, recency, age, np.ones(len(x), bool))


def test_the_example_of_the_papers_authors() -> None:
    """CDNOW's first customer: 2 repeats, the last after 30.43 of 38.86 weeks; 1.226 expected in the next 39 weeks."""
    assert CDNOW.expected(repeats((2, 30.43, 38.86)), 39 * 7.0)[0] == pytest.approx(1.226, abs=5e-4)


def test_the_expectation_is_equation_10() -> None:
    """As it stands in the paper, where its hypergeometric function can be computed."""
    r, alpha, a, b = CDNOW.r, CDNOW.alpha, CDNOW.a, CDNOW.b
    for x, recency, age, t in ((0, 0.0, 20.0, 4.0), (1, 3.0, 20.0, 4.0), (7, 15.0, 20.0, 10.0)):
        direct = (a + b + x - 1) / (a - 1)
        direct *= 1 - ((alpha + age) / (alpha + age + t)) ** (r + x) * hyp2f1(
            r + x, b + x, a + b + x - 1, t / (alpha + age + t)
        )
        direct /= 1 + (x > 0) * a / (b + x - 1) * ((alpha + age) / (alpha + recency)) ** (r + x)
        assert CDNOW.expected(repeats((x, recency, age)), 7 * t)[0] == pytest.approx(direct, rel=1e-9)


def test_hundreds_of_purchases_and_a_pole_stay_finite() -> None:
    heavy = repeats((400, 51.0, 52.0), (400, 10.0, 52.0))
    expected = CDNOW.expected(heavy, 30.0)
    assert 400 / 52 * 30 / 7 * 0.2 < expected[0] < 400 / 52 * 30 / 7
    assert expected[1] == pytest.approx(0.0, abs=1e-12)
    at, near = (BgNbd(0.243, 4.414, a, 2.426).expected(heavy, 30.0)[0] for a in (1.0, 1.001))
    assert at == pytest.approx(near, rel=1e-2)


def simulated(model: BgNbd, customers: int, weeks: float, then: float) -> tuple[Repeats, NDArray[np.float64]]:
    random = np.random.default_rng(5)
    rows, later = [], []
    for _ in range(customers):
        rate, drop = random.gamma(model.r, 1.0 / model.alpha), random.beta(model.a, model.b)
        now, x, last, y, active = 0.0, 0, 0.0, 0, True
        while active:
            now += random.exponential(1.0 / rate)
            if now > weeks + then:
                break
            if now <= weeks:
                x, last = x + 1, now
            else:
                y += 1
            active = random.random() >= drop
        rows.append((x, last, weeks))
        later.append(y)
    return repeats(*rows), np.array(later, np.float64)


def test_simulated_customers_are_foretold() -> None:
    truth = BgNbd(r=1.2, alpha=2.0, a=0.8, b=3.0)
    data, later = simulated(truth, 3000, 40.0, 6.0)
    found = BgNbd.fit(data)
    assert found is not None
    assert found.log_likelihood(data).sum() >= truth.log_likelihood(data).sum() - 1e-6
    expected = found.expected(data, 42.0)
    assert expected.mean() == pytest.approx(later.mean(), rel=0.1)
    often = data.repeats > 10
    assert expected[often].mean() == pytest.approx(later[often].mean(), rel=0.15)
    assert expected[often].mean() > 3 * expected[~often].mean()


def test_too_few_customers_are_not_fitted() -> None:
    assert BgNbd.fit(repeats(*[(1, 1.0, 2.0)] * 29)) is None


def test_repeats_are_counted_from_visits_before_the_moment(tiny_shop_log: ShopLog) -> None:
    shop: Shop = pipeline.prepare(tiny_shop_log)
    history = shop.histories[3]
    times = np.unique(history.time)
    moment = float(times[4])
    found = repeats_at(shop.histories, np.array([3, 3]), np.array([moment, float(times[0])]))
    week = 7 * 86_400.0
    assert found.bought.tolist() == [True, False]
    assert found.repeats.tolist() == [3.0, 0.0]
    assert found.recency[0] == pytest.approx((times[3] - times[0]) / week)
    assert found.age[0] == pytest.approx((moment - times[0]) / week)
    fitted = BgNbd(1.0, 1.0, 0.5, 2.0)
    assert fitted.expected(found, 30.0)[1] == 0.0
