"""Small nets on the dense features: hidden units whose weighted sums the heads add to what is linear.

    values = S x + U relu(V x + v) + u        x: standardised dense features

Several such nets are fitted from different starts and averaged, which is one net of all their units. Dense features
cost no pass of the base, so the nets learn from many more moments than have hidden states. What the hidden state adds
is fitted afterwards, on the moments that have one, with the net's values as an offset.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.training.heads import Head, HeadData, Loss, Strength, fit_head
from torch import Tensor

FEWEST_ROWS = 5000  # with fewer, a linear head is fitted
MEMBERS, UNITS = 6, 32
_EPOCHS, _BATCH = 8, 512
_LEARNING_RATE, _DECAY = 1e-2, 1e-2


def fit_net(
    standard: NDArray[np.float32],
    outputs: int,
    loss_of: Callable[[NDArray[np.intp]], Loss],
    *,
    initial: list[float],
    seed: int,
) -> Head:
    """The averaged nets for rows [N, F]; `loss_of(rows)` gives the loss of these rows, `initial` [outputs] are the
    biases that the fit starts from. The head reads no hidden state."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.from_numpy(standard)
    count, features = inputs.shape
    first = torch.randn(MEMBERS, features, UNITS, generator=generator) / features**0.5
    second = 0.01 * torch.randn(MEMBERS, UNITS, outputs, generator=generator)
    shift, skip = torch.zeros(MEMBERS, 1, UNITS), torch.zeros(MEMBERS, features, outputs)
    bias = torch.tensor(initial, dtype=torch.float32).expand(MEMBERS, 1, outputs).clone()
    weights, biases = [first, second, skip], [shift, bias]
    for parameter in (*weights, *biases):
        parameter.requires_grad_(True)
    groups = [{"params": weights, "weight_decay": _DECAY}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE)
    steps = -(-count // _BATCH) * _EPOCHS
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=max(steps, 2))
    for _ in range(_EPOCHS):
        orders = torch.stack([torch.randperm(count, generator=generator) for _ in range(MEMBERS)])
        for start in range(0, count, _BATCH):
            rows = orders[:, start : start + _BATCH]
            taken = inputs[rows]
            values = taken @ skip + torch.relu(taken @ first + shift) @ second + bias
            loss = torch.stack([loss_of(at.numpy())(value).mean() for at, value in zip(rows, values, strict=True)])
            optimizer.zero_grad()
            loss.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return _averaged(skip, second, bias, first, shift)


def _averaged(skip: Tensor, second: Tensor, bias: Tensor, first: Tensor, shift: Tensor) -> Head:
    """One net whose values are the mean of the members'."""
    members, features, outputs = skip.shape
    on_units = second.reshape(-1, outputs).T / members
    return Head(
        weight=torch.cat((skip.mean(0).T, on_units), dim=1).numpy(),
        bias=bias.mean(0)[0].numpy(),
        unit_weight=first.permute(0, 2, 1).reshape(-1, features).contiguous().numpy(),
        unit_bias=shift.reshape(-1).numpy(),
    )


def fit_net_and_states(
    dense: NDArray[np.float32],
    dense_loss: Callable[[NDArray[np.intp]], Loss],
    data: HeadData,
    loss_of: Callable[[NDArray[np.intp]], Loss],
    outputs: int,
    *,
    initial: list[float],
    seed: int,
    strength: Strength | None = None,
) -> tuple[Head, Strength]:
    """Nets on the `dense` rows [N, F], and what the hidden states of `data` add to them: the head, and the strength of
    its part on the states, by default the best one for held-out customers."""
    net = fit_net(dense, outputs, dense_loss, initial=initial, seed=seed)
    offset = torch.from_numpy(net.values(np.zeros((len(data), 0), np.float32), data.standard).astype(np.float32))

    def beyond(rows: NDArray[np.intp]) -> Loss:
        loss, known = loss_of(rows), offset[rows]
        return lambda values: loss(values + known)

    states = HeadData(data.customer, data.hidden, np.zeros((len(data), 0), np.float32), data.judged)
    added, found = fit_head(states, outputs, beyond, initial=[0.0] * outputs, seed=seed, strength=strength)
    weight = np.concatenate([added.weight, net.weight], axis=1)
    return Head(weight, (net.bias + added.bias).astype(np.float32), net.unit_weight, net.unit_bias), found
