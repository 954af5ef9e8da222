"""What running requests keep on the GPU between two steps, so that a step can start before the last one's results are
known to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Rows by state slot. One more slot than there are: the padding of a captured step reads and writes it."""

    tokens: Tensor  # int64 [slots + 1, 1 + lanes]: the token drawn last; behind it the code chosen last by each lane
    nodes: Tensor  # int32 [slots + 1, lanes]: each beam's node, of the level chosen last
    scores: Tensor  # fp32 [slots + 1, lanes]: log p of each lane
    width: Tensor  # int32 [slots + 1]: live beams, which are the first lanes
    parents: Tensor  # int32 [slots + 1, steps, lanes]: the lane at the step before that a lane goes on from

    @staticmethod
    def allocate(slots: int, lanes: int, steps: int, device: torch.device) -> DeviceState:
        """`lanes`: the most of one search; `steps`: the most codes of an item, but the last. Both 0 without beams."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots + 1, *shape, dtype=dtype, device=device)

        return DeviceState(
            tokens=zeros(1 + lanes, dtype=torch.int64),
            nodes=zeros(lanes, dtype=torch.int32),
            scores=zeros(lanes, dtype=torch.float32),
            width=zeros(dtype=torch.int32),
            parents=zeros(steps, lanes, dtype=torch.int32),
        )

    @property
    def spare_slot(self) -> int:
        """The slot that belongs to no request."""
        return len(self.width) - 1

    @property
    def lanes(self) -> int:
        """Room for the lanes of one search."""
        return self.nodes.shape[1]

    @property
    def token_columns(self) -> int:
        """Entries of one slot in `tokens`; lane b's code is in column 1 + b."""
        return self.tokens.shape[1]
