"""From the client's dataclasses to protobuf requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp
from shoplm.client.types import Customer, Event, ItemFilter, Message, Target, TargetKind, check_string
from shoplm.v1 import chat_pb2, prediction_pb2, recommendation_pb2, shop_pb2

_MOST_UNSIGNED = 2**32 - 1  # of a uint32 on the wire


Item = TypeVar("Item")


def timestamp(moment: datetime) -> Timestamp:
    """The protobuf form of an aware datetime."""
    message = Timestamp()
    message.FromDatetime(moment.astimezone(UTC))
    return message


def event_message(event: Event) -> shop_pb2.Event:
    """The protobuf form of an event."""
    return shop_pb2.Event(
        item_id=event.item_id,
        type=shop_pb2.EventType.Value(
            "EVENT_TYPE_UNSPECIFIED" if event.type is None else f"EVENT_TYPE_{event.type.name}"
        ),
        time=timestamp(event.time),
        quantity=event.quantity,
        price=event.price,
        basket_id=event.basket_id,
    )


def customer_message(customer: str | Customer) -> shop_pb2.Customer:
    """The protobuf form of a customer; a string is an id."""
    if isinstance(customer, str):
        return shop_pb2.Customer(customer_id=customer)
    if not isinstance(customer, Customer):
        raise TypeError(f"customer must be an id or a shoplm.client.Customer, not {type(customer).__name__}")
    for name, value in customer.attributes.items():
        check_string(f"customer.attributes of {name!r}", value)
    return shop_pb2.Customer(
        customer_id=customer.id,
        events=[event_message(event) for event in _all("customer.events", customer.events, Event)],
        attributes=dict(customer.attributes),
        as_of=None if customer.as_of is None else timestamp(customer.as_of),
    )


def recommend_request(
    customer: str | Customer,
    count: int | None,
    item_filter: ItemFilter | None,
    beam_width: int | None,
    explain: bool,
    allow_degraded: bool,
) -> recommendation_pb2.RecommendRequest:
    """A RecommendRequest; None leaves the server's default."""
    return recommendation_pb2.RecommendRequest(
        customer=customer_message(customer),
        count=_unsigned("count", count),
        filter=None if item_filter is None else _filter_message(item_filter),
        beam_width=_unsigned("beam_width", beam_width),
        explain=explain,
        allow_degraded=allow_degraded,
    )


def rank_request(
    customer: str | Customer, item_ids: Sequence[str], explain: bool, allow_degraded: bool
) -> recommendation_pb2.RankRequest:
    """A RankRequest."""
    return recommendation_pb2.RankRequest(
        customer=customer_message(customer),
        item_ids=_all("item_ids", item_ids, str),
        explain=explain,
        allow_degraded=allow_degraded,
    )


def predict_request(
    customer: str | Customer, targets: Sequence[Target], explain: bool, allow_degraded: bool
) -> prediction_pb2.PredictRequest:
    """A PredictRequest; no targets means every target of the bundle."""
    return prediction_pb2.PredictRequest(
        customer=customer_message(customer),
        targets=[_target_message(target) for target in _all("targets", targets, Target)],
        explain=explain,
        allow_degraded=allow_degraded,
    )


def chat_request(
    messages: str | Sequence[Message],
    customer: str | Customer | None,
    max_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: Sequence[str],
    grounding: bool | None,
    allow_degraded: bool,
) -> chat_pb2.ChatRequest:
    """A ChatRequest; a string is one user message, None leaves the server's default."""
    if isinstance(messages, str):
        messages = [Message("user", messages)]
    if isinstance(stop, str):
        stop = [stop]
    switch = chat_pb2.GROUNDING_UNSPECIFIED
    if grounding is not None:
        switch = chat_pb2.GROUNDING_ON if grounding else chat_pb2.GROUNDING_OFF
    return chat_pb2.ChatRequest(
        customer=None if customer is None else customer_message(customer),
        messages=[
            chat_pb2.Message(role=message.role, content=message.content)
            for message in _all("messages", messages, Message)
        ],
        max_tokens=_unsigned("max_tokens", max_tokens),
        temperature=temperature,
        top_k=_unsigned("top_k", top_k),
        top_p=top_p,
        seed=seed,
        stop=stop,
        grounding=switch,
        allow_degraded=allow_degraded,
    )


def _unsigned(name: str, value: int | None) -> int:
    """0 on the wire means "unset", so an explicit 0 or a negative number must not be sent as if it were a default."""
    if value is None:
        return 0
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1; leave it out for the server's default")
    if value > _MOST_UNSIGNED:
        raise ValueError(f"{name}={value} must be at most {_MOST_UNSIGNED}")
    return value


def _all(name: str, values: Sequence[Item], kind: type[Item]) -> Sequence[Item]:
    """The values of a field that has several; TypeError for others, and for a string, which has characters."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of {kind.__name__}, not one: {values!r}")
    values = list(values)
    for index, value in enumerate(values):
        if not isinstance(value, kind):
            raise TypeError(f"{name}[{index}] must be of type {kind.__name__}, not {type(value).__name__}: {value!r}")
    return values


def _filter_message(item_filter: ItemFilter) -> recommendation_pb2.ItemFilter:
    if not isinstance(item_filter, ItemFilter):
        raise TypeError(f"filter must be a shoplm.client.ItemFilter, not {type(item_filter).__name__}")
    return recommendation_pb2.ItemFilter(
        include_categories=_all("filter.include_categories", item_filter.include_categories, str),
        exclude_categories=_all("filter.exclude_categories", item_filter.exclude_categories, str),
        exclude_item_ids=_all("filter.exclude_item_ids", item_filter.exclude_item_ids, str),
        exclude_purchased=item_filter.exclude_purchased,
        min_price=item_filter.min_price,
        max_price=item_filter.max_price,
        in_stock_only=item_filter.in_stock_only,
    )


def _target_message(target: Target) -> prediction_pb2.Target:
    if target.kind is TargetKind.UNSPECIFIED:
        raise ValueError("Target.kind must be one of the kinds that get_model().targets lists, not 'unspecified'")
    return prediction_pb2.Target(
        kind=prediction_pb2.TargetKind.Value(f"TARGET_KIND_{target.kind.name}"),
        horizon_days=_unsigned("Target.horizon_days", target.horizon_days),
        campaign_type=target.campaign_type,
    )
