"""PredictionService and ModelService."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import grpc
import msgspec
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import load_file, save_file
from served_shop import Scripted, Serve, ShopFolders
from shoplm.api.methods import PREDICTION
from shoplm.bundle import read_manifest, write_manifest
from shoplm.features import FEATURE_NAMES
from shoplm.request import Predict, Select, Service
from shoplm.v1 import model_pb2, recommendation_pb2, shop_pb2
from shoplm.v1 import prediction_pb2 as pb
from tiny_shop import DEMO_AS_OF, DEMO_CUSTOMER, ITEMS, item_id

DEMO = shop_pb2.Customer(customer_id=DEMO_CUSTOMER)
# Settings that a caller's lists, counts and texts may be over.
REFUSED = (
    "max_message_bytes",
    "max_text_bytes",
    "max_messages",
    "max_count",
    "max_candidates",
    "max_filter_values",
    "max_beam_width",
    "max_completion_tokens",
    "max_stop_strings",
    "max_targets",
)


def names(response: pb.PredictResponse) -> list[tuple[str, int]]:
    return [(pb.TargetKind.Name(each.target.kind), each.target.horizon_days) for each in response.predictions]


def test_no_target_means_every_target_of_the_bundle(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    response = scripted.server.prediction.Predict(pb.PredictRequest(customer=DEMO))
    assert names(response) == [
        ("TARGET_KIND_PURCHASE", 7),
        ("TARGET_KIND_PURCHASE", 30),
        ("TARGET_KIND_CHURN", 30),
        ("TARGET_KIND_PURCHASE_COUNT", 30),
        ("TARGET_KIND_COUPON_REDEMPTION", 0),
    ]
    assert [each.population_mean for each in response.predictions] == [0.7, 0.9, 0.1, 2.5, 0.05]
    for each in response.predictions:
        if each.target.kind == pb.TARGET_KIND_PURCHASE_COUNT:
            assert each.WhichOneof("value") == "amount"
            assert each.interval_low <= each.amount <= each.interval_high
        else:
            assert each.WhichOneof("value") == "probability"
            assert 0.0 < each.probability < 1.0
            assert not each.HasField("interval_low")
    request = scripted.engine.requests[0]
    assert request.service is Service.PREDICTION
    assert isinstance(request.task, Predict)
    assert len(request.task.features) == len(FEATURE_NAMES)


def test_targets_are_answered_in_the_order_asked_for(scripted_shop: Scripted) -> None:
    targets = [
        pb.Target(kind=pb.TARGET_KIND_COUPON_REDEMPTION, campaign_type="Type A"),
        pb.Target(kind=pb.TARGET_KIND_PURCHASE),
        pb.Target(kind=pb.TARGET_KIND_PURCHASE, horizon_days=7),
    ]
    response = scripted_shop.server.prediction.Predict(pb.PredictRequest(customer=DEMO, targets=targets))
    assert names(response) == [
        ("TARGET_KIND_COUPON_REDEMPTION", 0),
        ("TARGET_KIND_PURCHASE", 30),
        ("TARGET_KIND_PURCHASE", 7),
    ]


@pytest.mark.parametrize(("days_later", "applicable"), [(0, True), (50, True), (56, False)])
def test_churn_applies_to_those_who_bought_lately(scripted_shop: Scripted, days_later: int, applicable: bool) -> None:
    moment = Timestamp(seconds=int(DEMO_AS_OF.timestamp()) + days_later * 86_400)  # the last visit is 5 days before
    customer = shop_pb2.Customer(customer_id=DEMO_CUSTOMER, as_of=moment)
    request = pb.PredictRequest(customer=customer, targets=[pb.Target(kind=pb.TARGET_KIND_CHURN)])
    (prediction,) = scripted_shop.server.prediction.Predict(request).predictions
    assert prediction.applicable is applicable


def event(row: int, kind: shop_pb2.EventType.ValueType) -> shop_pb2.Event:
    return shop_pb2.Event(item_id=item_id(row), type=kind, time=Timestamp(seconds=int(DEMO_AS_OF.timestamp()) - 60))


@pytest.mark.parametrize(
    "kinds", [(), (shop_pb2.EVENT_TYPE_VIEW, shop_pb2.EVENT_TYPE_CART, shop_pb2.EVENT_TYPE_RETURN)]
)
@pytest.mark.parametrize("explain", [False, True])
def test_without_events_that_count_the_answer_is_the_population_mean(
    serve_scripted: Serve, kinds: tuple[shop_pb2.EventType.ValueType, ...], explain: bool
) -> None:
    scripted = serve_scripted()
    new = shop_pb2.Customer(customer_id="new", events=[event(3, kind) for kind in kinds])
    response = scripted.server.prediction.Predict(pb.PredictRequest(customer=new, explain=explain))
    assert [warning.code for warning in response.warnings] == ["EMPTY_HISTORY", *(["NOT_EXPLAINED"] if explain else [])]
    for each in response.predictions:
        assert getattr(each, each.WhichOneof("value") or "") == each.population_mean
        assert not each.HasField("interval_low") and not each.HasField("interval_high")
        assert each.applicable == (each.target.kind != pb.TARGET_KIND_CHURN)
    assert not scripted.engine.requests and response.HasField("usage") and not response.usage.prompt_tokens


def trained_on_views(bundle: Path) -> None:
    """As of a shop whose customers look at what they buy later."""
    weights = load_file(bundle / "weights.safetensors")
    weights["head.input_mean"][FEATURE_NAMES.index("log_views_30d")] = 0.5
    save_file(weights, bundle / "weights.safetensors")


def recommends_views(bundle: Path) -> None:
    """As of a shop without purchases."""
    write_manifest(bundle, msgspec.structs.replace(read_manifest(bundle, verify=False), recommends="view"))


@pytest.mark.parametrize("change", [trained_on_views, recommends_views])
def test_views_count_where_the_bundle_was_trained_on_them(
    change: Callable[[Path], None], shop_folders: ShopFolders, serve_scripted: Serve, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(shop_folders.bundle, tmp_path / "bundle"))
    change(bundle)
    scripted = serve_scripted("--bundle", str(bundle), "--no-verify-bundle")
    for kind, counts in ((shop_pb2.EVENT_TYPE_VIEW, True), (shop_pb2.EVENT_TYPE_CART, False)):
        customer = shop_pb2.Customer(customer_id="c", events=[event(3, kind)])
        predicted = scripted.server.prediction.Predict(pb.PredictRequest(customer=customer))
        assert [warning.code for warning in predicted.warnings] == ([] if counts else ["EMPTY_HISTORY"])
        recommended = scripted.server.recommendation.Recommend(recommendation_pb2.RecommendRequest(customer=customer))
        assert [warning.code for warning in recommended.warnings] == ([] if counts else ["EMPTY_HISTORY"])
        task = scripted.engine.requests[-1].task
        assert isinstance(task, Select) and task.popularity_only is not counts


def test_the_model_describes_itself_so_that_a_caller_needs_nothing_else(scripted_shop: Scripted) -> None:
    model = scripted_shop.server.model.GetModel(model_pb2.GetModelRequest())
    assert model.item_count == ITEMS
    assert list(model.categories) == ["BAKERY", "DAIRY", "PRODUCE"]
    assert list(model.attributes) == ["age", "household"]
    assert [(each.attribute, list(each.values)) for each in model.attribute_values] == [("age", ["19-24", "35-44"])]
    assert list(model.demo_customer_ids) == [DEMO_CUSTOMER]
    assert model.notice == "Made for tests."
    assert model.limits.max_history_tokens == 256
    config = scripted_shop.server.server.config
    told = {field.name: getattr(model.limits, field.name) for field in model.limits.DESCRIPTOR.fields}
    del told["max_context_tokens"], told["max_history_tokens"]  # the engine's and the bundle's
    assert told == {name: getattr(config, name) for name in told}
    assert not set(REFUSED) - set(told)
    # Each target that it lists can be asked for as it is.
    request = pb.PredictRequest(customer=DEMO, targets=model.targets)
    assert [each.target for each in scripted_shop.server.prediction.Predict(request).predictions] == list(model.targets)


def test_a_bundle_without_targets_predicts_nothing(
    shop_folders: ShopFolders, serve_scripted: Serve, tmp_path: Path
) -> None:
    """The engine, which has no heads, is not asked."""
    bundle = Path(shutil.copytree(shop_folders.bundle, tmp_path / "bundle"))
    write_manifest(bundle, msgspec.structs.replace(read_manifest(bundle, verify=False), targets=()))
    scripted = serve_scripted("--bundle", str(bundle))
    with pytest.raises(grpc.RpcError, match="this bundle predicts nothing") as error:
        scripted.server.prediction.Predict(pb.PredictRequest(customer=DEMO))
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert not scripted.engine.requests
    request = health_pb2.HealthCheckRequest(service=PREDICTION.full_name)
    status = health_pb2_grpc.HealthStub(scripted.server.channel).Check(request).status
    assert status == health_pb2.HealthCheckResponse.NOT_SERVING
