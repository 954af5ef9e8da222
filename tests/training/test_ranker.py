"""Output rows learn what a state says about the next basket, and are stored without losing it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shoplm.training.examples import Examples, Sparse
from shoplm.training.ranker import (
    CountPrior,
    OutputRows,
    RankerSettings,
    StateSpace,
    attribute_components,
    basket_loss,
    fit_ranker,
    principal_axes,
)

ITEMS, HIDDEN, GROUPS = 30, 24, 5


def examples(count: int, seed: int) -> tuple[torch.Tensor, Examples]:
    """The state names a group; the next basket holds two items of it. Nobody owns anything but item 0."""
    random = np.random.default_rng(seed)
    group = random.integers(0, GROUPS, count)
    directions = np.random.default_rng(0).normal(size=(GROUPS, HIDDEN))
    hidden = 40.0 + directions[group] + 0.3 * random.normal(size=(count, HIDDEN))  # far from the origin, as real ones
    baskets = [np.sort(random.choice(np.arange(g, ITEMS, GROUPS), 2, replace=False)).astype(np.int32) for g in group]
    owned = Sparse.of([np.zeros(1, np.int32)] * count, [np.ones(1, np.float32)] * count)
    zeros = np.zeros(count)
    made = Examples(np.arange(count), zeros.astype(np.int32), zeros, zeros, Sparse.of(baskets), owned)
    return torch.from_numpy(hidden.astype(np.float32)), made


def hits(rows: OutputRows, hidden: torch.Tensor, made: Examples) -> float:
    """Share of the top 6 (a whole group) that is of the basket's group."""
    top = rows.logits(hidden).topk(6, dim=1).indices.numpy()
    return float(np.mean([np.mean(top[i] % GROUPS == made.baskets.row(i)[0] % GROUPS) for i in range(len(made))]))


def fit(seed: int = 0) -> tuple[OutputRows, float]:
    hidden, made = examples(600, 1)
    later, later_made = examples(200, 2)
    return fit_ranker(
        hidden,
        made,
        torch.randn(ITEMS, 8, generator=torch.Generator().manual_seed(0)),
        (np.arange(ITEMS) % GROUPS).astype(np.int32),
        np.bincount(made.baskets.columns, minlength=ITEMS),
        settings=RankerSettings(epochs=4, batch=64, learning_rate=1e-2),
        seed=seed,
        validate=lambda rows, repeat: hits(rows, later, later_made),
        progress=lambda done, total, loss: None,
    )


def test_rows_learn_what_the_state_says() -> None:
    hidden, made = examples(300, 3)
    assert hits(fit()[0], hidden, made) > 0.9


def test_the_same_seed_gives_the_same_rows() -> None:
    one, two, other = fit(0)[0], fit(0)[0], fit(1)[0]
    assert torch.equal(one.rows, two.rows)
    assert not torch.equal(one.rows, other.rows)


def test_storing_rows_in_half_precision_keeps_the_ranking() -> None:
    hidden, made = examples(300, 3)
    rows = fit()[0]
    stored = rows.rounded(hidden.mean(0))
    assert torch.equal(stored.rows, stored.rows.half().float())
    difference = (stored.logits(hidden) - rows.logits(hidden)).abs().max()
    plain = (OutputRows(stored.rows, rows.bias).logits(hidden) - rows.logits(hidden)).abs().max()
    assert difference < 0.02 and difference <= plain
    assert hits(stored, hidden, made) == pytest.approx(hits(rows, hidden, made), abs=0.01)


def test_the_loss_is_the_mean_negative_log_probability_of_the_basket() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    one = np.array([1, 2], np.int32)
    made = Examples(
        np.zeros(1, np.intp),
        np.zeros(1, np.int32),
        np.zeros(1),
        np.zeros(1),
        Sparse.of([one]),
        Sparse.of([one[:1]], [np.array([0.5], np.float32)]),
    )
    found = basket_loss(logits, torch.tensor(2.0), made, np.zeros(1, np.intp))
    expected = -torch.log_softmax(torch.tensor([0.0, 2.0, 2.0]), 0)[1:].mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_the_prior_finds_that_customers_repeat() -> None:
    random = np.random.default_rng(4)
    baskets = [random.choice(ITEMS, 2, replace=False).astype(np.int32) for _ in range(200)]
    counts = np.bincount(np.concatenate(baskets), minlength=ITEMS)
    zeros = np.zeros(200)

    def prior(owned: list[np.ndarray]) -> CountPrior:
        values = [np.ones(len(row), np.float32) for row in owned]
        made = Examples(
            np.arange(200), zeros.astype(np.int32), zeros, zeros, Sparse.of(baskets), Sparse.of(owned, values)
        )
        return CountPrior.fit(made, counts, 0)

    assert prior(baskets).repeat_weight > 3.0
    assert abs(prior([np.sort(random.permutation(ITEMS)[:2]).astype(np.int32) for _ in baskets]).repeat_weight) < 1.0


def test_a_projection_and_its_folding_are_one_map() -> None:
    hidden, _ = examples(100, 5)
    space = StateSpace.fit(hidden, 10)
    rows, bias = torch.randn(7, 10), torch.randn(7)
    folded = space.fold(rows, bias)
    torch.testing.assert_close(folded.logits(hidden), space.project(hidden) @ rows.T + bias, rtol=1e-3, atol=1e-3)


def test_attributes_that_are_all_alike_say_nothing() -> None:
    assert attribute_components(torch.ones(4, 6)).abs().sum() == 0
    parts = attribute_components(torch.randn(50, 6, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(parts.square().mean(0), torch.ones(6), rtol=1e-3, atol=1e-3)


def test_states_of_few_kinds_have_axes() -> None:
    """Most eigenvalues are nearly nothing, at which fp32 may not converge."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(36, 256, generator=generator)
    states = kinds[torch.randint(36, (2000,), generator=generator)]
    states = states + 1e-7 * torch.randn(states.shape, generator=generator)
    centred = states - states.mean(0)
    values, vectors = principal_axes(centred)
    assert values.dtype == vectors.dtype == torch.float32
    assert int((values > 1e-3).sum()) == 35  # one is the mean's
    torch.testing.assert_close((vectors * values) @ vectors.T, centred.T @ centred / 2000, rtol=1e-4, atol=1e-4)
