"""What was measured, as data: written beside the card as metrics.json, and what `shoplm evaluate` prints.

None stands for what could not be measured, such as repeat recall where nobody bought anything again.
"""

from __future__ import annotations

import math

import msgspec

OURS, COUNT, TIFU, POPULARITY = "ShopLM", "tuned count + decay + popularity", "TIFU-KNN, tuned", "popularity"
BG_NBD, OWN_MEAN, BOOSTING, CONSTANT = "BG/NBD", "the customer's own mean", "gradient boosting", "training mean"
BASKETS = "next baskets"


class RankingRow(msgspec.Struct, frozen=True):
    """Means over customers, ten items, ranked against all items."""

    name: str
    recall: float
    ndcg: float
    repeat_recall: float | None
    explore_recall: float | None


class Difference(msgspec.Struct, frozen=True):
    """Mean paired difference and its 95 % bootstrap interval; without one where there are too few customers."""

    mean: float | None
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """How ours compares with the other, in words."""
        if self.mean is None:
            return "not measured against"
        if self.low is None or self.high is None:
            return "of too few customers to compare with"
        return "above" if self.low > 0 else "below" if self.high < 0 else "not distinguishable from"


class Estimate(msgspec.Struct, frozen=True):
    """A value and its 95 % interval."""

    value: float | None
    low: float | None
    high: float | None

    def holds(self, value: float) -> bool:
        """Whether the interval does."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high


class Exploration(msgspec.Struct, frozen=True):
    """Lists of ten from which everything that the customer has bought before is left out."""

    customers: int  # with something new in the basket
    recall: dict[str, float]  # ranking -> explore recall@10
    over_popularity: Difference

    @property
    def ratio(self) -> float | None:
        """Ours as a multiple of popularity's."""
        ours, popular = self.recall[OURS], self.recall[POPULARITY]
        return ours / popular if popular > 0 else None


class Breakdown(msgspec.Struct, frozen=True):
    """One group of customers or items."""

    group: str
    count: int  # customers or items
    values: dict[str, float]


class RankingResult(msgspec.Struct, frozen=True):
    """One split."""

    split: str
    customers: int
    rows: tuple[RankingRow, ...]
    recall_over_count: Difference  # this model minus the tuned count baseline
    ndcg_over_count: Difference
    recall_over_tifu: Difference
    ndcg_over_tifu: Difference
    exploration: Exploration | None  # None: nobody bought anything new
    by_visits: tuple[Breakdown, ...]  # recall@10 by the number of visits that were known
    by_popularity: tuple[Breakdown, ...]  # share of the ten by how often items are bought, and of the baskets


class ProbabilityRow(msgspec.Struct, frozen=True):
    """One probability target on the test customers."""

    target: str
    customers: int
    observed: float  # share of customers
    auc: float | None
    brier: float
    ece: float
    slope: Estimate
    intercept: Estimate
    lift: float | None  # of the top decile
    boosted_auc: float | None
    boosted_brier: float
    boosted_ece: float
    boosted_lift: float | None
    auc_over_boosting: Difference
    brier_over_boosting: Difference  # below 0: ours is better
    reliability: tuple[tuple[int, float, float], ...]  # customers, mean probability, observed share, per bin


class AmountError(msgspec.Struct, frozen=True):
    """How far one way of foretelling amounts is off."""

    name: str
    mae: float
    rmse: float


class AmountRow(msgspec.Struct, frozen=True):
    """One amount target on the test customers."""

    target: str
    customers: int
    observed: float  # mean
    predicted: float  # mean
    coverage: float  # of the 90 % intervals
    errors: tuple[AmountError, ...]  # ours first

    @property
    def ours(self) -> AmountError:
        return self.errors[0]


class ChatKept(msgspec.Struct, frozen=True):
    """What an adapter left of ordinary talk: perplexities per token of the base's answers to held-out prompts."""

    answers: int
    tokens: int
    base: float  # the base alone, without a history: it wrote them
    adapted: float  # adapted, without a history
    adapted_behind_history: float
    base_behind_history: float  # why an adapter is needed

    @property
    def increase(self) -> float:
        """Share by which the adapter raises the perplexity without a history: .05 is five per cent."""
        return self.adapted / self.base - 1.0


class Deletion(msgspec.Struct, frozen=True):
    """How far the score of the first recommendation moves when three items are taken out of the history; means over
    customers of the absolute change, everything computed again."""

    cited: float  # those of the largest effects
    matched: float  # others, drawn to be as recent and as often bought

    @property
    def ratio(self) -> float | None:
        return self.cited / self.matched if self.matched > 0 else None


class ExplanationResult(msgspec.Struct, frozen=True):
    """Effects that an explanation names against leave-one-out: the part taken out and everything computed again.

    Spearman's correlation over the parts of one explanation, means over answers."""

    customers: int
    parts: int  # of an explanation, at most
    score: float | None  # effects on the score
    model: float | None  # on the model's term alone, which only its reading approximates
    predictions: dict[str, float | None]  # by target: effects on the log-odds, or on the logarithm of an amount
    randomised: float | None  # on the term of a model of shuffled weights, against the true model's leave-one-out
    deletion: Deletion
    model_deletion: Deletion  # of the model's term, by the model's share
    cited_in_history: float  # share of the cited items


class Sample(msgspec.Struct, frozen=True):
    """The part of a report that measuring again needs."""

    seed: int
    customers: int  # that hidden states were computed for, in seeded random order
    log: str  # the fingerprint of the shop's events, items and profiles


class Report(Sample, frozen=True):
    """Everything in the card that is a number."""

    customers_in_log: int
    rankings: tuple[RankingResult, ...]
    probabilities: tuple[ProbabilityRow, ...]
    amounts: tuple[AmountRow, ...]
    count_weights: dict[str, float]  # of the tuned count baseline
    tifu_settings: dict[str, float]  # of the tuned TIFU-KNN
    chat: ChatKept | None = None  # None: no adapter
    explanations: ExplanationResult | None = None  # None: not measured


def known(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def shown(value: float | None, style: str) -> str:
    """The number in a format, or `n/a`."""
    return "n/a" if value is None else format(value, style)
