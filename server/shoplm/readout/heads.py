"""Prediction heads: one linear layer on the hidden state and the standardised dense features."""

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
    weight: Tensor  # [outputs, hidden + features]
    bias: Tensor  # [outputs]

    def __post_init__(self) -> None:
        features = len(self.input_mean)
        if self.input_scale.shape != (features,) or self.bias.shape != (self.weight.shape[0],):
            raise ValueError(
                f"heads: input_mean {tuple(self.input_mean.shape)}, input_scale {tuple(self.input_scale.shape)}, "
                f"weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)} do not fit together"
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
        tensors = (self.input_mean, self.input_scale, self.weight, self.bias)
        return Heads(*(tensor.to(device) for tensor in tensors))

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
        inputs = torch.cat((hidden.float(), (dense - self.input_mean) / self.input_scale), dim=1)
        return functional.linear(inputs, self.weight, self.bias)
