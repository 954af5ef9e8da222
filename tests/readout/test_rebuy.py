"""What the history says of an own item, and the net on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from shoplm.bundle import BaseReference, PromptSchema, ScoreWeights, ShopManifest
from shoplm.errors import BundleError
from shoplm.history import SECONDS_PER_DAY, EventKind, History, build_history
from shoplm.readout.rebuy import (
    HISTORY_FEATURES,
    ITEM_FEATURES,
    Rebuy,
    history_features,
    load_rebuy,
    own_items,
    rebuy_of,
)

ITEMS, UNITS = 6, 5
TYPES = np.array([0, 1, 1, 2, 0, 3], np.int32)
NOW = 400.0 * SECONDS_PER_DAY


def history_of(seed: int, events: int) -> History:
    """Purchases and views of items and of types in visits of about four events, some on one day."""
    random = np.random.default_rng(seed)
    has_item = random.random(events) < 0.7
    visit = random.integers(0, max(events // 4, 1), events)
    return build_history(
        item=np.where(has_item, random.integers(0, ITEMS, events), random.integers(0, 4, events)).astype(np.int32),
        has_item=has_item,
        kind=np.where(random.random(events) < 0.8, EventKind.PURCHASE, EventKind.VIEW).astype(np.int8),
        time=NOW - SECONDS_PER_DAY * (1.5 + 6.5 * visit),
        quantity=random.integers(1, 4, events).astype(np.float32),
        price=np.ones(events, np.float32),
        basket_key=visit.astype(str),
        as_of=NOW,
    )


def net(random: np.random.Generator) -> Rebuy:
    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    inputs = len(HISTORY_FEATURES) + len(ITEM_FEATURES)
    return Rebuy(normal(ITEMS, len(ITEM_FEATURES)), TYPES, normal(UNITS, inputs), normal(UNITS), normal(UNITS), 0.25)


def tensors_of(rebuy: Rebuy) -> dict[str, np.ndarray]:
    named = {f"rebuy.{name}": getattr(rebuy, name) for name in ("items", "types", "weight", "bias", "out")}
    return {**named, "rebuy.out_bias": np.array([rebuy.out_bias], np.float32)}


def expected(history: History, row: int) -> dict[str, float]:
    """The features of one own item, by counting."""
    events = [
        (int(item), bool(known), float((NOW - time) / SECONDS_PER_DAY), float(units), int(basket))
        for item, known, kind, time, units, basket in zip(
            *(history.item, history.has_item, history.kind, history.time, history.quantity, history.basket), strict=True
        )
        if kind == EventKind.PURCHASE
    ]
    visits = sorted({event[4] for event in events})
    age = {event[4]: event[2] for event in events}
    mine = sorted({event[4] for event in events if event[1] and event[0] == row})
    alike = sorted({event[4] for event in events if (TYPES[event[0]] if event[1] else event[0]) == TYPES[row]})
    pairs = {(event[0], event[4]) for event in events if event[1]}
    since = {visit: len(visits) - 1 - place for place, visit in enumerate(visits)}
    units = sum(event[3] for event in events if event[1] and event[0] == row)
    gaps = (age[visits[0]] - age[visits[-1]]) / max(len(visits) - 1, 1)
    repeats = len(pairs) - len({item for item, _ in pairs})
    decayed = {days: sum(np.exp(-age[visit] / days) for visit in mine) for days in (7, 20, 60, 240)}
    return {
        **{f"log_visits_decayed_{days}d": np.log1p(value) for days, value in decayed.items()},
        "log_visits": np.log1p(len(mine)),
        "log_days_since_last": np.log1p(age[mine[-1]]),
        "log_visits_since_last": np.log1p(since[mine[-1]]),
        "log_days_since_first": np.log1p(age[mine[0]]),
        "log_visits_since_first": np.log1p(since[mine[0]]),
        "log_units_per_visit": np.log(units / len(mine)),
        "log_type_visits_decayed": np.log1p(sum(np.exp(-age[visit] / 60) for visit in alike)),
        "log_type_visits": np.log1p(len(alike)),
        "log_type_days_since_last": np.log1p(age[alike[-1]]),
        "log_share_of_type": np.log(len(mine) / len(alike)),
        "log_customer_visits": np.log1p(len(visits)),
        "log_customer_days_since_last": np.log1p(age[visits[-1]]),
        "log_customer_mean_gap_days": np.log1p(gaps),
        "log_customer_items_per_visit": np.log1p(len(pairs) / len(visits)),
        "log_customer_share_of_repeats": np.log((repeats + 1) / (len(pairs) + 2)),
    }


@pytest.mark.parametrize("seed", range(8))
def test_features_are_what_counting_gives(seed: int) -> None:
    history = history_of(seed, 3 + 12 * seed)
    rows, values = history_features(history, TYPES)
    assert rows.tolist() == history.own_counts(30.0)[0].tolist()
    for at, row in enumerate(rows.tolist()):
        wanted = expected(history, row)
        np.testing.assert_allclose(values[at], [wanted[name] for name in HISTORY_FEATURES], rtol=1e-5, atol=1e-5)


def test_values_are_the_nets_and_terms_are_weighted_values() -> None:
    rebuy, history = net(np.random.default_rng(0)), history_of(1, 40)
    rows, values = history_features(history, TYPES)
    inputs = np.concatenate([values, rebuy.items[rows]], axis=1).astype(np.float64)
    wanted = np.maximum(inputs @ rebuy.weight.T + rebuy.bias, 0) @ rebuy.out + 0.25
    np.testing.assert_allclose(rebuy.values(history), wanted, rtol=1e-4, atol=1e-4)
    own = own_items(history, 30.0, rebuy, 2.0)
    assert own.items == tuple(rows.tolist())
    np.testing.assert_allclose(own.terms, 2.0 * wanted, rtol=1e-4, atol=1e-4)
    assert own_items(history, 30.0, None, 2.0).terms == own_items(history, 30.0, rebuy, 0.0).terms == ()


def test_nothing_bought_has_no_values() -> None:
    rebuy, history = net(np.random.default_rng(0)), history_of(2, 40)
    nothing = history.before(0.0)
    assert own_items(nothing, 30.0, rebuy, 2.0) == ((), (), ())
    types_alone = History(**history.columns(~history.has_item), as_of=NOW)
    assert len(types_alone) and rebuy.values(types_alone).shape == (0,)


def manifest_of(rebuy_weight: float) -> ShopManifest:
    return ShopManifest(
        format=3,
        name="test",
        version="1",
        title="Test",
        currency="EUR",
        notice="",
        trained_until="2018-01-01T00:00:00Z",
        base=BaseReference("base", "0", 4, 50),
        score=ScoreWeights(1.0, 0.0, 30.0, rebuy_weight=rebuy_weight),
        prompt=PromptSchema(preamble=""),
        depth=1,
        level_sizes=(ITEMS,),
        type_count=4,
        feature_version=1,
        hashes={},
    )


def test_a_bundle_has_the_whole_net_or_none(tmp_path: Path) -> None:
    rebuy = net(np.random.default_rng(0))
    stored, popularity = tensors_of(rebuy), {"popularity": np.zeros(ITEMS, np.float32)}
    save_file({**stored, **popularity}, tmp_path / "weights.safetensors")
    found, history = load_rebuy(tmp_path, manifest_of(1.0)), history_of(3, 40)
    assert found is not None and np.array_equal(found.values(history), rebuy.values(history))
    save_file(popularity, tmp_path / "weights.safetensors")
    assert load_rebuy(tmp_path, manifest_of(0.0)) is None  # a bundle of format 1 or 2
    with pytest.raises(BundleError, match="no rebuy tensors are there"):
        load_rebuy(tmp_path, manifest_of(1.0))
    save_file({**stored, "popularity": np.zeros(ITEMS + 1, np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(BundleError, match=f"of {ITEMS} items, expected {ITEMS + 1}"):
        load_rebuy(tmp_path, manifest_of(1.0))
    del stored["rebuy.out"]
    with pytest.raises(ValueError, match=r"rebuy\.out: not there"):
        rebuy_of(stored.get)
    with pytest.raises(ValueError, match=r"rebuy\.weight has shape"):
        rebuy_of({**tensors_of(rebuy), "rebuy.weight": np.zeros((UNITS, 3), np.float32)}.get)
