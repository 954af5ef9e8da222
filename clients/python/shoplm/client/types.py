"""What goes in and comes out of the clients: plain frozen dataclasses.

Every answer keeps the protobuf message that it was read from as `raw`, for fields newer than this client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from shoplm.v1 import chat_pb2, model_pb2, prediction_pb2, recommendation_pb2


class EventType(StrEnum):
    """What a customer did with an item."""

    VIEW = "view"
    CART = "cart"
    PURCHASE = "purchase"
    RETURN = "return"


class TargetKind(StrEnum):
    """What can be predicted."""

    UNSPECIFIED = "unspecified"  # only in answers of a server newer than this client
    PURCHASE = "purchase"
    PURCHASE_COUNT = "purchase_count"
    SPEND = "spend"
    CHURN = "churn"
    COUPON_REDEMPTION = "coupon_redemption"


class ReasonKind(StrEnum):
    """Which term of an item's score a reason stands for."""

    UNSPECIFIED = "unspecified"  # only in answers of a server newer than this client
    MODEL = "model"
    REPEAT = "repeat"
    POPULARITY = "popularity"
    GOES_WITH = "goes_with"


class InfluenceKind(StrEnum):
    """What an influence is: something of the history that the model read, or a number about all of it."""

    UNSPECIFIED = "unspecified"  # only in answers of a server newer than this client
    ITEM = "item"
    VISIT = "visit"
    HABIT = "habit"


class Degradation(StrEnum):
    """What the server took from an answer, with the caller's leave, so that it came in time."""

    UNSPECIFIED = "unspecified"  # only in answers of a server newer than this client
    NO_EXPLANATION = "no_explanation"
    NARROWER_BEAMS = "narrower_beams"
    FEWER_TOKENS = "fewer_tokens"


class FinishReason(StrEnum):
    """Why a chat answer ended."""

    UNSPECIFIED = "unspecified"  # only in answers of a server newer than this client
    STOP = "stop"
    LENGTH = "length"


def _check_moment(name: str, value: datetime) -> None:
    if not isinstance(value, datetime):
        raise TypeError(f"{name} must be a datetime, not {type(value).__name__}: {value!r}")
    if value.utcoffset() is None:
        raise ValueError(
            f"{name}={value.isoformat()} has no time zone, so the moment is unknown; "
            "pass an aware datetime, for example datetime(2026, 1, 31, 18, 5, tzinfo=UTC)"
        )


def check_string(name: str, value: str) -> None:
    """Raise TypeError unless it is one: protobuf would not say of which field."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}: {value!r}")


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a customer's history. `time` must carry a time zone; `quantity` is above 0; `price` is of one unit,
    None if unknown. A `type` of None is not known: the server reads it as a purchase, with the warning
    UNTYPED_EVENT."""

    item_id: str
    time: datetime
    type: EventType | None = EventType.PURCHASE
    quantity: float = 1.0
    price: float | None = None
    basket_id: str = ""

    def __post_init__(self) -> None:
        check_string("Event.item_id", self.item_id)
        _check_moment("Event.time", self.time)
        if self.type is not None:
            object.__setattr__(self, "type", EventType(self.type))


@dataclass(frozen=True, slots=True)
class Customer:
    """Whom a request is about. With no events, a demo customer's id stands for the history in the bundle.

    `as_of` is the moment the answer is for; None means now, or the bundle's own moment for a demo customer.
    """

    id: str = ""
    events: Sequence[Event] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    as_of: datetime | None = None

    def __post_init__(self) -> None:
        check_string("Customer.id", self.id)
        if self.as_of is not None:
            _check_moment("Customer.as_of", self.as_of)


@dataclass(frozen=True, slots=True)
class ItemFilter:
    """Which items may be recommended; all conditions must hold. Prices are inclusive, in the shop's currency."""

    include_categories: Sequence[str] = ()
    exclude_categories: Sequence[str] = ()
    exclude_item_ids: Sequence[str] = ()
    exclude_purchased: bool = False
    min_price: float | None = None
    max_price: float | None = None
    in_stock_only: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to predict. `horizon_days` None means the server's 30; coupons have a `campaign_type` instead."""

    kind: TargetKind
    horizon_days: int | None = None
    campaign_type: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", TargetKind(self.kind))


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """Which bundle and base model gave an answer."""

    bundle: str
    version: str
    base_model: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request cost; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    history_tokens: int
    completion_tokens: int
    explanation_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ResponseWarning:
    """Something the server ignored or changed in a request, and how often. `code` is stable, such as UNKNOWN_ITEM."""

    code: str
    message: str
    count: int


