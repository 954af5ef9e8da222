"""Whom the requests are about, and the messages that are sent.

Returning customers are the bundle's demo customers as they were at varied moments: their histories share prefixes, as
those of a customer who comes back do. New customers have histories that nobody shares, drawn from the shop's items.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import polars as pl
from google.protobuf.timestamp_pb2 import Timestamp
from shoplm.bench.plan import Arrival, LoadSettings
from shoplm.request import Service
from shoplm.v1 import (
    chat_pb2,
    model_pb2,
    model_pb2_grpc,
    prediction_pb2,
    recommendation_pb2,
    recommendation_pb2_grpc,
    shop_pb2,
)

SECONDS_PER_DAY = 86_400
NEW_CUSTOMERS_AS_OF = 1_500_000_000  # Unix seconds, and up to a year later; any fixed moment will do
QUESTIONS = (
    "How do returns work?",
    "When are you open on Sundays?",
    "What does delivery cost?",
    "What could I cook tonight?",
    "Which coffee would you recommend to me?",
    "I am looking for a gift for a friend who likes baking.",
)
_TYPES = {
    "view": shop_pb2.EVENT_TYPE_VIEW,
    "cart": shop_pb2.EVENT_TYPE_CART,
    "purchase": shop_pb2.EVENT_TYPE_PURCHASE,
    "return": shop_pb2.EVENT_TYPE_RETURN,
}


@dataclass(frozen=True, slots=True)
class Shop:
    """What the load knows of the shop: histories of real customers (oldest event first) and its items.

    Without the bundle's folder the histories are empty, and a demo customer's id stands for its own.
    """

    model: model_pb2.GetModelResponse
    histories: dict[str, tuple[shop_pb2.Event, ...]]
    item_ids: tuple[str, ...]  # of real purchases, as often as they occur; or of recommendations


class WorkloadError(Exception):
    """The server or the bundle has nothing to make requests from; the message says what is missing."""


async def get_model(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> model_pb2.GetModelResponse:
    """What the server serves."""
    stub: Any = model_pb2_grpc.ModelServiceStub(channel)
    answer: model_pb2.GetModelResponse = await stub.GetModel(model_pb2.GetModelRequest(), timeout=30, metadata=metadata)
    return answer


async def read_shop(
    channel: grpc.aio.Channel,
    model: model_pb2.GetModelResponse,
    bundle: Path | None,
    metadata: tuple[tuple[str, str], ...],
) -> Shop:
    """The shop behind `model`; its demo customers' events come from the bundle's folder where it is given.

    Without the folder, the items are those that the server recommends to its demo customers. Raises WorkloadError.
    """
    if not model.demo_customer_ids:
        raise WorkloadError("the server has no demo customers: start it with a bundle that has some")
    if bundle is not None:
        histories = read_histories(bundle / "customers.parquet")
        bought = tuple(event.item_id for events in histories.values() for event in events)
        if not bought:
            raise WorkloadError(f"{bundle / 'customers.parquet'} holds no events")
        return Shop(model, histories, bought)
    stub: Any = recommendation_pb2_grpc.RecommendationServiceStub(channel)
    found: list[str] = []
    for customer_id in model.demo_customer_ids:
        request = recommendation_pb2.RecommendRequest(
            customer=shop_pb2.Customer(customer_id=customer_id), count=min(model.limits.max_count, 100) or 10
        )
        found += [item.item_id for item in (await stub.Recommend(request, timeout=60, metadata=metadata)).items]
    if not found:
        raise WorkloadError("the server recommends nothing to its demo customers")
    return Shop(model, {}, tuple(found))


def read_histories(path: Path) -> dict[str, tuple[shop_pb2.Event, ...]]:
    """customer_id -> events, oldest first, of a bundle's customers.parquet. WorkloadError when it cannot be read."""
    try:
        table = pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise WorkloadError(f"{path}: {error}") from error
    if isinstance(table.schema["time"], pl.Datetime):
        table = table.with_columns(pl.col("time").dt.epoch("s"))
    table = table.with_columns(pl.col("customer_id", "item_id", "basket_id").cast(pl.String)).sort("time")
    histories: dict[str, list[shop_pb2.Event]] = {}
    for row in table.iter_rows(named=True):
        event = shop_pb2.Event(
            item_id=row["item_id"],
            type=_TYPES[row["type"]],
            time=Timestamp(seconds=int(row["time"])),
            quantity=1.0 if row["quantity"] is None else row["quantity"],
            price=row["price"],
            basket_id=row["basket_id"] or "",
        )
        histories.setdefault(row["customer_id"], []).append(event)
    return {customer_id: tuple(events) for customer_id, events in histories.items()}


