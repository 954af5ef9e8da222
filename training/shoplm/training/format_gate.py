"""The gate of a weight format: what it may cost a bundle, beside the same bundle in its model's own format."""

from __future__ import annotations

from dataclasses import dataclass

from shoplm.training.report import OURS, RankingResult, Report

NDCG_SHARE = 0.01  # of NDCG@10 that a format may lose
BRIER_RISE = 0.002  # by which a probability's Brier score may grow


@dataclass(frozen=True)
class Loss:
    """One metric with and without the format."""

    metric: str
    reference: float
    found: float
    loss: float  # below 0: the format happens to be better
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the loss is within its limit."""
        return self.loss <= self.limit


def losses(reference: Report, found: Report) -> list[Loss]:
    """Relative loss of NDCG@10 by split, and rise of the Brier score by target, of two reports on the same customers.

    Raises ValueError where they are not.
    """
    if (reference.seed, reference.customers) != (found.seed, found.customers):
        raise ValueError(f"the reports are of {reference.customers} and {found.customers} customers: not comparable")
    result = []
    for before, after in zip(reference.rankings, found.rankings, strict=True):
        best, now = _ndcg(before), _ndcg(after)
        share = (best - now) / best if best > 0 else 0.0
        result.append(Loss(f"NDCG@10, {before.split}", best, now, share, NDCG_SHARE))
    for row, other in zip(reference.probabilities, found.probabilities, strict=True):
        result.append(Loss(f"Brier, {row.target}", row.brier, other.brier, other.brier - row.brier, BRIER_RISE))
    return result


def _ndcg(result: RankingResult) -> float:
    return next(row.ndcg for row in result.rows if row.name == OURS)
