"""What RecommendationService asks of the engine, and what it makes of the answer."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import msgspec
import polars as pl
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from served_shop import Scripted, Serve, ShopFolders
from shoplm.api.core import Core
from shoplm.bundle import file_hash, read_manifest, write_manifest
from shoplm.request import ItemFilter, Select, Service
from shoplm.v1 import model_pb2, shop_pb2
from shoplm.v1 import recommendation_pb2 as pb
from tiny_shop import DEMO_AS_OF, DEMO_CUSTOMER, ITEMS, item_id

DEMO = shop_pb2.Customer(customer_id=DEMO_CUSTOMER)
DAY = 86_400
PURCHASE = shop_pb2.EVENT_TYPE_PURCHASE
OTHER_KINDS = (shop_pb2.EVENT_TYPE_VIEW, shop_pb2.EVENT_TYPE_CART, shop_pb2.EVENT_TYPE_RETURN)
AS_OF = int(DEMO_AS_OF.timestamp())


def bought(row: int, days_ago: float, **fields: object) -> shop_pb2.Event:
    time = Timestamp(seconds=AS_OF - round(days_ago * DAY))
    known: dict[str, Any] = {"item_id": item_id(row), "time": time, "quantity": 1.0, "type": PURCHASE}
    return shop_pb2.Event(**{**known, **fields})


def customer(*events: shop_pb2.Event) -> shop_pb2.Customer:
    return shop_pb2.Customer(customer_id="c", events=events, as_of=Timestamp(seconds=AS_OF))


def selection(scripted: Scripted) -> Select:
    """The task of the last request."""
    task = scripted.engine.requests[-1].task
    assert isinstance(task, Select)
    return task


def test_a_demo_customer_needs_nothing_but_the_id(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    response = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=DEMO))
    assert len(response.items) == 10
    assert (response.model.bundle, response.model.version, response.model.base_model) == ("tiny-shop", "1", "base")
    assert not response.warnings
    request = scripted.engine.requests[0]
    assert request.service is Service.RECOMMENDATION
    assert response.usage.prompt_tokens == len(request.tokens)
    assert response.usage.history_tokens == request.history_tokens < len(request.tokens)
    assert response.usage.cached_tokens == 3


def test_the_repeat_term_gets_decayed_counts_of_all_purchases(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    events = [bought(4, 0), bought(4, 30), bought(6, 60), bought(7, 1, type=shop_pb2.EVENT_TYPE_VIEW)]
    scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=customer(*events)))
    task = selection(scripted)
    assert task.own_items == (4, 6)  # what was only looked at does not count
    assert task.own_counts == pytest.approx((1 + 0.36787944, 0.13533528), rel=1e-5)  # exp(-age / 30 days)
    assert task.own_terms == pytest.approx([1.5 * (math.log1p(visits) / 2 - 0.25) for visits in (2, 1)], rel=1e-5)


def test_an_event_that_is_sent_again_counts_once(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    recommend = scripted.server.recommendation.Recommend
    line = bought(4, 2, price=1.5, basket_id="a")
    plain = recommend(pb.RecommendRequest(customer=customer(line, bought(6, 60))))
    once = scripted.engine.requests[-1]
    # Unset, the quantity is 1 and the type a purchase: the same event in other words.
    other_words = shop_pb2.Event(item_id=line.item_id, time=line.time, price=1.5, basket_id="a")
    again = recommend(pb.RecommendRequest(customer=customer(line, bought(6, 60), *[line] * 9, other_words)))
    assert (selection(scripted), scripted.engine.requests[-1].tokens) == (once.task, once.tokens)
    assert [(warning.code, warning.count) for warning in again.warnings] == [("DUPLICATE_EVENT", 10)]
    assert not plain.warnings


@pytest.mark.parametrize(
    "change",
    [
        {"item_id": "rare-1"},  # for which type 0 stands, beside row 0
        {"time": Timestamp(seconds=AS_OF - 2 * DAY, nanos=1000)},
        {"type": shop_pb2.EVENT_TYPE_CART},
        {"quantity": 2.0},
        {"price": 1.75},
        {"price": 1.5 + 1e-9},  # in fp32 1.5
        {"price": 0.0},
        {"basket_id": "b"},
    ],
)
def test_events_that_differ_in_one_field_all_count(serve_scripted: Serve, change: dict[str, Any]) -> None:
    scripted = serve_scripted()
    for line in (bought(0, 2, price=1.5, basket_id="a"), bought(0, 2)):
        other = shop_pb2.Event()
        other.CopyFrom(line)
        other.MergeFrom(shop_pb2.Event(**change))
        request = pb.RecommendRequest(customer=customer(line, other))
        assert not scripted.server.recommendation.Recommend(request).warnings


def test_events_without_a_type_are_purchases_and_counted(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    untyped = {"type": shop_pb2.EVENT_TYPE_UNSPECIFIED}
    gone = shop_pb2.Event(item_id="gone", time=Timestamp(seconds=AS_OF))  # not read as anything
    for _ in range(2):  # the second time from those that came lately
        response = scripted.server.recommendation.Recommend(
            pb.RecommendRequest(customer=customer(bought(4, 0, **untyped), bought(4, 3), bought(6, 1, **untyped), gone))
        )
        assert selection(scripted).own_items == (4, 6)
        warned = {warning.code: warning.count for warning in response.warnings}
        assert warned == {"UNKNOWN_ITEM": 1, "UNTYPED_EVENT": 2}


def test_prices_keep_every_unit(serve_scripted: Serve, shop_folders: ShopFolders, tmp_path: Path) -> None:
    """fp32 has no 16,777,217."""
    bundle = Path(shutil.copytree(shop_folders.bundle, tmp_path / "bundle"))
    path, manifest = bundle / "items.parquet", read_manifest(bundle)
    dear = pl.when(pl.col("row") == 0).then(16_777_217.0).otherwise(pl.col("price"))
    pl.read_parquet(path).with_columns(price=dear).write_parquet(path)
    hashes = {**manifest.hashes, path.name: file_hash(path)}
    write_manifest(bundle, msgspec.structs.replace(manifest, hashes=hashes))
    scripted = serve_scripted("--bundle", str(bundle))
    price = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=DEMO, count=1)).items[0].price
    assert price == 16_777_217.0
    wanted = pb.ItemFilter(min_price=price, max_price=price)
    scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=DEMO, filter=wanted))
    assert selection(scripted).item_filter == ItemFilter(min_price=price, max_price=price)


def test_filters_reach_the_engine(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    item_filter = pb.ItemFilter(
        include_categories=["PRODUCE", "DAIRY", "DAIRY"],
        exclude_item_ids=[item_id(9), "rare-1", "no-such"],
        exclude_purchased=True,
        max_price=9.5,
        in_stock_only=True,
    )
    request = pb.RecommendRequest(customer=customer(bought(4, 1)), filter=item_filter, count=3)
    response = scripted.server.recommendation.Recommend(request)
    task = selection(scripted)
    assert task.item_filter == ItemFilter(("DAIRY", "PRODUCE"), (), None, 9.5, True)
    assert task.exclude_items == (4, 9)
    assert task.count == 3
    assert [(warning.code, warning.count) for warning in response.warnings] == [("UNKNOWN_ITEM", 1)]


def test_no_history_gives_popularity_and_says_so(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    for nobody in (
        None,
        shop_pb2.Customer(customer_id="new"),
        customer(shop_pb2.Event(item_id="gone", time=Timestamp())),
        customer(*(bought(4, 1, type=kind) for kind in OTHER_KINDS)),
    ):
        response = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=nobody))
        assert selection(scripted).popularity_only
        assert "EMPTY_HISTORY" in [warning.code for warning in response.warnings]
        ranked = scripted.server.recommendation.Rank(pb.RankRequest(customer=nobody, item_ids=[item_id(3)]))
        assert selection(scripted).popularity_only
        assert ranked.warnings == response.warnings
    for somebody in (DEMO, customer(shop_pb2.Event(item_id="rare-1", time=Timestamp(seconds=AS_OF - DAY)))):
        scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=somebody))
        assert not selection(scripted).popularity_only


def test_of_events_that_do_not_count_nothing_is_said(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    looked = customer(bought(4, 1, type=shop_pb2.EVENT_TYPE_VIEW))
    response = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=looked, explain=True))
    assert [warning.code for warning in response.warnings] == ["EMPTY_HISTORY", "NOT_EXPLAINED"]
    assert response.items[0].reasons[0].text == "the model has no history to read"
    assert not response.items[0].influences
    assert len(scripted.engine.requests) == 1


def test_the_reasons_of_an_item_add_up_to_its_score(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    request = pb.RecommendRequest(customer=DEMO, count=3, explain=True)
    response = scripted.server.recommendation.Recommend(request)
    for item in response.items:
        assert sum(reason.contribution for reason in item.reasons) == pytest.approx(item.score, abs=1e-5)
    texts = {item.item_id: [reason.text for reason in item.reasons] for item in response.items}
    assert texts[item_id(2)][1] == "bought 8 times, last on 2017-12-27"
    assert texts[item_id(1)][1] == "not bought before"
    plain = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=DEMO, count=3))
    assert all(not item.reasons for item in plain.items)


def test_an_item_carries_what_a_page_shows_of_it(scripted_shop: Scripted) -> None:
    response = scripted_shop.server.recommendation.Recommend(pb.RecommendRequest(customer=DEMO, count=6))
    first, unknown_price = response.items[0], response.items[5]
    assert (first.item_id, first.title, first.category, first.price) == (
        item_id(0),
        "Item 0",
        "DAIRY",
        0.94,
    )
    assert not unknown_price.HasField("price")


def test_more_items_than_the_catalogue_has_are_not_asked_for(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    response = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=DEMO, count=150))
    assert selection(scripted).count == ITEMS == len(response.items)
    assert selection(scripted).beam_width >= ITEMS


def test_rank_scores_the_known_candidates_once(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    ids = [item_id(8), "gone", item_id(2), item_id(8), "rare-1"]
    response = scripted.server.recommendation.Rank(pb.RankRequest(customer=DEMO, item_ids=ids))
    task = selection(scripted)
    assert task.candidates == (2, 8)
    assert task.count == 2
    assert [(warning.code, warning.count) for warning in response.warnings] == [("UNKNOWN_ITEM", 2)]
    assert {item.item_id for item in response.items} == {item_id(2), item_id(8)}


@pytest.mark.parametrize(("depth", "step_tokens", "most"), [(1, 512, 1000), (3, 512, 512), (3, 2048, 1000)])
def test_candidates_are_no_more_than_a_step_holds_where_codes_have_several_tokens(
    depth: int, step_tokens: int, most: int, shop_folders: ShopFolders
) -> None:
    config = shop_folders.config("--max-step-tokens", str(step_tokens))
    served = SimpleNamespace(shop=SimpleNamespace(manifest=SimpleNamespace(depth=depth)))
    core: Any = SimpleNamespace(config=config, served=served)
    assert Core.max_candidates.fget(core) == most  # type: ignore[attr-defined]


def test_rank_is_told_of_and_bounded_by_what_a_step_holds(
    serve_scripted: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Core, "max_candidates", 3)
    server = serve_scripted().server
    assert server.model.GetModel(model_pb2.GetModelRequest()).limits.max_candidates == 3
    assert server.recommendation.Rank(pb.RankRequest(customer=DEMO, item_ids=[item_id(n) for n in range(3)])).items
    with pytest.raises(grpc.RpcError, match="at most 3 are allowed"):
        server.recommendation.Rank(pb.RankRequest(customer=DEMO, item_ids=[item_id(n) for n in range(4)]))


def test_rank_of_unknown_items_alone_is_empty_and_costs_nothing(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    response = scripted.server.recommendation.Rank(pb.RankRequest(customer=DEMO, item_ids=["gone"]))
    assert not response.items
    assert response.usage.prompt_tokens == 0
    assert not scripted.engine.requests


def test_an_as_of_in_the_past_hides_what_came_later(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    past = shop_pb2.Customer(customer_id=DEMO_CUSTOMER, as_of=Timestamp(seconds=AS_OF - 30 * DAY))
    response = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=past))
    assert [(warning.code, warning.count) for warning in response.warnings] == [("FUTURE_EVENT", 8)]
    assert selection(scripted).own_items == (2, 8, 9, 10, 11)


def test_values_that_training_never_saw_are_read_and_counted(serve_scripted: Serve) -> None:
    scripted = serve_scripted()

    def warned(**attributes: str) -> list[tuple[str, int]]:
        message = customer(bought(1, 1))
        message.attributes.update(attributes)
        response = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=message))
        return [(warning.code, warning.count) for warning in response.warnings]

    assert warned(age="35-44", household="any") == []  # nothing lists the values of a household
    read = scripted.engine.requests[-1].tokens
    assert warned(age="banana", household="any") == [("UNKNOWN_ATTRIBUTE_VALUE", 1)]
    assert scripted.engine.requests[-1].tokens != read
    assert warned(age="") == []


def test_attributes_that_the_model_does_not_know_are_ignored_and_counted(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    plain = customer(bought(1, 1))
    dressed = customer(bought(1, 1))
    dressed.attributes["shoe_size"] = "43"
    dressed.attributes["hat"] = "yes"
    scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=plain))
    response = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=dressed))
    assert [(warning.code, warning.count) for warning in response.warnings] == [("UNKNOWN_ATTRIBUTE", 2)]
    first, second = scripted.engine.requests
    assert first.tokens == second.tokens
    dressed.attributes["age"] = "19-24"
    scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=dressed))
    assert scripted.engine.requests[-1].tokens != first.tokens


def test_too_many_events_keep_the_newest_in_blocks(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--max-events", "40")
    events = [bought(1 + number % 20, 100 - number) for number in range(60)]
    kept = []
    for count in range(40, 60):
        response = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=customer(*events[:count])))
        dropped = next((warning.count for warning in response.warnings if warning.code == "EVENTS_TRUNCATED"), 0)
        assert dropped % 10 == 0
        assert count - dropped <= 40
        kept.append(dropped)
    assert kept == [0] + [10] * 10 + [20] * 9
    # Within a block the prompts share their beginning: all of the shorter history is the start of the longer one.
    shorter, longer = scripted.engine.requests[1], scripted.engine.requests[10]
    assert longer.tokens[: shorter.history_tokens] == shorter.tokens[: shorter.history_tokens]


def test_events_after_as_of_take_no_room_from_those_before(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--max-events", "4")
    past = [bought(row, 10 - row) for row in range(4)]
    future = [bought(20, -5 - number) for number in range(4)]
    scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=customer(*future, *past)))
    assert selection(scripted).own_items == (0, 1, 2, 3)


def test_a_history_over_the_prompt_budget_says_so_and_still_counts_all(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    events = [bought(row % ITEMS, 200 - row / 2) for row in range(400)]
    response = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=customer(*events)))
    assert [warning.code for warning in response.warnings] == ["HISTORY_TRUNCATED"]
    assert len(selection(scripted).own_items) == ITEMS
    assert response.usage.history_tokens < 400


def test_a_basket_over_the_prompt_budget_says_so(
    shop_folders: ShopFolders, serve_scripted: Serve, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(shop_folders.bundle, tmp_path / "bundle"))
    manifest = read_manifest(bundle, verify=False)
    prompt = msgspec.structs.replace(manifest.prompt, history_budget_tokens=16)
    write_manifest(bundle, msgspec.structs.replace(manifest, prompt=prompt))
    scripted = serve_scripted("--bundle", str(bundle))
    for size, warned in ((15, []), (16, [("HISTORY_TRUNCATED", 1)])):  # behind the mark of a basket
        large = customer(*(bought(row, 1, basket_id="large") for row in range(size)))
        response = scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=large))
        assert [(warning.code, warning.count) for warning in response.warnings] == warned


def test_a_history_does_not_depend_on_the_order_in_which_it_is_sent(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    events = [bought(row, row % 5) for row in range(12)]
    for order in (events, events[::-1]):
        scripted.server.recommendation.Recommend(pb.RecommendRequest(customer=customer(*order)))
    first, second = scripted.engine.requests
    assert first.tokens == second.tokens
    assert first.task == second.task


def test_a_reason_names_the_own_items_that_an_item_goes_with(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    scripted.engine.goes_with = {5: 1.5, 6: 2.5}  # in the tiny shop, an item goes with the one before it, twice as much
    request = pb.RecommendRequest(customer=customer(bought(4, 0), bought(3, 1)), count=8, explain=True)
    items = {item.item_id: item for item in scripted.server.recommendation.Recommend(request).items}
    five, six, seven = (items[item_id(row)] for row in (5, 6, 7))
    assert five.reasons[-1].kind == six.reasons[-1].kind == pb.Reason.KIND_GOES_WITH
    assert five.reasons[-1].text == "goes with Item 4 and Item 3, bought before"
    assert six.reasons[-1].text == "goes with Item 4, bought before"
    assert sum(reason.contribution for reason in six.reasons) == pytest.approx(six.score)
    assert [reason.kind for reason in seven.reasons][-1] == pb.Reason.KIND_POPULARITY
    scripted.engine.goes_with = {6: -2.5}
    (six,) = (item for item in scripted.server.recommendation.Recommend(request).items if item.item_id == item_id(6))
    assert six.reasons[-1].text == "new to the customer, goes best with Item 4"
