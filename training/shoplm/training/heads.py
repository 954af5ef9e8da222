"""Prediction heads: linear in the hidden state, the dense features and units of them, fitted by maximum likelihood.

Raw values, in the order of the head's outputs: the hazards of the first purchase per horizon step, log mean number of
visits, the three values of the zero-inflated lognormal spend, and one logit per campaign type. How they become answers
is `shoplm.readout.targets`. The hidden state comes after the dense features, shrunk by `hidden_scale`, which is chosen
on a held-out part of the training customers; 0 means that the state adds nothing there, and the heads then read the
dense features alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HIDDEN_SCALES = (0.0, 0.02, 0.05, 0.1)
PENALTIES = (1e-4, 1e-3, 1e-2)
_HELD_OUT = 0.25

Loss = Callable[[Tensor], Tensor]  # raw values [N, P] -> loss per row [N]


def _no_units() -> NDArray[np.float32]:
    return np.zeros(0, np.float32)


@dataclass(frozen=True)
class Head:
    """values = weight . (hidden, standardised features, units) + bias; a unit is relu(unit_weight . features + its
    bias)."""

    weight: NDArray[np.float32]  # [P, H + F + M]
    bias: NDArray[np.float32]  # [P]
    unit_weight: NDArray[np.float32] | None = None  # [M, F]; None: no units
    unit_bias: NDArray[np.float32] = field(default_factory=_no_units)  # [M]

    def values(self, hidden: NDArray[np.float32], standard: NDArray[np.float32]) -> NDArray[np.float64]:
        """[N, P] of hidden states [N, H] and standardised features [N, F]."""
        size, inputs = hidden.shape[1], standard
        if self.unit_weight is not None:
            units = np.maximum(standard @ self.unit_weight.T + self.unit_bias, 0.0)
            inputs = np.concatenate([standard, units], axis=1)
        result: NDArray[np.float64] = (hidden @ self.weight[:, :size].T).astype(np.float64)
        return result + inputs @ self.weight[:, size:].T + self.bias


def joined(heads: Sequence[Head], features: int) -> Head:
    """One head with the values of all, in their order; each reads its own units. All read states of one width."""
    counts = [len(head.unit_bias) for head in heads]
    rows = []
    for index, head in enumerate(heads):
        split = head.weight.shape[1] - counts[index]
        before, after = (
            np.zeros((len(head.bias), sum(part)), np.float32) for part in (counts[:index], counts[index + 1 :])
        )
        rows.append(np.concatenate([head.weight[:, :split], before, head.weight[:, split:], after], axis=1))
    units = [head.unit_weight for head in heads if head.unit_weight is not None]
    return Head(
        np.concatenate(rows),
        np.concatenate([head.bias for head in heads]),
        np.concatenate([np.zeros((0, features), np.float32), *units]) if units else None,
        np.concatenate([head.unit_bias for head in heads]),
    )


@dataclass(frozen=True)
class Standard:
    """Dense features and hidden states, to mean 0 and deviation 1 over the training data."""

    mean: NDArray[np.float32]  # [F]
    scale: NDArray[np.float32]  # [F], positive

    @classmethod
    def fit(cls, values: NDArray[np.float32]) -> Standard:
        if not len(values):
            return cls(np.zeros(values.shape[1], np.float32), np.ones(values.shape[1], np.float32))
        scale = values.std(0)
        return cls(values.mean(0), np.where(scale > 1e-6, scale, 1.0).astype(np.float32))

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return ((values - self.mean) / self.scale).astype(np.float32)


@dataclass(frozen=True)
class HeadData:
    """Rows to fit on: N customers at moments."""

    customer: NDArray[np.int32]  # [N]
    hidden: NDArray[np.float32]  # [N, H]
    standard: NDArray[np.float32]  # [N, F] standardised dense features

    def __len__(self) -> int:
        return len(self.customer)


def fit_head(
    data: HeadData, outputs: int, loss_of: Callable[[NDArray[np.intp]], Loss], *, initial: list[float], seed: int
) -> tuple[Head, float]:
    """The head with the best strength of its two penalties on held-out customers, refitted on all; and the chosen
    `hidden_scale`. `loss_of(rows)` gives the loss of these rows of `data`; `initial` [outputs] are the biases that the
    fit starts from.
    """
    weight, bias, scale = _fit_chosen(data, data.standard, outputs, loss_of, initial, seed)
    return Head(weight, bias), scale


def fit_states(
    data: HeadData, outputs: int, loss_of: Callable[[NDArray[np.intp]], Loss], *, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """As `fit_head`, on the hidden states alone: weights [outputs, H], biases [outputs] and the chosen scale."""
    return _fit_chosen(data, np.zeros((len(data), 0), np.float32), outputs, loss_of, [0.0] * outputs, seed)


def _fit_chosen(
    data: HeadData,
    standard: NDArray[np.float32],
    outputs: int,
    loss_of: Callable[[NDArray[np.intp]], Loss],
    initial: list[float],
    seed: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    states = Standard.fit(data.hidden)
    hidden = states(data.hidden)
    rows = np.arange(len(data))
    people = np.unique(data.customer)
    held = np.random.default_rng(seed).permutation(people)[: int(_HELD_OUT * len(people))]
    outside = np.isin(data.customer, held)
    best: tuple[float, float, float] | None = None
    scales = HIDDEN_SCALES if hidden.shape[1] and outside.any() and not outside.all() else (0.0,)
    for scale in scales:
        for penalty in PENALTIES:
            inputs = torch.from_numpy(np.concatenate([hidden * scale, standard], axis=1))
            weight, bias = _fit(inputs[~outside], outputs, loss_of(rows[~outside]), penalty, initial)
            with torch.no_grad():
                quality = float(loss_of(rows[outside])(inputs[outside] @ weight.T + bias).mean())
            if best is None or quality < best[0]:
                best = quality, scale, penalty
            if scale == 0.0 and (not outside.any() or not standard.shape[1]):
                break
    assert best is not None
    _, scale, penalty = best
    inputs = torch.from_numpy(np.concatenate([hidden * scale, standard], axis=1))
    weight, bias = _fit(inputs, outputs, loss_of(rows), penalty, initial)
    size = data.hidden.shape[1]
    on_states = weight[:, :size].numpy() * scale / states.scale
    full = np.concatenate([on_states, weight[:, size:].numpy()], axis=1)
    return full.astype(np.float32), (bias.numpy() - on_states @ states.mean).astype(np.float32), scale


def _fit(inputs: Tensor, outputs: int, loss: Loss, penalty: float, initial: list[float]) -> tuple[Tensor, Tensor]:
    """Minimises mean loss + penalty * sum of squared weights with L-BFGS, from zero weights."""
    weight = torch.zeros(outputs, inputs.shape[1], requires_grad=True)
    bias = torch.tensor(initial, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=150, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(inputs @ weight.T + bias).mean() + penalty * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    if len(inputs):
        optimizer.step(step)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def hazard_loss(step: Tensor, steps: int) -> Loss:
    """`step` [N]: the horizon step (0 …) in which the event came; `steps` where it did not come."""

    def loss(values: Tensor) -> Tensor:
        index = torch.arange(steps)
        at_risk = index[None] <= step[:, None]
        came = (index[None] == step[:, None]).float()
        each = torch.nn.functional.binary_cross_entropy_with_logits(values, came, reduction="none")
        return (each * at_risk).sum(1)

    return loss


def count_loss(counts: Tensor) -> Loss:
    """Poisson: consistent for the mean whatever the dispersion."""

    def loss(values: Tensor) -> Tensor:
        log_mean = values[:, 0].clamp(max=12.0)
        return log_mean.exp() - counts * log_mean

    return loss


def spend_loss(amounts: Tensor) -> Loss:
    """Zero-inflated lognormal of amounts [N]."""
    positive = amounts > 0
    logs = torch.where(positive, amounts, torch.ones(())).log()

    def loss(values: Tensor) -> Tensor:
        zero = torch.nn.functional.binary_cross_entropy_with_logits(values[:, 0], positive.float(), reduction="none")
        raw = values[:, 2].clamp(-3.0, 1.0)
        density = raw + (logs - values[:, 1]).square() / (2.0 * (2.0 * raw).exp())
        return zero + density * positive

    return loss


def campaign_loss(kind: Tensor, redeemed: Tensor) -> Loss:
    """`kind` [N] is the campaign type's index: only that type's logit counts."""

    def loss(values: Tensor) -> Tensor:
        chosen = values.gather(1, kind[:, None])[:, 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(chosen, redeemed, reduction="none")

    return loss
