"""Everything that the page shows of one customer: answers as a server gives them, and attention computed beside it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc.aio
import numpy as np
from numpy.typing import NDArray
from shoplm.api.customers import CustomerReader
from shoplm.api.validation import Violations
from shoplm.api.warnings import Warnings
from shoplm.config import ServerConfig
from shoplm.engine.load import load_tensors
from shoplm.errors import ConfigurationError
from shoplm.history import EventKind, History, utc_day
from shoplm.model.config import ModelConfig
from shoplm.prompt import Prefix, Visit
from shoplm.served import Served, Shop
from shoplm.server import EngineFactory, Server, engine_process
from shoplm.v1 import prediction_pb2, recommendation_pb2, shop_pb2
from shoplm.v1.prediction_pb2_grpc import PredictionServiceStub
from shoplm.v1.recommendation_pb2_grpc import RecommendationServiceStub

BEFORE = "before the history"  # the preamble and the profile
TASK = "the task itself"


@dataclass(frozen=True)
class Basket:
    """One visit of the history."""

    day: str
    items: tuple[tuple[str, str], ...]  # id and title; without a token of its own, an item has no id
    is_read: bool  # it is in the prompt


@dataclass(frozen=True)
class Attention:
    """Where the last token of the recommendation's prompt looks."""

    places: tuple[str, ...]  # what comes before the history, each visit that is read, and the task
    mass: NDArray[np.float32]  # [layers, heads, places]


@dataclass(frozen=True)
class Explained:
    """One customer."""

    customer_id: str
    as_of: str
    recommended: recommendation_pb2.RecommendResponse
    predicted: prediction_pb2.PredictResponse
    baskets: tuple[Basket, ...]  # oldest first
    attention: Attention


async def explain(
    config: ServerConfig, customer: shop_pb2.Customer, count: int, make_engine: EngineFactory = engine_process
) -> Explained:
    """Asks a server of its own, which ends with the call. Raises ConfigurationError where it cannot start, or where
    there is no such customer."""
    server = Server(config, make_engine)
    try:
        await server.start()
        served = server.served
        if served is None or served.shop is None:
            raise ConfigurationError("explanations need a bundle: give --bundle")
        history = _history(served.shop, customer, config)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            recommended = await RecommendationServiceStub(channel).Recommend(
                recommendation_pb2.RecommendRequest(customer=customer, count=count, explain=True)
            )
            predicted = prediction_pb2.PredictResponse()
            if served.shop.targets:
                predicted = await PredictionServiceStub(channel).Predict(
                    prediction_pb2.PredictRequest(customer=customer, explain=True)
                )
    finally:
        await server.close()
    prefix = served.prompts.prefix(history)
    visits = served.prompts.visits(history, prefix)
    return Explained(
        customer_id=customer.customer_id,
        as_of=utc_day(history.as_of),
        recommended=recommended,
        predicted=predicted,
        baskets=_baskets(history, visits, served.shop),
        attention=await asyncio.to_thread(_attention, config, served, history, prefix, visits),
    )


def _history(shop: Shop, customer: shop_pb2.Customer, config: ServerConfig) -> History:
    violations = Violations()
    history = CustomerReader(shop, config.max_events).read(customer, violations, Warnings())
    violations.raise_if_any()
    if not shop.knows(history):
        known = ", ".join(shop.demo) or "none"
        raise ConfigurationError(
            f"customer {customer.customer_id!r} has no history that counts here; demo customers: {known}"
        )
    return history


def _baskets(history: History, visits: tuple[Visit, ...], shop: Shop) -> tuple[Basket, ...]:
    read = {visit.basket for visit in visits}
    catalog = shop.catalog
    found = []
    for number in np.unique(history.basket).tolist():
        items = []
        for event in np.flatnonzero(history.basket == number).tolist():
            row = int(history.item[event])
            known = bool(history.has_item[event])
            title = catalog.event_title(row, known)
            kind = EventKind(int(history.kind[event]))
            what = title if kind is EventKind.PURCHASE else f"{title} ({kind.name.lower()})"
            items.append((catalog.item_ids[row] if known else "", what))
        when = float(history.time[history.basket == number][0])
        found.append(Basket(utc_day(when), tuple(dict.fromkeys(items)), number in read))
    return tuple(found)


def _attention(
    config: ServerConfig, served: Served, history: History, prefix: Prefix, visits: tuple[Visit, ...]
) -> Attention:
    from shoplm.model.attention_mass import attention_mass

    spec = config.engine_spec(served.base.folder)
    model = ModelConfig.from_folder(served.base.folder)
    weights, shop = load_tensors(spec, model)
    tokens = served.prompts.recommend(prefix, history)
    spans = [(0, visits[0].start), *((visit.start, visit.end) for visit in visits), (visits[-1].end, len(tokens))]
    days = [utc_day(float(history.time[history.basket == visit.basket][0])) for visit in visits]
    return Attention((BEFORE, *days, TASK), attention_mass(model, weights, shop, tokens, spans))
