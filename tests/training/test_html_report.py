"""report.html stands alone, shows every number it is given, and cannot be made to run anything."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from shoplm.charts import HEIGHT, WIDTH, Line, bar_chart, line_chart
from shoplm.training.html_report import render_report
from shoplm.training.report import (
    COUNT,
    OURS,
    POPULARITY,
    AmountError,
    AmountRow,
    Breakdown,
    Difference,
    Estimate,
    Exploration,
    ProbabilityRow,
    RankingResult,
    RankingRow,
    Report,
)
from shoplm.training.watch import LOSS, NDCG, Watch

NOTHING = Difference(None, None, None)


@pytest.fixture
def report() -> Report:
    values = {POPULARITY: 0.1, COUNT: 0.2, OURS: 0.3}
    ranking = RankingResult(
        split="global time split",
        customers=1234,
        rows=(RankingRow(OURS, 0.31234, 0.2, 0.4, None),),
        recall_over_count=Difference(0.1, 0.05, 0.2),
        ndcg_over_count=Difference(0.1, 0.05, 0.2),
        recall_over_tifu=NOTHING,
        ndcg_over_tifu=Difference(0.0, -0.1, 0.1),
        exploration=Exploration(10, {OURS: 0.2, POPULARITY: 0.1}, NOTHING),
        by_visits=(Breakdown("1 to 5", 7, values), Breakdown("over 5", 8, values)),
        by_popularity=(Breakdown("0% to 1%", 3, values),),
    )
    chance = ProbabilityRow(
        target="coupon redemption <Type&A>",
        customers=100,
        observed=0.5,
        auc=0.8,
        brier=0.2,
        ece=0.01,
        slope=Estimate(1.0, 0.9, 1.1),
        intercept=Estimate(None, None, None),
        lift=2.0,
        boosted_auc=None,
        boosted_brier=0.3,
        boosted_ece=0.02,
        boosted_lift=None,
        auc_over_boosting=Difference(None, None, None),
        brier_over_boosting=Difference(-0.1, -0.2, 0.0),
        reliability=((50, 0.25, 0.125), (50, 0.75, 1.0)),
    )
    amount = AmountRow("spend 30 d", 9, 10.0, 11.0, 0.905, (AmountError(OURS, 1.5, 2.5),))
    return Report(0, 9, "", 10, (ranking,), (chance,), (amount,), {}, {})


def drawings(page: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


def test_every_number_is_in_it_and_nothing_is_fetched(report: Report) -> None:
    learning = Watch()
    for step in range(3):
        learning.record("output rows", step, {LOSS: 8.0 - step, NDCG: 0.1})
    learning.record("once", 1, {LOSS: 1.0})
    page = render_report("A <b>shop</b>", report, learning)
    for text in (
        "0.3123",
        "1,234",
        "above counting",
        "not distinguishable from TIFU-KNN",
        "n/a",
        "90.5%",
        "2.50",
        "output rows: NDCG@10, validation",
    ):
        assert text in page
    assert "A &lt;b&gt;shop" in page and "<Type&A>" not in page
    assert not re.search(r"(src|href)=|<script|@import|url\(", page)
    assert len(drawings(page)) == 5


def test_bars_are_as_tall_as_their_values() -> None:
    (drawing,) = drawings(bar_chart(["a", "b"], {"x": [0.5, 1.0], "y": [0.0, 0.25]}, "groups", "share"))
    tall = [float(bar.get("height", "nan")) for bar in drawing.iter("rect")]
    assert tall[0] == pytest.approx(tall[2] / 2, abs=0.1) and tall[1] == 0.0
    assert tall[3] == pytest.approx(tall[2] / 4, abs=0.1) and tall[2] > 200


def test_points_stay_inside_the_frame() -> None:
    line = Line("x", [(-5.0, 0.0), (0.5, 0.5), (9.0, 9.0)], marks=True)
    (drawing,) = drawings(line_chart([line], "x", "y", (0.0, 1.0, 0.0, 1.0)))
    places = [(float(mark.get("cx", "nan")), float(mark.get("cy", "nan"))) for mark in drawing.iter("circle")]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in places)
    assert places[0][0] < places[1][0] < places[2][0] and places[0][1] > places[1][1] > places[2][1]


def test_a_report_of_nothing_is_still_a_page() -> None:
    page = render_report("Empty", Report(0, 0, "", 0, (), (), (), {}, {}), Watch())
    assert page.rstrip().endswith("</html>") and not drawings(page)
