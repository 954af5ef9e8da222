"""What training finds and a bundle holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shoplm.readout.adopt import Adopt
from shoplm.readout.rebuy import Rebuy
from shoplm.training.habits import ShopHabits
from shoplm.training.predictions import Predictor
from shoplm.training.ranker import OutputRows
from shoplm.training.scoring import Weights


@dataclass(frozen=True)
class Model:
    """The tensors of a bundle, and the weights of its score."""

    rows: OutputRows
    popularity: torch.Tensor  # [items] natural logs
    weights: Weights  # model = 1: the rows are what is stored
    habits: ShopHabits
    rebuy: Rebuy | None
    adopt: Adopt | None
    predictor: Predictor | None
