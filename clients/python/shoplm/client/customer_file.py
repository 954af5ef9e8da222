"""A customer with a history, from a JSON file."""

from __future__ import annotations

import json
from datetime import UTC
from pathlib import Path

from google.protobuf.json_format import ParseDict, ParseError
from shoplm.client.types import Customer, Event, EventType
from shoplm.v1 import shop_pb2

_TYPES: dict[int, EventType | None] = {shop_pb2.EventType.Value(f"EVENT_TYPE_{kind.name}"): kind for kind in EventType}
_TYPES[shop_pb2.EVENT_TYPE_UNSPECIFIED] = None


def read_customer(path: Path, customer_id: str | None = None) -> Customer:
    """The customer in `path`, which holds the JSON form of `shoplm.v1.Customer`; `customer_id` replaces the file's.

    ValueError names the file and what is wrong: it is not there, not JSON, or not a customer.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ParseError("it holds no object")
        message = ParseDict(content, shop_pb2.Customer())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ParseError) as error:
        raise ValueError(f"{path} is not the JSON of a shoplm.v1.Customer: {error}") from error
    for index, event in enumerate(message.events):
        if not event.HasField("time"):
            raise ValueError(f"{path}: events[{index}].time is missing; write it as 2026-01-31T18:05:00Z")
        if event.type not in _TYPES:
            raise ValueError(f"{path}: events[{index}].type is {event.type}, which is no event type")
    return Customer(
        id=customer_id or message.customer_id,
        events=[
            Event(
                item_id=event.item_id,
                time=event.time.ToDatetime(UTC),
                type=_TYPES[event.type],
                quantity=event.quantity if event.HasField("quantity") else 1.0,
                price=event.price if event.HasField("price") else None,
                basket_id=event.basket_id,
            )
            for event in message.events
        ],
        attributes=dict(message.attributes),
        as_of=message.as_of.ToDatetime(UTC) if message.HasField("as_of") else None,
    )
