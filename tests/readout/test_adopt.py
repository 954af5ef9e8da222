"""What own items say of the other items, and the net on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from shoplm.bundle import ScoreWeights
from shoplm.readout.adopt import ITEM_FEATURES, OWN_FEATURES, Adopt, adopt_arrays, adopt_of, from_steps, in_steps
from shoplm.readout.habits import HabitTable, Neighbours, habit_table
from shoplm.readout.rebuy import OwnItems

ITEMS, UNITS, FACTORS = 7, 5, 3
TYPES = np.array([0, 1, 1, 2, 0, 3, 1], np.int32)
OWN = np.array([0, 2, 6])


def net(seed: int = 0) -> Adopt:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    return Adopt(
        items=normal(ITEMS, len(ITEM_FEATURES)),
        types=TYPES,
        factors=normal(ITEMS, FACTORS),
        lately=normal(ITEMS, FACTORS),
        weight=normal(UNITS, len(OWN_FEATURES) + len(ITEM_FEATURES)),
        bias=normal(UNITS),
        out=normal(UNITS),
        out_bias=0.25,
    )


def expected(adopt: Adopt, item: int) -> float:
    drawn, lately = (sum(adopt.factors[own] @ each[item] for own in OWN) for each in (adopt.factors, adopt.lately))
    alike = sum(TYPES[own] == TYPES[item] for own in OWN)
    features = [drawn / np.sqrt(3), lately / np.sqrt(3), np.log1p(alike), np.log1p(3), *adopt.items[item]]
    return float(np.maximum(adopt.weight @ features + adopt.bias, 0.0) @ adopt.out + 0.25)


def test_values_are_the_nets() -> None:
    adopt = net()
    wanted = [expected(adopt, item) for item in range(ITEMS)]
    np.testing.assert_allclose(adopt.values(OWN), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adopt.values(OWN, np.array([5, 1])), [wanted[5], wanted[1]], rtol=1e-4, atol=1e-5)


def test_new_items_have_weighted_values_and_own_ones_none() -> None:
    adopt = net()
    table = HabitTable(2.0, adopt_weight=1.5, adopt=adopt)
    habits = table.of((6, 0, 2, 0), (1.0, 1.0, 2.0, 1.0))
    assert habits.near_items.tolist() == [1, 3, 4, 5]
    np.testing.assert_allclose(habits.near, 1.5 * adopt.values(OWN)[[1, 3, 4, 5]], rtol=1e-5)
    scores = np.zeros(ITEMS, np.float32)
    habits.add_to(scores)
    own = OwnItems(tuple(OWN.tolist()), (2.0, 2.0, 1.0), ())
    np.testing.assert_allclose(table.beside(own, [5, 0, 3, 0]), scores[[5, 0, 3, 0]], rtol=1e-5)
    assert habits.strongest_near(2).tolist() == habits.near_items[np.argsort(-habits.near)[:2]].tolist()
    assert table.of((), ()).near_items.tolist() == []  # nothing bought


def test_sources_are_the_own_items_that_draw_most() -> None:
    factors = np.array([[1, 0], [2, 0], [3, 1], [0, 1], [1, 1], [0, 0], [-1, 0]], np.float32)
    adopt = replace(net(), factors=factors, lately=factors)
    table = HabitTable(2.0, adopt_weight=1.0, adopt=adopt)
    assert table.sources(4, (0, 2, 6), (9.0, 1.0, 1.0), 5) == [2, 0]
    assert table.sources(4, (0, 2, 6), (9.0, 1.0, 1.0), 1) == [2]
    assert table.sources(5, (0, 2, 6), (9.0, 1.0, 1.0), 5) == []


def test_what_items_draw_each_other_by_is_kept_in_steps_of_8_bits() -> None:
    values = np.array([[0.0, 0.0], [127.0, -3.2], [-0.5, 0.1]], np.float32)
    steps, size = in_steps(values)
    assert steps.dtype == np.int8
    assert steps.tolist() == [[0, 0], [127, -3], [-127, 25]]
    kept = from_steps(steps, size)
    assert (np.abs(kept - values) <= size[:, None] / 2 + 1e-6).all()
    assert np.array_equal(from_steps(*in_steps(kept)), kept)


def test_a_bundle_has_the_whole_net_or_none() -> None:
    adopt, score = net(), ScoreWeights(1.0, 0.0, 30.0, adopt_weight=2.0)
    adopt = replace(adopt, factors=from_steps(*in_steps(adopt.factors)), lately=from_steps(*in_steps(adopt.lately)))
    stored = adopt_arrays(replace(adopt, lately=np.asfortranarray(adopt.lately)))
    assert all(array.flags.c_contiguous for array in stored.values())
    found = habit_table(score, stored.get)
    assert found.adopt is not None and np.array_equal(found.adopt.values(OWN), adopt.values(OWN))
    assert adopt_of({}.get) is None
    with pytest.raises(ValueError, match="no adopt tensors are there"):
        habit_table(score, {}.get)
    with pytest.raises(ValueError, match=f"of {ITEMS} items, expected {ITEMS + 1}"):
        found.check(ITEMS + 1)
    with pytest.raises(ValueError, match="one goes-with term"):
        HabitTable(1.0, goes_with_weight=1.0, neighbours=Neighbours.none(ITEMS), adopt_weight=1.0, adopt=adopt)
    with pytest.raises(ValueError, match=r"adopt\.lately has shape"):
        adopt_of({**stored, "adopt.lately": np.zeros((ITEMS, FACTORS + 1), np.int8)}.get)
    with pytest.raises(ValueError, match=r"adopt\.lately_step has shape"):
        adopt_of({**stored, "adopt.lately_step": np.zeros(1, np.float32)}.get)
    del stored["adopt.out"]
    with pytest.raises(ValueError, match=r"adopt\.out: not there"):
        adopt_of(stored.get)
