"""Coupon campaigns: who was reached, who redeemed, and the head that predicts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.bundle import HeadSpec
from shoplm.readout.targets import logit
from shoplm.training import stumps
from shoplm.training.calibration import platt, with_line
from shoplm.training.heads import Head, HeadData, Loss, Standard, Strength, campaign_loss, fit_head
from shoplm.training.predictions import FEWEST_EVENTS, draft

FEWEST_ROWS = 30  # customers reached by campaigns; with fewer there is no target
MOST_FOLDS = 20  # of campaigns, for calibration


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
    rows: Campaigns, types: Sequence[str], standard: Standard, hidden_size: int, seed: int
) -> tuple[list[Head], list[HeadSpec]]:
    """One logit per campaign type: the types share their weights and differ in the bias, for there are few campaigns.
    So are they calibrated, on what heads fitted without a campaign say of it: one slope, an intercept for each type.

    The logit is the mean of a linear one and, where there are rows enough, of boosted stumps. They err differently: of
    campaigns left out, the mean foretells more than either.

    The head reads the dense features alone, its weights on the hidden state are zero. A pass of the base for each start
    of a campaign would cost half as much again as all others; and to learn only from those customers for whom a start
    falls into another pass is to learn from light buyers, who redeem half as often as all do.
    """
    if not len(types) or min(rows.redeemed.sum(), (~rows.redeemed).sum()) < FEWEST_EVENTS or len(rows) < FEWEST_ROWS:
        return [], []
    head, strength = _fit(rows, len(types), standard, seed)
    head = _of_types(head, standard.mean.shape[0], len(types))
    weight = np.concatenate([np.zeros((len(types), hidden_size), np.float32), head.weight], axis=1)
    unseen = _unseen(rows, len(types), standard, seed, strength)
    slope, intercepts = platt(unseen, rows.redeemed.astype(np.float64), rows.kind, len(types))
    specs = []
    for index, name in enumerate(types):
        of_type = rows.redeemed[rows.kind == index]
        if len(of_type):
            spec = with_line(draft("coupon_redemption", "sigmoid", (index,), 0), slope, intercepts[index])
            specs.append(msgspec.structs.replace(spec, campaign_type=name, base_rate=float(of_type.mean())))
    return [replace(head, weight=weight)], specs


def _of_types(head: Head, features: int, types: int) -> Head:
    """A head of one logit that reads `features` and the type, as one that has a logit for each type and reads no type.
    A unit reads features alone, or the type alone."""
    on_features, on_type, on_units = np.split(head.weight[0], [features, features + types])
    bias = head.bias[0] + on_type
    if head.unit_weight is None:
        return Head(np.repeat(on_features[None], types, axis=0), bias.astype(np.float32))
    reads_type = head.unit_weight[:, features:].any(axis=1)
    of_type = np.maximum(head.unit_weight[reads_type, features:] + head.unit_bias[reads_type, None], 0.0)  # [M, types]
    weight = np.concatenate([on_features, on_units[~reads_type]])
    return Head(
        weight=np.repeat(weight[None], types, axis=0),
        bias=(bias + on_units[reads_type] @ of_type).astype(np.float32),
        unit_weight=np.ascontiguousarray(head.unit_weight[~reads_type, :features]),
        unit_bias=head.unit_bias[~reads_type],
    )


def _unseen(rows: Campaigns, types: int, standard: Standard, seed: int, strength: Strength) -> NDArray[np.float64]:
    """[N]: logits of heads fitted without a row's campaign; where its type has no other, without its customer. So the
    type is known to each of them."""
    fold, units = np.zeros(len(rows), np.int64), 0
    for kind in range(types):
        of_type = np.flatnonzero(rows.kind == kind)
        owners, owner = np.unique(rows.campaign[of_type], return_inverse=True)
        if len(owners) == 1:
            owners, owner = np.unique(rows.customer[of_type], return_inverse=True)
        fold[of_type] = (units + np.random.default_rng(seed).permutation(len(owners))[owner]) % MOST_FOLDS
        units += len(owners)
    values = np.zeros(len(rows))
    if len(np.unique(fold)) == 1:  # one campaign that reached one customer again and again
        fold = np.arange(len(rows)) % MOST_FOLDS
    for each in np.unique(fold):
        head, _ = _fit(rows.where(fold != each), types, standard, seed, strength)
        held = rows.where(fold == each)
        values[fold == each] = head.values(np.zeros((len(held), 0), np.float32), _inputs(held, types, standard))[:, 0]
    return values


def _fit(
    rows: Campaigns, types: int, standard: Standard, seed: int, strength: Strength | None = None
) -> tuple[Head, Strength]:
    """One logit from the dense features and the type."""
    data = HeadData(rows.customer, np.zeros((len(rows), 0), np.float32), _inputs(rows, types, standard))
    outcome = torch.from_numpy(rows.redeemed.astype(np.float32))
    first = torch.zeros(len(rows), dtype=torch.long)
    start = [float(logit(np.array([rows.redeemed.mean()]))[0])]

    def loss_of(at: NDArray[np.intp]) -> Loss:
        return campaign_loss(first[at], outcome[at])

    linear, found = fit_head(data, 1, loss_of, initial=start, seed=seed, strength=strength)
    if len(rows) < stumps.FEWEST_ROWS or rows.redeemed.all() or not rows.redeemed.any():
        return linear, found
    steps, width = stumps.fit_stumps(data.standard, rows.redeemed, seed), data.standard.shape[1]
    weight = np.concatenate([linear.weight + steps.weight[:, :width], steps.weight[:, width:]], axis=1)
    half = np.float32(0.5)
    return replace(steps, weight=half * weight, bias=half * (linear.bias + steps.bias)), found


def _inputs(rows: Campaigns, types: int, standard: Standard) -> NDArray[np.float32]:
    return np.concatenate([standard(rows.features), np.eye(types, dtype=np.float32)[rows.kind]], axis=1)
