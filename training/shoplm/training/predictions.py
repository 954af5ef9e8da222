"""The prediction targets of a shop: labels, heads, calibration.

Heads are fitted on everything before the test, and calibrated on values that heads fitted without a customer gave that
customer: what fits too closely shows there, at all times of the training. A later window alone would show its own
season as well, which the next one need not share. A head that reads the hidden state is calibrated on rows that have
one, for an amount at the mean state is not the mean of amounts. How strongly it is read is judged on the newest moment:
an adapter, or a base from nothing, was trained on labels of the earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.bundle import HeadSpec
from shoplm.features import dense_features
from shoplm.history import SECONDS_PER_DAY, EventKind
from shoplm.readout.targets import PROBABILITIES
from shoplm.training.calibration import calibrated, growing, with_line
from shoplm.training.feature_nets import FEWEST_ROWS as NET_ROWS
from shoplm.training.feature_nets import fit_net_and_states
from shoplm.training.heads import (
    Head,
    HeadData,
    Loss,
    Standard,
    Strength,
    count_loss,
    fit_head,
    hazard_loss,
    spend_loss,
)
from shoplm.training.histories import Histories
from shoplm.training.labels import behaviour
from shoplm.training.samples import HiddenTable, Sample, Task, Use
from shoplm.training.timeline import Timeline

FEWEST_CUSTOMERS = 30  # a target is left out where training has fewer
FEWEST_EVENTS = 5  # … or fewer of either outcome
FOLDS = 4  # of customers, for calibration
DENSE_ROWS = 50_000  # of what reads dense features alone: more takes minutes and teaches little


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

    def where(self, keep: NDArray[np.bool_]) -> Observed:
        """The rows that are kept."""
        return Observed(**{column.name: getattr(self, column.name)[keep] for column in fields(self)})

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
    head: Head
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
        known = histories.before(customer, history, moment)
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


def weekly_rows(
    customers: NDArray[np.integer],
    histories: Histories,
    timeline: Timeline,
    item_prices: NDArray[np.float32],
    seed: int,
) -> Observed:
    """What nets and boosting learn from: the customers who had a history at each of the weekly cut-offs, without hidden
    states; at most DENSE_ROWS, at random."""
    pairs = [
        (int(customer), Sample(moment, Task.PREDICT, Use.HEAD_TRAIN, False))
        for customer in customers
        for moment in timeline.weekly
        if len(histories[int(customer)]) and histories[int(customer)].time[0] < moment
    ]
    if len(pairs) > DENSE_ROWS:
        kept = np.sort(np.random.default_rng(seed).choice(len(pairs), DENSE_ROWS, replace=False))
        pairs = [pairs[index] for index in kept.tolist()]
    table = HiddenTable.bare(pairs)
    return observe(table, np.arange(len(table)), histories, timeline, item_prices)


@dataclass(frozen=True)
class _Group:
    """Targets that share the outputs of one fit."""

    name: str
    outputs: int
    loss_of: Callable[[Observed], Callable[[NDArray[np.intp]], Loss]]
    initial: list[float]
    drafts: list[HeadSpec]


def fit_behaviour(
    train: Observed, dense: Observed, horizons: Sequence[int], standard: Standard, seed: int
) -> tuple[list[Head], list[HeadSpec], dict[str, float]]:
    """Heads for purchase, number of purchases, spend and churn, from `train`, with hidden states, and `dense`, at more
    moments without."""
    if not horizons or len(np.unique(train.customer)) < FEWEST_CUSTOMERS:
        return [], [], {}
    nets = len(dense) >= NET_ROWS
    people = np.concatenate([train.customer, dense.customer]) if nets else train.customer
    fold_of = np.random.default_rng(seed).permutation(int(people.max()) + 1) % FOLDS
    heads: list[Head] = []
    specs: list[HeadSpec] = []
    scales: dict[str, float] = {}
    for group in _groups(train, horizons):
        usable = [spec for spec in group.drafts if _enough(train, spec)]
        if not usable:
            continue
        head, strength = _fit(group, train, dense if nets else None, standard, seed)
        # To calibrate on: the more moments, the better, but with the states that the head reads.
        rows = _with_no_state(dense, train) if nets and not strength.hidden_scale else train
        fold = fold_of[rows.customer]
        unseen = np.zeros((len(rows), group.outputs))
        for each in np.unique(fold):
            known = train.where(fold_of[train.customer] != each)
            others = dense.where(fold_of[dense.customer] != each) if nets else None
            without, _ = _fit(group, known, others, standard, seed, strength)
            part = rows.where(fold == each)
            unseen[fold == each] = without.values(part.hidden, standard(part.features))
        first = sum(len(other.bias) for other in heads)
        heads.append(head)
        scales[group.name] = strength.hidden_scale
        specs += shifted(_calibrated(usable, unseen, rows), first)
    return heads, specs, scales


def _fit(
    group: _Group,
    train: Observed,
    dense: Observed | None,
    standard: Standard,
    seed: int,
    strength: Strength | None = None,
) -> tuple[Head, Strength]:
    """The group's head: with nets on the rows of `dense`, or linear."""
    data = HeadData(train.customer, train.hidden, standard(train.features), train.moment == train.moment.max())
    if dense is None:
        return fit_head(
            *(data, group.outputs, group.loss_of(train)), initial=group.initial, seed=seed, strength=strength
        )
    return fit_net_and_states(
        *(standard(dense.features), group.loss_of(dense), data, group.loss_of(train), group.outputs),
        initial=group.initial,
        seed=seed,
        strength=strength,
    )


