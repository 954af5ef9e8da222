"""The prediction targets of a shop: labels, heads, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.bundle import HeadSpec
from shoplm.features import dense_features
from shoplm.history import SECONDS_PER_DAY, EventKind
from shoplm.readout.targets import PROBABILITIES
from shoplm.training.calibration import calibrated
from shoplm.training.heads import HeadData, LinearHead, Standard, count_loss, fit_head, hazard_loss, spend_loss
from shoplm.training.histories import Histories
from shoplm.training.labels import behaviour
from shoplm.training.samples import HiddenTable
from shoplm.training.timeline import Timeline

FEWEST_ROWS = 30  # a target is left out where training or calibration has fewer customers
FEWEST_EVENTS = 5  # … or fewer of either outcome


@dataclass(frozen=True)
class Observed:
    """Customers at moments and what they did next: N rows, for one use."""

    customer: NDArray[np.int32]
    moment: NDArray[np.float64]
    hidden: NDArray[np.float32]  # [N, H]
    features: NDArray[np.float32]  # [N, F] raw dense features
    delay_days: NDArray[np.float64]  # until the first purchase; infinite: none within the longest horizon
    visits: NDArray[np.float64]  # within the longest horizon
    spend: NDArray[np.float64]  # within the longest horizon
    since_purchase_days: NDArray[np.float64]  # infinite: never bought

    def __len__(self) -> int:
        return len(self.customer)

    def outcome(self, spec: HeadSpec) -> NDArray[np.float64]:
        """The target's true value per row: 0 or 1, a count, or an amount."""
        if spec.kind == "purchase":
            return (self.delay_days < spec.horizon_days).astype(np.float64)
        if spec.kind == "churn":
            return (self.delay_days >= spec.horizon_days).astype(np.float64)
        return self.visits if spec.kind == "purchase_count" else self.spend

    def population(self, spec: HeadSpec) -> NDArray[np.bool_]:
        """Rows that the target applies to."""
        if spec.active_within_days <= 0:
            return np.ones(len(self), bool)
        return self.since_purchase_days <= spec.active_within_days


@dataclass(frozen=True)
class Predictor:
    """What the bundle stores for PredictionService."""

    standard: Standard
    head: LinearHead
    specs: tuple[HeadSpec, ...]
    hidden_scales: dict[str, float]  # per head: how much of the hidden state the fit kept; 0: none

    def values(self, hidden: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Raw values [N, P]."""
        return self.head.values(hidden, self.standard(features))


def observe(
    table: HiddenTable,
    chosen: NDArray[np.intp],
    histories: Histories,
    timeline: Timeline,
    item_prices: NDArray[np.float32],
) -> Observed:
    """Features before and behaviour after each of the `chosen` samples' moments."""
    horizon = timeline.horizons[-1] if timeline.horizons else 0
    order = chosen[np.argsort(table.customer[chosen], kind="stable")]
    rows: list[tuple[float, int, float, float]] = []
    features = []
    last = None
    for index in order.tolist():
        customer, moment = int(table.customer[index]), float(table.moment[index])
        if customer != last:
            history, last = histories[customer], customer
        known = history.before(moment)
        bought = known.time[known.kind == EventKind.PURCHASE]
        since = float(moment - bought.max()) / SECONDS_PER_DAY if len(bought) else float("inf")
        future = behaviour(history, moment, horizon, item_prices)
        rows.append((future.delay_days, future.visits, future.spend, since))
        features.append(dense_features(known, item_prices))
    columns = np.array(rows, np.float64).reshape(len(order), 4)
    width = len(dense_features(histories[0].before(0.0), item_prices))
    return Observed(
        customer=table.customer[order],
        moment=table.moment[order],
        hidden=table.hidden[order],
        features=np.array(features, np.float32).reshape(len(order), width),
        delay_days=columns[:, 0],
        visits=columns[:, 1],
        spend=columns[:, 2],
        since_purchase_days=columns[:, 3],
    )


def fit_behaviour(
    train: Observed, tune: Observed, horizons: Sequence[int], standard: Standard, seed: int
) -> tuple[list[LinearHead], list[HeadSpec], dict[str, float]]:
    """Heads for purchase, number of purchases, spend and churn. `train` labels end before `tune` begins."""
    if not horizons or min(len(train), len(tune)) < FEWEST_ROWS:
        return [], [], {}
    data = HeadData(train.customer, train.hidden, standard(train.features))
    longest = horizons[-1]
    step = torch.from_numpy(np.searchsorted(np.array(horizons, np.float64), train.delay_days, side="right"))
    visits, spend = (torch.from_numpy(column.astype(np.float32)) for column in (train.visits, train.spend))
    heads: list[LinearHead] = []
    specs: list[HeadSpec] = []
    scales: dict[str, float] = {}

    def add(name: str, outputs: int, loss_of: object, initial: list[float], drafts: list[HeadSpec]) -> None:
        usable = [spec for spec in drafts if _enough(train, spec) and _enough(tune, spec)]
        if usable:
            head, scales[name] = fit_head(data, outputs, loss_of, initial=initial, seed=seed)  # type: ignore[arg-type]
            first = sum(len(other.bias) for other in heads)
            heads.append(head)
            for spec in usable:
                specs.append(msgspec.structs.replace(spec, outputs=tuple(first + index for index in spec.outputs)))

    steps = len(horizons)
    drafts = [draft("purchase", "hazard", tuple(range(index + 1)), horizon) for index, horizon in enumerate(horizons)]
    churn = draft("churn", "survival", tuple(range(steps)), longest, active_within_days=2.0 * longest)
    add("purchase", steps, lambda rows: hazard_loss(step[rows], steps), [0.0] * steps, [*drafts, churn])
    mean_visits = float(np.log(max(train.visits.mean(), 0.01)))
    count = draft("purchase_count", "count", (0,), longest)
    add("purchase_count", 1, lambda rows: count_loss(visits[rows]), [mean_visits], [count])
    paid = train.spend[train.spend > 0]
    start = [0.0, float(np.log(paid).mean()), 0.0] if len(paid) else [0.0, 0.0, 0.0]
    amount = draft("spend", "zero_inflated_lognormal", (0, 1, 2), longest)
    add("spend", 3, lambda rows: spend_loss(spend[rows]), start, [amount])
    values = np.concatenate([head.values(tune.hidden, standard(tune.features)) for head in heads], axis=1)
    done = []
    for spec in specs:
        inside, before = tune.population(spec), train.population(spec)
        rate = float(train.outcome(spec)[before].mean())
        named = msgspec.structs.replace(spec, base_rate=rate)
        done.append(calibrated(named, values[inside], tune.outcome(spec)[inside]))
    return heads, done, scales


def draft(
    kind: str, transform: str, outputs: tuple[int, ...], horizon: int, active_within_days: float = 0.0
) -> HeadSpec:
    return HeadSpec(kind, transform, outputs, 0.0, horizon, active_within_days=active_within_days)


def _enough(rows: Observed, spec: HeadSpec) -> bool:
    truth = rows.outcome(spec)[rows.population(spec)]
    return int((truth > 0).sum()) >= FEWEST_EVENTS and (
        spec.transform not in PROBABILITIES or int((truth == 0).sum()) >= FEWEST_EVENTS
    )


def shifted(specs: Sequence[HeadSpec], first: int) -> list[HeadSpec]:
    """Specs whose outputs begin at `first`."""
    return [msgspec.structs.replace(spec, outputs=tuple(first + at for at in spec.outputs)) for spec in specs]
