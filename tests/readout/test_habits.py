"""A customer's terms: bought again, and goes with what was bought."""

from __future__ import annotations

import numpy as np
import pytest
from shoplm.bundle import ScoreWeights
from shoplm.readout import habits
from shoplm.readout.habits import HabitTable, Neighbours, habit_table

# 0 goes with 2 and 3, 1 with 2; 2 with 0; 3 with nothing.
NEIGHBOURS = Neighbours(
    np.array([0, 2, 3, 4, 4]), np.array([2, 3, 2, 0], np.int32), np.array([0.5, 0.25, 1.0, 0.75], np.float32)
)
LOYALTY = np.array([0.5, -1.0, 0.0, 2.0], np.float32)
TABLE = HabitTable(2.0, 3.0, 10.0, LOYALTY, NEIGHBOURS)


@pytest.mark.parametrize("dense_share", [0, 10**9])
def test_terms_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch, dense_share: int) -> None:
    monkeypatch.setattr(habits, "_DENSE_SHARE", dense_share)
    found = TABLE.of((1, 0, 1), (1.0, 3.0, 2.0))  # counts of what is listed twice are added
    zero, one = np.log(4), np.log(4)
    every = np.arange(4)
    np.testing.assert_allclose(found.repeat_of(every), [2 * zero + 1.5, 2 * one - 3.0, 0, 0], rtol=1e-6)
    near = [0, 0, (0.5 * zero + 1.0 * one) / (zero + one), 0.25 * zero / (zero + one)]
    np.testing.assert_allclose(found.near_of(every), 10 * np.array(near), rtol=1e-6)
    assert found.strongest_near(1).tolist() == [2]


def test_what_is_owned_goes_with_nothing() -> None:
    found = TABLE.of((0, 2), (1.0, 1.0))
    assert found.near_items.tolist() == [3]
    assert found.near_of(np.array([0, 2])).tolist() == [0, 0]


def test_sources_are_the_owned_items_that_add_most() -> None:
    assert TABLE.sources(2, (0, 1, 3), (1.0, 1.0, 9.0), 5) == [1, 0]
    assert TABLE.sources(2, (0, 1), (50.0, 0.1), 5) == [0, 1]  # a stronger habit beats a stronger tie
    assert TABLE.sources(2, (0, 1), (1.0, 1.0), 1) == [1]
    assert TABLE.sources(1, (0, 2), (1.0, 1.0), 5) == []
    assert HabitTable(2.0).sources(2, (0,), (1.0,), 5) == []


def test_terms_of_own_items_are_added_as_they_come() -> None:
    plain, given = TABLE.of((1, 0, 1), (1.0, 3.0, 2.0)), TABLE.of((1, 0, 1), (1.0, 3.0, 2.0), (0.25, -4.0, 0.5))
    np.testing.assert_allclose(given.repeat - plain.repeat, [-4.0, 0.75], rtol=1e-6)
    assert np.array_equal(given.near, plain.near)


def test_nothing_bought_has_no_terms() -> None:
    found = TABLE.of((), ())
    assert len(found.items) == len(found.near_items) == 0
    assert found.repeat_of(np.arange(4)).tolist() == [0] * 4


def test_tables_that_do_not_fit_are_refused() -> None:
    tensors = {"neighbours.starts": NEIGHBOURS.starts, "loyalty": LOYALTY}
    with pytest.raises(ValueError, match=r"neighbours\.items, neighbours\.strengths: not there"):
        habit_table(ScoreWeights(1.0, 0.0, 30.0), tensors.get)
    with pytest.raises(ValueError, match="no loyalty is there"):
        habit_table(ScoreWeights(1.0, 0.0, 30.0, 0.5), {}.get)
    with pytest.raises(ValueError, match="no neighbours are there"):
        habit_table(ScoreWeights(1.0, 0.0, 30.0, 0.0, 2.0), {}.get)
    with pytest.raises(ValueError, match="loyalty has shape"):
        TABLE.check(5)
    with pytest.raises(ValueError, match="items run from"):
        Neighbours(np.array([0, 1]), np.array([1], np.int32), np.ones(1, np.float32))
    with pytest.raises(ValueError, match="starts do not divide"):
        Neighbours(np.array([0, 2]), np.array([0], np.int32), np.ones(1, np.float32))
    assert habit_table(ScoreWeights(1.0, 0.0, 30.0), {}.get) == HabitTable(1.0)  # a bundle of format 1