def _with_no_state(rows: Observed, train: Observed) -> Observed:
    """The rows with a state of zeros, for heads that read none."""
    return replace(rows, hidden=np.zeros((len(rows), train.hidden.shape[1]), np.float32))


def _calibrated(specs: Sequence[HeadSpec], unseen: NDArray[np.float64], rows: Observed) -> list[HeadSpec]:
    """The specs with parameters fitted to `unseen` [N, P], the values of heads that did not know the rows' customers.
    Chances of a purchase grow with the horizon; where that takes lines of their own from them, churn is what the
    longest leaves."""
    found = []
    for spec in specs:
        inside = rows.population(spec)
        truth = rows.outcome(spec)[inside]
        named = msgspec.structs.replace(spec, base_rate=float(truth.mean()))
        found.append(calibrated(named, unseen[inside], truth))
    steps = [index for index, spec in enumerate(found) if spec.kind == "purchase"]
    own = [found[index] for index in steps]
    grown = growing(own, unseen, [rows.outcome(spec) for spec in own])
    for index, spec in zip(steps, grown, strict=True):
        found[index] = spec
    if grown != own and found[-1].kind == "churn" and found[-1].horizon_days == grown[-1].horizon_days:
        line = grown[-1].parameters
        found[-1] = with_line(found[-1], line["slope"], -line["intercept"])
    return found


def _groups(train: Observed, horizons: Sequence[int]) -> list[_Group]:
    steps, longest = len(horizons), horizons[-1]
    ends = np.array(horizons, np.float64)

    def hazards(rows: Observed) -> Callable[[NDArray[np.intp]], Loss]:
        step = torch.from_numpy(np.searchsorted(ends, rows.delay_days, side="right"))
        return lambda chosen: hazard_loss(step[chosen], steps)

    def counts(rows: Observed) -> Callable[[NDArray[np.intp]], Loss]:
        visits = torch.from_numpy(rows.visits.astype(np.float32))
        return lambda chosen: count_loss(visits[chosen])

    def amounts(rows: Observed) -> Callable[[NDArray[np.intp]], Loss]:
        spend = torch.from_numpy(rows.spend.astype(np.float32))
        return lambda chosen: spend_loss(spend[chosen])

    drafts = [draft("purchase", "hazard", tuple(range(index + 1)), horizon) for index, horizon in enumerate(horizons)]
    churn = draft("churn", "survival", tuple(range(steps)), longest, active_within_days=2.0 * longest)
    mean_visits = float(np.log(max(train.visits.mean(), 0.01)))
    paid = train.spend[train.spend > 0]
    start = [0.0, float(np.log(paid).mean()), 0.0] if len(paid) else [0.0, 0.0, 0.0]
    return [
        _Group("purchase", steps, hazards, [0.0] * steps, [*drafts, churn]),
        _Group("purchase_count", 1, counts, [mean_visits], [draft("purchase_count", "count", (0,), longest)]),
        _Group("spend", 3, amounts, start, [draft("spend", "zero_inflated_lognormal", (0, 1, 2), longest)]),
    ]


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
