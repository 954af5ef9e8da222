"""Coupon campaigns: who was reached, who redeemed, and the head that predicts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.bundle import HeadSpec
from shoplm.readout.targets import logit
from shoplm.training.calibration import calibrated
from shoplm.training.heads import Head, HeadData, Standard, campaign_loss, fit_head
from shoplm.training.predictions import FEWEST_EVENTS, FEWEST_ROWS, draft


@dataclass(frozen=True)
class Campaigns:
    """Customers at the starts of campaigns: N rows."""

    customer: NDArray[np.int32]
    features: NDArray[np.float32]
    kind: NDArray[np.int64]  # index into the campaign types
    redeemed: NDArray[np.bool_]
    campaign: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.customer)

    def where(self, keep: NDArray[np.bool_]) -> Campaigns:
        """The rows that are kept."""
        return Campaigns(
            customer=self.customer[keep],
            features=self.features[keep],
            kind=self.kind[keep],
            redeemed=self.redeemed[keep],
            campaign=self.campaign[keep],
        )


def fit_campaigns(
    train: Campaigns, tune: Campaigns, types: Sequence[str], standard: Standard, hidden_size: int, seed: int
) -> tuple[list[Head], list[HeadSpec]]:
    """One logit per campaign type: the types share their weights and differ in the bias, for there are few campaigns.
    Slope and intercept of the calibration are shared for the same reason.

    The head reads the dense features alone, its weights on the hidden state are zero. A pass of the base for each start
    of a campaign would cost half as much again as all others; and to learn only from those customers for whom a start
    falls into another pass is to learn from light buyers, who redeem half as often as all do.
    """
    both = [int(part.redeemed.sum()) for part in (train, tune)] + [int((~p.redeemed).sum()) for p in (train, tune)]
    if not len(types) or min(both) < FEWEST_EVENTS or min(len(train), len(tune)) < FEWEST_ROWS:
        return [], []
    one_hot = np.eye(len(types), dtype=np.float32)
    none = np.zeros((len(train), 0), np.float32)
    data = HeadData(train.customer, none, np.concatenate([standard(train.features), one_hot[train.kind]], axis=1))
    outcome = torch.from_numpy(train.redeemed.astype(np.float32))
    zero = torch.zeros(len(train), dtype=torch.long)
    start = [float(logit(np.array([train.redeemed.mean()]))[0])]
    head, _ = fit_head(data, 1, lambda rows: campaign_loss(zero[rows], outcome[rows]), initial=start, seed=seed)
    width = head.weight.shape[1] - len(types)
    weight = np.concatenate([np.zeros((1, hidden_size), np.float32), head.weight[:, :width]], axis=1)
    bias = (head.bias + head.weight[0, width:]).astype(np.float32)
    spread = Head(np.repeat(weight, len(types), axis=0), bias)
    values = spread.values(np.zeros((len(tune), hidden_size), np.float32), standard(tune.features))
    chosen = values[np.arange(len(tune)), tune.kind][:, None]
    spec = draft("coupon_redemption", "sigmoid", (0,), 0)
    shared = calibrated(spec, chosen, tune.redeemed.astype(np.float64))
    specs = []
    for index, name in enumerate(types):
        of_type = train.redeemed[train.kind == index]
        if len(of_type):
            rate = float(of_type.mean())
            specs.append(msgspec.structs.replace(shared, outputs=(index,), campaign_type=name, base_rate=rate))
    return [spread], specs
