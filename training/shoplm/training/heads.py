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
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HIDDEN_SCALES = (0.0, 0.02, 0.05, 0.1)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # with the largest, features that say nothing move an answer little
_PARTS = 4  # of the customers: each is held out in turn, until enough rows were judged
_ENOUGH_ROWS = 1000

Loss = Callable[[Tensor], Tensor]  # raw values [N, P] -> loss per row [N]


class Strength(NamedTuple):
    """How freely a head is fitted."""

    hidden_scale: float  # of the hidden state; 0: it is not read
    penalty: float  # on squared weights


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
    """Dense features and hidden states, to mean 0 and deviation 1 over the training data, held within its range."""

    mean: NDArray[np.float32]  # [F]
    scale: NDArray[np.float32]  # [F], positive
    least: NDArray[np.float32]  # [F]
    greatest: NDArray[np.float32]  # [F]

    @classmethod
    def fit(cls, values: NDArray[np.float32]) -> Standard:
        if not len(values):
            none = np.zeros(values.shape[1], np.float32)
            return cls(none, np.ones_like(none), none, none)
        scale = values.std(0)
        usable = np.where(scale > 1e-6, scale, 1.0).astype(np.float32)
        return cls(values.mean(0), usable, values.min(0), values.max(0))

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return ((np.clip(values, self.least, self.greatest) - self.mean) / self.scale).astype(np.float32)


@dataclass(frozen=True)
class HeadData:
    """Rows to fit on: N customers at moments."""

    customer: NDArray[np.int32]  # [N]
    hidden: NDArray[np.float32]  # [N, H]
    standard: NDArray[np.float32]  # [N, F] standardised dense features
    judged: NDArray[np.bool_] | None = None  # [N]: rows that may tell how strong a fit is best; None: all

    def __len__(self) -> int:
        return len(self.customer)


def fit_head(
    data: HeadData,
    outputs: int,
    loss_of: Callable[[NDArray[np.intp]], Loss],
    *,
    initial: list[float],
    seed: int,
    strength: Strength | None = None,
) -> tuple[Head, Strength]:
    """The head of a strength, by default the one that is best for held-out customers, fitted on all. `loss_of(rows)`
    gives the loss of these rows of `data`; `initial` [outputs] are the biases that the fit starts from.
    """
    chosen = strength or _best_strength(data, outputs, loss_of, initial, seed)
    states, rows = Standard.fit(data.hidden), np.arange(len(data))
    weight, bias = _fit(_inputs(data, states(data.hidden), chosen), outputs, loss_of(rows), chosen, initial)
    size = data.hidden.shape[1]
    on_states = np.zeros((outputs, size))
    if chosen.hidden_scale:
        on_states += weight[:, :size].numpy() * chosen.hidden_scale / states.scale
    on_features = weight[:, weight.shape[1] - data.standard.shape[1] :].numpy()
    full = np.concatenate([on_states, on_features], axis=1)
    return Head(full.astype(np.float32), (bias.numpy() - on_states @ states.mean).astype(np.float32)), chosen


def _best_strength(
    data: HeadData, outputs: int, loss_of: Callable[[NDArray[np.intp]], Loss], initial: list[float], seed: int
) -> Strength:
    folds = _folds(data, seed)
    if not folds:
        return Strength(0.0, PENALTIES[-1])
    best: tuple[float, Strength] | None = None
    states = Standard.fit(data.hidden)(data.hidden)
    for scale in HIDDEN_SCALES if data.hidden.shape[1] else (0.0,):
        for penalty in PENALTIES:
            strength = Strength(scale, penalty)
            inputs, quality = _inputs(data, states, strength), 0.0
            for known, unknown in folds:
                weight, bias = _fit(inputs[known], outputs, loss_of(known), strength, initial)
                with torch.no_grad():
                    quality += float(loss_of(unknown)(inputs[unknown] @ weight.T + bias).sum())
            if best is None or quality < best[0]:
                best = quality, strength
            if scale == 0.0 and not data.standard.shape[1]:
                break  # nothing to penalise
    assert best is not None
    return best[1]


def _folds(data: HeadData, seed: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Rows to fit on, and rows of other customers to judge by. A quarter of a small shop says little of a strength: it
    is judged by all of its customers, each of which the fit did not know."""
    rows, people = np.arange(len(data)), np.random.default_rng(seed).permutation(np.unique(data.customer))
    folds: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for part in np.array_split(people, _PARTS):
        outside = np.isin(data.customer, part)
        known, unknown = rows[~outside], rows[outside if data.judged is None else outside & data.judged]
        if len(known) and len(unknown):
            folds.append((known, unknown))
        if sum(len(judged) for _, judged in folds) >= _ENOUGH_ROWS:
            break
    return folds


def _inputs(data: HeadData, states: NDArray[np.float32], strength: Strength) -> Tensor:
    """[N, H + F], or [N, F] where the standardised `states` [N, H] are not read."""
    if not strength.hidden_scale:
        return torch.from_numpy(data.standard)
    return torch.from_numpy(np.concatenate([states * strength.hidden_scale, data.standard], axis=1))


def _fit(inputs: Tensor, outputs: int, loss: Loss, strength: Strength, initial: list[float]) -> tuple[Tensor, Tensor]:
    """Minimises mean loss + penalty * sum of squared weights with L-BFGS, from zero weights."""
    weight = torch.zeros(outputs, inputs.shape[1], requires_grad=True)
    bias = torch.tensor(initial, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=150, tolerance_change=1e-7, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(inputs @ weight.T + bias).mean() + strength.penalty * weight.square().sum()
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
