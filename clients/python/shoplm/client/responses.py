"""From protobuf answers to the client's dataclasses."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC

from shoplm.client.types import (
    ChatSummary,
    Citation,
    Degradation,
    FinishReason,
    Influence,
    InfluenceKind,
    Limits,
    ModelInfo,
    ModelVersion,
    Prediction,
    Predictions,
    Ranking,
    Reason,
    ReasonKind,
    Recommendations,
    RecommendedItem,
    ResponseWarning,
    Target,
    TargetKind,
    Usage,
)
from shoplm.v1 import chat_pb2, model_pb2, prediction_pb2, recommendation_pb2, shop_pb2

# Enum numbers that this client does not know come from a newer server; they read as UNSPECIFIED, not as an error.
_TARGETS: dict[int, TargetKind] = {
    prediction_pb2.TargetKind.Value(f"TARGET_KIND_{kind.name}"): kind for kind in TargetKind
}
_REASONS: dict[int, ReasonKind] = {
    recommendation_pb2.Reason.Kind.Value(f"KIND_{kind.name}"): kind for kind in ReasonKind
}
_INFLUENCES: dict[int, InfluenceKind] = {
    shop_pb2.Influence.Kind.Value(f"KIND_{kind.name}"): kind for kind in InfluenceKind
}
_DEGRADATIONS: dict[int, Degradation] = {
    shop_pb2.Degradation.Value(f"DEGRADATION_{degradation.name}"): degradation for degradation in Degradation
}
_FINISHES: dict[int, FinishReason] = {
    chat_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}"): reason for reason in FinishReason
}


def recommendations(message: recommendation_pb2.RecommendResponse) -> Recommendations:
    """What `Recommend` answered."""
    return Recommendations(
        items=tuple(_item(item) for item in message.items),
        model=_version(message.model),
        usage=_usage(message.usage),
        degradations=_degradations(message.degradations),
        warnings=_warnings(message.warnings),
        raw=message,
    )


def ranking(message: recommendation_pb2.RankResponse) -> Ranking:
    """What `Rank` answered."""
    return Ranking(
        items=tuple(_item(item) for item in message.items),
        model=_version(message.model),
        usage=_usage(message.usage),
        degradations=_degradations(message.degradations),
        warnings=_warnings(message.warnings),
        raw=message,
    )


def predictions(message: prediction_pb2.PredictResponse) -> Predictions:
    """What `Predict` answered."""
    return Predictions(
        predictions=tuple(_prediction(prediction) for prediction in message.predictions),
        model=_version(message.model),
        usage=_usage(message.usage),
        degradations=_degradations(message.degradations),
        warnings=_warnings(message.warnings),
        raw=message,
    )


def chat_summary(message: chat_pb2.ChatSummary) -> ChatSummary:
    """The last message of a chat stream."""
    return ChatSummary(
        finish_reason=_FINISHES.get(message.finish_reason, FinishReason.UNSPECIFIED),
        usage=_usage(message.usage),
        citations=tuple(Citation(citation.source, citation.title, citation.text) for citation in message.citations),
        model=_version(message.model),
        degradations=_degradations(message.degradations),
        warnings=_warnings(message.warnings),
        raw=message,
    )


def model_info(message: model_pb2.GetModelResponse) -> ModelInfo:
    """What `GetModel` answered."""
    limits = message.limits
    return ModelInfo(
        model=_version(message.model),
        limits=Limits(
            max_context_tokens=limits.max_context_tokens,
            max_history_tokens=limits.max_history_tokens,
            max_events=limits.max_events,
            max_count=limits.max_count,
            max_beam_width=limits.max_beam_width,
            max_completion_tokens=limits.max_completion_tokens,
            max_message_bytes=limits.max_message_bytes,
            max_candidates=limits.max_candidates,
            max_targets=limits.max_targets,
            max_messages=limits.max_messages,
            max_text_bytes=limits.max_text_bytes,
            max_stop_strings=limits.max_stop_strings,
            max_filter_values=limits.max_filter_values,
        ),
        targets=tuple(_target(target) for target in message.targets),
        item_count=message.item_count,
        categories=tuple(message.categories),
        attributes=tuple(message.attributes),
        attribute_values={each.attribute: tuple(each.values) for each in message.attribute_values},
        demo_customer_ids=tuple(message.demo_customer_ids),
        notice=message.notice,
        server_version=message.server_version,
        raw=message,
    )


def _version(message: shop_pb2.ModelVersion) -> ModelVersion:
    return ModelVersion(message.bundle, message.version, message.base_model)


def _usage(message: shop_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        history_tokens=message.history_tokens,
        completion_tokens=message.completion_tokens,
        explanation_tokens=message.explanation_tokens,
    )


def _warnings(messages: Iterable[shop_pb2.Warning]) -> tuple[ResponseWarning, ...]:
    return tuple(ResponseWarning(message.code, message.message, message.count) for message in messages)


def _degradations(values: Iterable[int]) -> tuple[Degradation, ...]:
    return tuple(_DEGRADATIONS.get(value, Degradation.UNSPECIFIED) for value in values)


def _item(message: recommendation_pb2.RecommendedItem) -> RecommendedItem:
    return RecommendedItem(
        item_id=message.item_id,
        title=message.title,
        category=message.category,
        price=message.price if message.HasField("price") else None,
        score=message.score,
        reasons=tuple(
            Reason(_REASONS.get(reason.kind, ReasonKind.UNSPECIFIED), reason.contribution, reason.text)
            for reason in message.reasons
        ),
        influences=_influences(message.influences),
    )


def _influences(messages: Iterable[shop_pb2.Influence]) -> tuple[Influence, ...]:
    return tuple(
        Influence(
            kind=_INFLUENCES.get(message.kind, InfluenceKind.UNSPECIFIED),
            item_id=message.item_id,
            title=message.title,
            time=message.time.ToDatetime(UTC) if message.HasField("time") else None,
            visits=message.visits,
            effect=message.effect,
            model_effect=message.model_effect if message.HasField("model_effect") else None,
            text=message.text,
        )
        for message in messages
    )


def _target(message: prediction_pb2.Target) -> Target:
    return Target(
        kind=_TARGETS.get(message.kind, TargetKind.UNSPECIFIED),
        horizon_days=message.horizon_days or None,
        campaign_type=message.campaign_type,
    )


def _prediction(message: prediction_pb2.Prediction) -> Prediction:
    value = message.WhichOneof("value")
    has_interval = message.HasField("interval_low") and message.HasField("interval_high")
    return Prediction(
        target=_target(message.target),
        probability=message.probability if value == "probability" else None,
        amount=message.amount if value == "amount" else None,
        interval=(message.interval_low, message.interval_high) if has_interval else None,
        population_mean=message.population_mean,
        applicable=message.applicable,
        influences=_influences(message.influences),
    )
