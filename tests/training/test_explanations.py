"""How true explanations are: what is compared with what, and how it enters the card."""

from __future__ import annotations

import numpy as np
from shoplm.attribution import Part
from shoplm.history import SECONDS_PER_DAY, History, build_history
from shoplm.training.card_explanations import explanations
from shoplm.training.card_sections import with_section
from shoplm.training.explanations import _matches, _spearman
from shoplm.training.report import Deletion, ExplanationResult

CARD = "# Shop\n\n## Data\n\nMuch.\n\n## Privacy\n\nNone.\n"


def history(bought: dict[int, tuple[float, ...]]) -> History:
    """item -> days ago of its purchases."""
    rows = [(item, day) for item, days in bought.items() for day in days]
    return build_history(
        item=np.array([item for item, _ in rows], np.int32),
        has_item=np.ones(len(rows), bool),
        kind=np.zeros(len(rows), np.int8),
        time=np.array([-day for _, day in rows]) * SECONDS_PER_DAY,
        quantity=np.ones(len(rows), np.float32),
        price=np.full(len(rows), np.nan, np.float32),
        basket_key=[f"{day}" for _, day in rows],
        as_of=0.0,
    )


def result(score: float = 0.9, cited: float = 4.0) -> ExplanationResult:
    deletion = Deletion(cited, 1.0)
    return ExplanationResult(100, 16, score, 0.25, {"purchase 30 d": 0.8}, 0.01, deletion, deletion, 1.0)


def test_a_match_is_as_recent_and_as_often_bought_and_not_cited() -> None:
    twins = dict.fromkeys(range(1, 8), (3.0, 10.0, 17.0))
    of = history({**twins, 20: (300.0,), 21: (250.0,), 22: (200.0,)})
    cited = [Part(False, (int(np.flatnonzero(of.item == item)[0]),), ()) for item in (1, 2)]
    gone = _matches(of, cited, np.random.default_rng(0))
    chosen = set(of.item[gone].tolist())
    assert len(chosen) == 2 and chosen <= set(range(3, 8))
    assert gone.sum() == 6  # all of their events


def test_ranks_are_compared_where_there_are_any() -> None:
    assert _spearman(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.5, 9.0])) == 1.0
    assert np.isnan(_spearman(np.zeros(3), np.array([1.0, 2.0, 3.0])))


def test_the_section_comes_before_privacy_and_replaces_an_older_one() -> None:
    once = with_section(CARD, explanations(result()))
    assert once.index("## Data") < once.index("## Explanations") < once.index("## Privacy")
    again = with_section(once, explanations(result(0.7)))
    assert again.count("## Explanations") == 1 and "| 0.70 |" in again and "| 0.90 |" not in again
    assert again.endswith("## Privacy\n\nNone.\n")
    assert with_section("# Shop\n", "## Explanations").endswith("## Explanations\n")


def test_what_is_missed_is_said() -> None:
    assert "the model's term 0.25 instead of 0.6" in explanations(result())
    assert "the score" not in explanations(result()).split("Below")[1]
    assert "1.5 times as far by the score, instead of 2" in explanations(result(cited=1.5))