def make_customers(shop: Shop, settings: LoadSettings) -> tuple[shop_pb2.Customer, ...]:
    """`settings.customers` customers, seeded: the stated share new, the others returning."""
    generator = random.Random(settings.seed + 1)  # not the stream of the arrivals
    new = round(settings.customers * settings.new_customer_share)
    typical = [len(events) for events in shop.histories.values()] or [100]
    customers = [_new_customer(generator, number, shop.item_ids, typical) for number in range(new)]
    customers += [_returning_customer(generator, shop) for _ in range(settings.customers - new)]
    return tuple(customers)


def request_for(arrival: Arrival, customers: Sequence[shop_pb2.Customer], settings: LoadSettings) -> Any:
    """The protobuf request of an arrival."""
    customer = customers[arrival.customer]
    if arrival.service is Service.RECOMMENDATION:
        return recommendation_pb2.RecommendRequest(
            customer=customer, count=settings.count, allow_degraded=settings.allow_degraded
        )
    if arrival.service is Service.PREDICTION:
        return prediction_pb2.PredictRequest(customer=customer)
    question = QUESTIONS[arrival.customer % len(QUESTIONS)]
    return chat_pb2.ChatRequest(
        customer=customer,
        messages=[chat_pb2.Message(role="user", content=question)],
        max_tokens=settings.chat_tokens,
        temperature=0.0,
        allow_degraded=settings.allow_degraded,
    )


def _returning_customer(generator: random.Random, shop: Shop) -> shop_pb2.Customer:
    if not shop.histories:
        return shop_pb2.Customer(customer_id=generator.choice(list(shop.model.demo_customer_ids)))
    customer_id = generator.choice(sorted(shop.histories))
    events = shop.histories[customer_id]
    kept = events[: max(1, round(len(events) * generator.uniform(0.3, 1.0)))]
    # Whole baskets: a basket that is cut in two would not be a prefix of the later history.
    while len(kept) < len(events) and events[len(kept)].basket_id == kept[-1].basket_id:
        kept = events[: len(kept) + 1]
    as_of = Timestamp(seconds=kept[-1].time.seconds + generator.randrange(1, 3 * SECONDS_PER_DAY))
    return shop_pb2.Customer(customer_id=customer_id, events=kept, as_of=as_of)


def _new_customer(
    generator: random.Random, number: int, item_ids: Sequence[str], typical_lengths: Sequence[int]
) -> shop_pb2.Customer:
    """Baskets of one to eight items, days apart, as many events as some real customer has. A longer history begins
    earlier; its end does not depend on its length."""
    length = generator.choice(typical_lengths)
    events: list[shop_pb2.Event] = []
    as_of = NEW_CUSTOMERS_AS_OF + generator.randrange(365) * SECONDS_PER_DAY
    moment = basket = 0
    while len(events) < length:
        for item_id in generator.choices(item_ids, k=min(generator.randint(1, 8), length - len(events))):
            events.append(
                shop_pb2.Event(
                    item_id=item_id,
                    type=shop_pb2.EVENT_TYPE_PURCHASE,
                    time=Timestamp(seconds=moment),
                    quantity=1.0,
                    basket_id=str(basket),
                )
            )
        basket += 1
        moment += generator.randint(1, 14) * SECONDS_PER_DAY
    for event in events:
        event.time.seconds += as_of - moment
    return shop_pb2.Customer(customer_id=f"bench-{number}", events=events, as_of=Timestamp(seconds=as_of))
