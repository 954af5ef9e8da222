"""Nets find what a linear head cannot, add what hidden states know, and are served as they were fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shoplm.readout.heads import Heads
from shoplm.training.feature_nets import fit_net, fit_net_and_states
from shoplm.training.heads import Head, HeadData, count_loss, fit_head, joined

FEATURES = 3


def features(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)


def bent(standard: np.ndarray) -> np.ndarray:
    """Means that grow on both sides: no linear head follows them."""
    return np.exp(0.8 * np.abs(standard[:, 0]) - 0.5).astype(np.float32)


def loss_of(standard: np.ndarray) -> object:
    means = torch.from_numpy(bent(standard))
    return lambda rows: count_loss(means[rows])


def off(head: Head, standard: np.ndarray) -> float:
    values = head.values(np.zeros((len(standard), 0), np.float32), standard)
    return float(np.abs(values[:, 0] - np.log(bent(standard))).mean())


def test_a_net_follows_what_a_linear_head_cannot() -> None:
    rows, fresh = features(4000, 0), features(1000, 1)
    net = fit_net(rows, 1, loss_of(rows), initial=[0.0], seed=0)  # type: ignore[arg-type]
    data = HeadData(np.arange(4000, dtype=np.int32), np.zeros((4000, 0), np.float32), rows)
    linear, _ = fit_head(data, 1, loss_of(rows), initial=[0.0], seed=0)  # type: ignore[arg-type]
    assert 2.0 * off(net, fresh) < off(linear, fresh)
    again = fit_net(rows, 1, loss_of(rows), initial=[0.0], seed=0)  # type: ignore[arg-type]
    np.testing.assert_array_equal(net.weight, again.weight)


@pytest.mark.parametrize("useful", [True, False])
def test_states_are_added_where_they_know_more(useful: bool) -> None:
    dense, rows = features(4000, 2), features(1500, 3)
    hidden = (5.0 + np.random.default_rng(4).normal(size=(1500, 4))).astype(np.float32)
    means = bent(rows) * np.exp(0.7 * (hidden[:, 1] - 5.0) * useful).astype(np.float32)
    data = HeadData(np.arange(1500, dtype=np.int32), hidden, rows)
    head, found = fit_net_and_states(
        *(dense, loss_of(dense), data, lambda at: count_loss(torch.from_numpy(means)[at]), 1),  # type: ignore[arg-type]
        initial=[0.0],
        seed=0,
    )
    error = np.abs(head.values(hidden, rows)[:, 0] - np.log(means)).mean()
    strongest = float(np.abs(head.weight[0, :4]).max())
    assert (found.hidden_scale > 0 and strongest > 0.5) if useful else strongest < 0.05
    assert error < 0.3


def test_joined_heads_keep_their_values_and_are_served_as_they_are() -> None:
    random = np.random.default_rng(5)

    def made(outputs: int, units: int) -> Head:
        draw = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
        weight = draw(outputs, 2 + FEATURES + units)
        return Head(weight, draw(outputs), draw(units, FEATURES) if units else None, draw(units))

    heads = [made(2, 4), made(1, 0), made(3, 5)]
    whole = joined(heads, FEATURES)
    hidden, rows = random.normal(size=(7, 2)).astype(np.float32), features(7, 6)
    expected = np.concatenate([head.values(hidden, rows) for head in heads], axis=1)
    np.testing.assert_allclose(whole.values(hidden, rows), expected, rtol=1e-5, atol=1e-5)
    assert whole.unit_weight is not None
    served = Heads(
        torch.zeros(FEATURES),
        torch.ones(FEATURES),
        *map(torch.from_numpy, (whole.weight, whole.bias, whole.unit_weight, whole.unit_bias)),
    )
    values = served.evaluate(torch.from_numpy(hidden), [tuple(row) for row in rows.tolist()])
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


def test_units_that_do_not_fit_are_refused() -> None:
    parts = torch.zeros(2), torch.ones(2), torch.zeros(1, 8), torch.zeros(1)
    with pytest.raises(ValueError, match="unit_weight"):
        Heads(*parts, torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="unit_weight"):
        Heads(*parts, torch.zeros(3, 2), torch.zeros(4))
