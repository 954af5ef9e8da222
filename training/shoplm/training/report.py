"""What was measured, as data: written beside the card as metrics.json, and what `shoplm evaluate` prints."""

from __future__ import annotations

import msgspec


class RankingRow(msgspec.Struct, frozen=True):
    """Means over customers, ten items, ranked against all items."""

    name: str
    recall: float
    ndcg: float
    repeat_recall: float
    explore_recall: float


class Difference(msgspec.Struct, frozen=True):
    """Mean paired difference and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class RankingResult(msgspec.Struct, frozen=True):
    """One split."""

    split: str
    customers: int
    rows: tuple[RankingRow, ...]
    recall_over_count: Difference  # this model minus the tuned count baseline
    ndcg_over_count: Difference


class ProbabilityRow(msgspec.Struct, frozen=True):
    """One probability target on the test customers."""

    target: str
    customers: int
    observed: float  # share of customers
    auc: float
    brier: float
    ece: float
    boosted_auc: float
    boosted_brier: float
    boosted_ece: float


class AmountRow(msgspec.Struct, frozen=True):
    """One amount target on the test customers."""

    target: str
    customers: int
    observed: float  # mean
    predicted: float  # mean
    mae: float
    coverage: float  # of the 90 % intervals
    boosted_mae: float
    constant_mae: float  # of the training mean


class Report(msgspec.Struct, frozen=True):
    """Everything in the card that is a number."""

    seed: int
    customers: int  # that hidden states were computed for, in seeded random order
    customers_in_log: int
    rankings: tuple[RankingResult, ...]
    probabilities: tuple[ProbabilityRow, ...]
    amounts: tuple[AmountRow, ...]
    count_weights: dict[str, float]  # of the tuned count baseline


def label(kind: str, horizon_days: int, campaign_type: str) -> str:
    """A target's name for people."""
    name = kind.replace("_", " ")
    return f"{name} {campaign_type}" if campaign_type else f"{name} {horizon_days} d"
