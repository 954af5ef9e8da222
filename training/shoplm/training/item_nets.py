"""Small nets that value items from their features (`shoplm.readout.rebuy`, `shoplm.readout.adopt`).

    value = out . relu(W f + b) + out_bias

An example is some items of one customer. Several nets are fitted from different starts and averaged, which is one net
of all their units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_EPOCHS, _BATCH = 4, 64
_LEARNING_RATE, _DECAY = 1e-2, 1e-4
_LEAST_DEVIATION = 1e-3  # of a feature that is to be told from a constant

Floats = NDArray[np.float32]
# (values [n], the example of each [n], their rows of the features [n], the examples' numbers [B]) -> mean loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ItemNet:
    """A net, on features as they are; its members are fitted on standardised ones."""

    weight: Floats  # [U, F]
    bias: Floats  # [U]
    out: Floats  # [U]
    out_bias: float


def fit_item_net(
    features: Floats, lengths: NDArray[np.int64], loss: Loss, *, members: int, units: int, seed: int
) -> ItemNet:
    """Fit a net to `features` [N, F] of all examples' items, one example after another, `lengths` [examples] of
    each."""
    mean, scale = features.mean(axis=0), features.std(axis=0)
    # A constant says nothing, and may say anything of an item unlike those of the training.
    inverse = np.where(scale > _LEAST_DEVIATION, 1.0 / np.maximum(scale, _LEAST_DEVIATION), 0.0).astype(np.float32)
    inputs = torch.from_numpy((features - mean) * inverse)
    nets = [_fit(inputs, lengths, loss, units, seed * members + member) for member in range(members)]
    weight = np.concatenate([net.weight for net in nets]) * inverse
    bias = np.concatenate([net.bias for net in nets]) - weight @ mean
    out = np.concatenate([net.out for net in nets]) / members
    return ItemNet(
        weight=weight.astype(np.float32),
        bias=bias.astype(np.float32),
        out=out.astype(np.float32),
        out_bias=float(np.mean([net.out_bias for net in nets], dtype=np.float32)),
    )


def _fit(inputs: Tensor, lengths: NDArray[np.int64], loss_of: Loss, units: int, seed: int) -> ItemNet:
    """One net, for standardised features [N, F]."""
    generator = torch.Generator().manual_seed(seed)
    width = inputs.shape[1]
    first = torch.randn(width, units, generator=generator) / width**0.5
    second = 0.1 * torch.randn(units, generator=generator)
    shift, bias = torch.zeros(units), torch.zeros(1)
    parameters = [first, second, shift, bias]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_DECAY)
    examples = len(lengths)
    steps = _EPOCHS * -(-examples // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=max(steps, 2))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for _ in range(_EPOCHS):
        order = torch.randperm(examples, generator=generator).numpy()
        for at in range(0, examples, _BATCH):
            chosen = order[at : at + _BATCH]
            rows = torch.from_numpy(np.concatenate([np.arange(starts[one], starts[one + 1]) for one in chosen]))
            owner = torch.from_numpy(np.repeat(np.arange(len(chosen)), lengths[chosen]))
            values = torch.relu(inputs[rows] @ first + shift) @ second + bias
            loss = loss_of(values, owner, rows, torch.from_numpy(chosen))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return ItemNet(first.numpy().T, shift.numpy(), second.numpy(), float(bias))
