"""The services over a real engine: one customer, one cache, three services."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from server_thread import ServerThread
from shoplm.v1 import chat_pb2, prediction_pb2, recommendation_pb2, shop_pb2
from tiny_shop import DEMO_AS_OF, DEMO_CUSTOMER, ITEMS, item_id

DEMO = shop_pb2.Customer(customer_id=DEMO_CUSTOMER)
ALL = [item_id(row) for row in range(ITEMS)]


def recommend(server: ServerThread, **fields: object) -> recommendation_pb2.RecommendResponse:
    request = recommendation_pb2.RecommendRequest(**{"customer": DEMO, **fields})  # type: ignore[arg-type]
    return server.recommendation.Recommend(request)


def chat(server: ServerThread, text: str, **fields: object) -> tuple[str, chat_pb2.ChatSummary]:
    message = chat_pb2.Message(role="user", content=text)
    events = list(server.chat.Chat(chat_pb2.ChatRequest(messages=[message], **fields)))  # type: ignore[arg-type]
    return "".join(event.delta for event in events[:-1]), events[-1].summary


def customer(number: int, events: int = 120) -> shop_pb2.Customer:
    """A customer whom no other test has."""
    start = int(DEMO_AS_OF.timestamp()) - (400 + number) * 86_400
    return shop_pb2.Customer(
        customer_id=f"c{number}",
        as_of=Timestamp(seconds=int(DEMO_AS_OF.timestamp())),
        events=[
            shop_pb2.Event(
                item_id=item_id((index * 7 + number) % ITEMS), time=Timestamp(seconds=start + index * 200_000)
            )
            for index in range(events)
        ],
    )


def test_rank_and_recommend_agree(real_shop: ServerThread) -> None:
    best = recommend(real_shop, count=ITEMS, explain=True)
    ranked = real_shop.recommendation.Rank(recommendation_pb2.RankRequest(customer=DEMO, item_ids=ALL))
    assert [item.item_id for item in ranked.items] == [item.item_id for item in best.items]
    for one, other in zip(best.items, ranked.items, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert sum(reason.contribution for reason in one.reasons) == pytest.approx(one.score, abs=1e-4)
    # The model's terms are log-probabilities of all items: together they are one.
    total = sum(math.exp(item.reasons[0].contribution) for item in best.items)
    assert total == pytest.approx(1.0, abs=1e-3)


def test_a_filter_leaves_scores_as_they_are(real_shop: ServerThread) -> None:
    everything = {item.item_id: item for item in recommend(real_shop, count=ITEMS).items}
    item_filter = recommendation_pb2.ItemFilter(include_categories=["DAIRY"], exclude_purchased=True, max_price=20.0)
    some = recommend(real_shop, count=ITEMS, filter=item_filter).items
    expected = [
        item.item_id
        for item in everything.values()
        if item.category == "DAIRY"
        and item.price <= 20.0
        and item.item_id not in {item_id(r) for r in (2, *range(8, 16))}
    ]
    assert [item.item_id for item in some] == expected != []
    assert all(item.score == pytest.approx(everything[item.item_id].score, abs=1e-5) for item in some)


def test_a_price_that_an_answer_names_passes_as_a_bound(real_shop: ServerThread) -> None:
    priced = [item for item in recommend(real_shop, count=ITEMS).items if item.HasField("price")]
    assert len(priced) == ITEMS - 1
    for item in priced:
        only = recommendation_pb2.ItemFilter(min_price=item.price, max_price=item.price)
        assert [found.item_id for found in recommend(real_shop, filter=only).items] == [item.item_id]


def test_what_is_bought_again_and_again_comes_first(real_shop: ServerThread) -> None:
    best = recommend(real_shop, count=1, explain=True).items[0]
    assert best.item_id == item_id(2)
    assert best.reasons[1].text == "bought 8 times, last on 2017-12-27"


def test_nobody_gets_what_is_popular(real_shop: ServerThread) -> None:
    response = recommend(real_shop, customer=shop_pb2.Customer(), count=5)
    assert [item.item_id for item in response.items] == ALL[:5]  # the tiny shop's popularity falls with the row
    assert [warning.code for warning in response.warnings] == ["EMPTY_HISTORY"]


@pytest.mark.parametrize("first", range(3))
def test_the_services_share_the_history_in_the_cache(real_shop: ServerThread, first: int) -> None:
    person = customer(first)
    calls: list[Callable[[], shop_pb2.Usage]] = [
        lambda: recommend(real_shop, customer=person).usage,
        lambda: real_shop.prediction.Predict(prediction_pb2.PredictRequest(customer=person)).usage,
        lambda: chat(real_shop, "hello", customer=person, max_tokens=2)[1].usage,
    ]
    order = calls[first:] + calls[:first]
    cold, *warm = [call() for call in order]
    assert cold.history_tokens > 200
    assert cold.cached_tokens < 0.5 * cold.history_tokens
    for usage in warm:
        assert usage.history_tokens == cold.history_tokens
        assert usage.cached_tokens >= 0.95 * (usage.history_tokens - usage.history_tokens % 16)


def test_answers_do_not_depend_on_company(real_shop: ServerThread) -> None:
    people = [customer(10 + number, events=20 + number) for number in range(6)]
    alone = [
        (
            recommend(real_shop, customer=person),
            real_shop.prediction.Predict(prediction_pb2.PredictRequest(customer=person)),
            chat(real_shop, "hi", customer=person, max_tokens=6)[0],
        )
        for person in people
    ]
    with ThreadPoolExecutor(18) as pool:
        recommended = [pool.submit(recommend, real_shop, customer=person) for person in people]
        predicted = [
            pool.submit(real_shop.prediction.Predict, prediction_pb2.PredictRequest(customer=person))
            for person in people
        ]
        said = [pool.submit(chat, real_shop, "hi", customer=person, max_tokens=6) for person in people]
    for (items, values, text), together, same, spoken in zip(alone, recommended, predicted, said, strict=True):
        assert [item.item_id for item in together.result().items] == [item.item_id for item in items.items]
        for one, other in zip(items.items, together.result().items, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)
        for before, after in zip(values.predictions, same.result().predictions, strict=True):
            assert before.probability == pytest.approx(after.probability, abs=1e-4)
            assert before.amount == pytest.approx(after.amount, abs=1e-3)
        assert spoken.result()[0] == text


def test_an_answer_ends_at_its_length(real_shop: ServerThread) -> None:
    _, summary = chat(real_shop, "hello", max_tokens=5)
    assert summary.finish_reason in (chat_pb2.FINISH_REASON_LENGTH, chat_pb2.FINISH_REASON_STOP)
    assert 0 < summary.usage.completion_tokens <= 5


def test_a_stop_string_of_a_real_answer(real_shop: ServerThread) -> None:
    text, whole = chat(real_shop, "tell me", max_tokens=40)
    visible = [character for character in text if character != "\ufffd"]
    stop = visible[len(visible) // 2]
    cut, summary = chat(real_shop, "tell me", max_tokens=40, stop=[stop])
    assert cut == text[: text.index(stop)]
    assert summary.finish_reason == chat_pb2.FINISH_REASON_STOP
    assert summary.usage.completion_tokens <= whole.usage.completion_tokens
    assert summary.usage.cached_tokens > 0  # the same prompt has just been computed


def test_metrics_say_what_the_engine_did(real_shop: ServerThread) -> None:
    recommend(real_shop)
    chat(real_shop, "hello", max_tokens=3)
    registry = real_shop.server.metrics.registry

    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(name, labels) or 0.0

    real_shop.wait_until(lambda: value("shoplm_step_tokens_total", service="chat") > 0)
    assert value("shoplm_step_duration_seconds_count") > 0
    assert value("shoplm_step_rows_total", service="recommendation") > 0
    assert value("shoplm_prefix_query_tokens_total") > 0
    pages = [value("shoplm_kv_pages", state=state) for state in ("used", "cached", "free")]
    assert real_shop.server._engine is not None and real_shop.server._engine.ready is not None
    assert sum(pages) == real_shop.server._engine.ready.pages
    counts = itertools.pairwise(
        registry.get_sample_value("shoplm_time_to_first_token_seconds_bucket", {"service": "chat", "le": le}) or 0.0
        for le in ("0.001", "0.1", "+Inf")
    )
    assert all(low <= high for low, high in counts)
