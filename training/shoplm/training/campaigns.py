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
from shoplm.training.heads import HeadData, LinearHead, Standard, campaign_loss, fit_head
from shoplm.training.predictions import FEWEST_EVENTS, FEWEST_ROWS, draft


@dataclass(frozen=True)
class Campaigns:
    """Customers at the starts of campaigns: N rows."""

    customer: NDArray[np.int32]
    hidden: NDArray[np.float32]
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
            hidden=self.hidden[keep],
            features=self.features[keep],
            kind=self.kind[keep],
            redeemed=self.redeemed[keep],
            campaign=self.campaign[keep],
        )


def fit_campaigns(
    train: Campaigns, tune: Campaigns, types: Sequence[str], standard: Standard, seed: int
) -> tuple[list[LinearHead], list[HeadSpec], dict[str, float]]:
    """One logit per campaign type: the types share their weights and differ in the bias, for there are few campaigns.
    Slope and intercept of the calibration are shared for the same reason."""
    both = [int(part.redeemed.sum()) for part in (train, tune)] + [int((~p.redeemed).sum()) for p in (train, tune)]
    if not len(types) or min(both) < FEWEST_EVENTS or min(len(train), len(tune)) < FEWEST_ROWS:
        return [], [], {}
    one_hot = np.eye(len(types), dtype=np.float32)
    data = HeadData(
        train.customer, train.hidden, np.concatenate([standard(train.features), one_hot[train.kind]], axis=1)
    )
    outcome = torch.from_numpy(train.redeemed.astype(np.float32))
    zero = torch.zeros(len(train), dtype=torch.long)
    start = [float(logit(np.array([train.redeemed.mean()]))[0])]
    head, scale = fit_head(data, 1, lambda rows: campaign_loss(zero[rows], outcome[rows]), initial=start, seed=seed)
    width = head.weight.shape[1] - len(types)
    spread = LinearHead(
        np.repeat(head.weight[:, :width], len(types), axis=0), (head.bias + head.weight[0, width:]).astype(np.float32)
    )
    values = spread.values(tune.hidden, standard(tune.features))
    chosen = values[np.arange(len(tune)), tune.kind][:, None]
    spec = draft("coupon_redemption", "sigmoid", (0,), 0)
    shared = calibrated(spec, chosen, tune.redeemed.astype(np.float64))
    specs = []
    for index, name in enumerate(types):
        of_type = train.redeemed[train.kind == index]
        if len(of_type):
            rate = float(of_type.mean())
            specs.append(msgspec.structs.replace(shared, outputs=(index,), campaign_type=name, base_rate=rate))
    return [spread], specs, {"coupon_redemption": scale}