@dataclass(frozen=True, slots=True)
class Reason:
    """A term of an item's score, in nats; the terms add up to the score. `text` is a sentence for a person."""

    kind: ReasonKind
    contribution: float
    text: str


@dataclass(frozen=True, slots=True)
class Influence:
    """A part of what is known of the customer, and the answer with it less the answer without it: `effect`, of an
    item's score, the log-odds of a probability, the logarithm of an amount.

    `model_effect` is the model's share of the effect on an item's score. `time` is that of the visit, or of the newest
    event that the part stands for, and None for a habit.
    """

    kind: InfluenceKind
    item_id: str
    title: str
    time: datetime | None
    visits: int
    effect: float
    model_effect: float | None
    text: str


@dataclass(frozen=True, slots=True)
class RecommendedItem:
    """An item with its score in nats; `reasons` and `influences` only where they were asked for."""

    item_id: str
    title: str
    category: str
    price: float | None
    score: float
    reasons: tuple[Reason, ...]
    influences: tuple[Influence, ...] = ()  # on the score, the strongest first


@dataclass(frozen=True, slots=True)
class Recommendations:
    """The recommended items, best first. `degradations`: what the server took from the answer to give it in time."""

    items: tuple[RecommendedItem, ...]
    model: ModelVersion
    usage: Usage
    degradations: tuple[Degradation, ...]
    warnings: tuple[ResponseWarning, ...]
    raw: recommendation_pb2.RecommendResponse = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The given items with their scores, best first; unknown ids are left out and counted in the warnings.

    `degradations`: what the server took from the answer to give it in time.
    """

    items: tuple[RecommendedItem, ...]
    model: ModelVersion
    usage: Usage
    degradations: tuple[Degradation, ...]
    warnings: tuple[ResponseWarning, ...]
    raw: recommendation_pb2.RankResponse = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one target: `probability` in [0, 1], or `amount` with its 90 % `interval`; the other is None.

    `population_mean` is the same quantity over all customers of the training data; it is the answer for a customer
    without a history, and has no interval. `applicable` is False for a customer outside the target's population.
    """

    target: Target
    probability: float | None
    amount: float | None
    interval: tuple[float, float] | None
    population_mean: float
    applicable: bool
    influences: tuple[Influence, ...] = ()  # only where they were asked for, the strongest first


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions, in the order asked for. `degradations`: what the server took from them to answer in time."""

    predictions: tuple[Prediction, ...]
    model: ModelVersion
    usage: Usage
    degradations: tuple[Degradation, ...]
    warnings: tuple[ResponseWarning, ...]
    raw: prediction_pb2.PredictResponse = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that the model was given. `source` names a text of the shop, or is `items.parquet` for an item that the
    question named, or `customer` for what the customer often buys."""

    source: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class ChatSummary:
    """The end of a chat answer. `degradations`: what the server took from it, with `allow_degraded`, to end in time."""

    finish_reason: FinishReason
    usage: Usage
    citations: tuple[Citation, ...]
    model: ModelVersion
    degradations: tuple[Degradation, ...]
    warnings: tuple[ResponseWarning, ...]
    raw: chat_pb2.ChatSummary = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Limits:
    """The server's limits. A request over one is refused with InvalidArgumentError, but for histories and chat answers,
    which are cut. From a server that does not tell one it is 0."""

    max_context_tokens: int
    max_history_tokens: int
    max_events: int
    max_count: int
    max_beam_width: int
    max_completion_tokens: int
    max_message_bytes: int
    max_candidates: int = 0
    max_targets: int = 0
    max_messages: int = 0
    max_text_bytes: int = 0
    max_stop_strings: int = 0
    max_filter_values: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a server serves. `attribute_values` has the attributes of few values only."""

    model: ModelVersion
    limits: Limits
    targets: tuple[Target, ...]
    item_count: int
    categories: tuple[str, ...]
    attributes: tuple[str, ...]
    attribute_values: Mapping[str, tuple[str, ...]]
    demo_customer_ids: tuple[str, ...]
    notice: str
    server_version: str
    raw: model_pb2.GetModelResponse = field(repr=False, compare=False)
