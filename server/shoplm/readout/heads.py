"""Prediction heads: linear in the hidden state, the standardised dense features and hidden units of these.

Features are held within the range that the heads were fitted on: beyond it, as after a silence longer than any that
training saw, a sum goes on in whatever direction it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Heads:
    """fp32. Outputs are raw values; calibration to probabilities and amounts is metadata of the bundle."""

    input_mean: Tensor  # [features]
    input_scale: Tensor  # [features]
    weight: Tensor  # [outputs, hidden + features + units]
    bias: Tensor  # [outputs]
    unit_weight: Tensor | None = None  # [units, features]; None: no units
    unit_bias: Tensor | None = None  # [units]
    input_range: Tensor | None = None  # [2, features]: least and greatest of training; None: as they come

    def __post_init__(self) -> None:
        features = len(self.input_mean)
        if self.input_scale.shape != (features,) or self.bias.shape != (self.weight.shape[0],):
            raise ValueError(
                f"heads: input_mean {tuple(self.input_mean.shape)}, input_scale {tuple(self.input_scale.shape)}, "
                f"weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)} do not fit together"
            )
        if self.unit_weight is not None and (
            self.unit_weight.shape[1:] != (features,)
            or self.unit_bias is None
            or self.unit_bias.shape != self.unit_weight.shape[:1]
        ):
            raise ValueError(
                f"heads: unit_weight {tuple(self.unit_weight.shape)} and unit_bias do not fit {features} features"
            )
        if self.input_range is not None and (
            self.input_range.shape != (2, features) or not bool((self.input_range[0] <= self.input_range[1]).all())
        ):
            raise ValueError(
                f"heads: input_range {tuple(self.input_range.shape)} holds no range of {features} features"
            )
        if not bool((self.input_scale > 0).all()):
            raise ValueError("heads: input_scale has an entry that is not positive")

    @property
    def features(self) -> int:
        return len(self.input_mean)

    @property
    def outputs(self) -> int:
        return len(self.bias)

    def to(self, device: torch.device) -> Heads:
        """The same heads on `device`."""
        optional = (self.unit_weight, self.unit_bias, self.input_range)
        moved = (None if tensor is None else tensor.to(device) for tensor in optional)
        tensors = (self.input_mean, self.input_scale, self.weight, self.bias)
        return Heads(*(tensor.to(device) for tensor in tensors), *moved)

    def evaluate(self, hidden: Tensor, features: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
        """Raw values per row of `hidden` [rows, hidden_size] (any float type), after the final norm."""
        self.check(features)
        dense = torch.tensor(features, dtype=torch.float32, device=hidden.device)
        values = self.values(hidden, dense.reshape(len(features), self.features))
        return [tuple(row) for row in values.tolist()]

    def check(self, features: Sequence[tuple[float, ...]]) -> None:
        """Raises ValueError where a row has another number of dense features than the heads read."""
        for row in features:
            if len(row) != self.features:
                raise ValueError(f"{len(row)} dense features, the bundle's heads expect {self.features}")

    def values(self, hidden: Tensor, dense: Tensor) -> Tensor:
        """fp32 [rows, outputs]: raw values, from `hidden` [rows, hidden_size] and `dense` [rows, features]."""
        if self.input_range is not None:
            dense = torch.clamp(dense, self.input_range[0], self.input_range[1])
        standard = (dense - self.input_mean) / self.input_scale
        inputs = [hidden.float(), standard]
        if self.unit_weight is not None:
            inputs.append(functional.linear(standard, self.unit_weight, self.unit_bias).relu())
        return functional.linear(torch.cat(inputs, dim=1), self.weight, self.bias)
