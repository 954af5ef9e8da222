"""Prediction heads against the formula, and what does not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from shoplm.readout.heads import Heads


def heads() -> Heads:
    return Heads(
        input_mean=torch.tensor([1.0, 10.0]),
        input_scale=torch.tensor([2.0, 5.0]),
        weight=torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 2.0, -1.0, 0.0, 3.0]]),
        bias=torch.tensor([0.5, -0.25]),
    )


def test_outputs_are_linear_in_hidden_and_standardised_features() -> None:
    hidden = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    values = heads().evaluate(hidden, [(3.0, 0.0), (1.0, 15.0)])
    assert values == [(1.0 + 1.0 + 0.5, 4.0 - 4.0 - 6.0 - 0.25), (0.5, 3.0 - 0.25)]


def test_a_wrong_number_of_features_is_named() -> None:
    with pytest.raises(ValueError, match=r"3 dense features.*expect 2"):
        heads().evaluate(torch.zeros(1, 3), [(1.0, 2.0, 3.0)])


def test_features_beyond_those_of_training_count_as_its_extremes() -> None:
    limits = torch.tensor([[0.0, 5.0], [2.0, 20.0]])
    bounded = dataclasses.replace(heads(), input_range=limits)
    hidden = torch.zeros(1, 3)
    assert bounded.evaluate(hidden, [(3.0, 0.0)]) == heads().evaluate(hidden, [(2.0, 5.0)])
    assert bounded.evaluate(hidden, [(1.0, 15.0)]) == heads().evaluate(hidden, [(1.0, 15.0)])
    for wrong in (torch.zeros(2, 3), limits.flip(0)):
        with pytest.raises(ValueError, match="input_range"):
            dataclasses.replace(heads(), input_range=wrong)


def test_tensors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        Heads(torch.zeros(2), torch.ones(3), torch.zeros(1, 5), torch.zeros(1))
    with pytest.raises(ValueError, match="input_scale"):
        Heads(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.zeros(1, 5), torch.zeros(1))
