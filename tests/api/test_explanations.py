"""What moved an answer: asked of the engine behind the answer, named from the history, dropped first under load."""

from __future__ import annotations

import math

import grpc
import msgspec
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from served_shop import Scripted, Serve
from server_thread import ServerThread
from shoplm.api.status import status_of
from shoplm.errors import EngineUnavailableError, ExpiredError, OverloadedError
from shoplm.features import feature_groups
from shoplm.request import Degradation, Explain, HeadValues, ItemScores
from shoplm.v1 import prediction_pb2, recommendation_pb2, shop_pb2
from tiny_shop import DEMO_AS_OF, DEMO_CUSTOMER, ITEMS, item_id

DEMO = shop_pb2.Customer(customer_id=DEMO_CUSTOMER)
HISTORY = {item_id(row) for row in (2, *range(8, 16))}
Influence = shop_pb2.Influence


def recommend(server: ServerThread, **fields: object) -> recommendation_pb2.RecommendResponse:
    request = recommendation_pb2.RecommendRequest(**{"customer": DEMO, "explain": True, **fields})  # type: ignore[arg-type]
    return server.recommendation.Recommend(request)


def rank(server: ServerThread, **fields: object) -> recommendation_pb2.RankResponse:
    known = {"customer": DEMO, "explain": True, "item_ids": [item_id(2), item_id(8)]}
    return server.recommendation.Rank(recommendation_pb2.RankRequest(**{**known, **fields}))  # type: ignore[arg-type]


def predict(server: ServerThread, **fields: object) -> prediction_pb2.PredictResponse:
    request = prediction_pb2.PredictRequest(**{"customer": DEMO, "explain": True, **fields})  # type: ignore[arg-type]
    return server.prediction.Predict(request)


def explanation(scripted: Scripted) -> Explain:
    """The task of the last request."""
    task = scripted.engine.requests[-1].task
    assert isinstance(task, Explain)
    return task


def test_forks_are_asked_of_the_returned_items_behind_the_same_history(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--explanation-forks", "8")
    response = recommend(scripted.server, count=3)
    answered, asked = scripted.engine.requests
    task = explanation(scripted)
    assert task.reads == ItemScores((0, 1, 2))
    assert len(task.hidden) == 1 + 8
    assert asked.history_tokens == answered.history_tokens
    assert asked.tokens[: len(answered.tokens)] == answered.tokens
    assert len(asked.tokens) == answered.history_tokens + 9 * 2
    assert task.hidden[0] == () and all(task.hidden[1:])
    assert response.usage.explanation_tokens == len(asked.tokens) - 3
    assert response.usage.prompt_tokens == len(answered.tokens)


def test_influences_name_what_is_in_the_history_strongest_first(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    for item in recommend(scripted.server, count=4).items:
        assert len(item.influences) == 5
        effects = [influence.effect for influence in item.influences]
        assert effects == sorted(effects, reverse=True)
        for influence in item.influences:
            assert influence.visits > 0 and influence.time.seconds <= DEMO_AS_OF.timestamp()
            assert influence.kind == Influence.KIND_VISIT or influence.item_id in HISTORY
    # Every visit has the item: all of its mentions are hidden together.
    (spans,) = [fork for fork in explanation(scripted).hidden if len(fork) == 8]
    assert all(end - start == 1 for start, end in spans)


def test_an_effect_is_the_models_share_and_the_exact_change_of_the_count(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--explanation-forks", "40")
    items = {item.item_id: item for item in recommend(scripted.server).items}
    own = next(each for each in items[item_id(2)].influences if each.item_id == item_id(2))
    for other in items[item_id(0)].influences:  # which was never bought
        assert other.effect == pytest.approx(other.model_effect, abs=1e-5)
    # The tiny shop's decay is 30 days, its weight 6, that of loyalty one half and that of buying again 1.5.
    count = sum(math.exp(-days / 30) for days in (56, 49, 42, 35, 28, 21, 14, 5))
    loyalty = -1 + 2 * 2 / (ITEMS - 1)
    again = 1.5 * (math.log1p(8) / 2 - 0.25)
    assert own.effect - own.model_effect == pytest.approx(6 * math.log1p(count) + 0.5 * loyalty + again, abs=1e-4)
    assert own.text == f"Item 2, in 8 visits, last on 2017-12-27, raises it by {own.effect:.2f}"


def test_a_fork_without_the_last_visit_waits_since_the_one_before(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--explanation-forks", "40")
    recommend(scripted.server)
    task, request = explanation(scripted), scripted.engine.requests[-1]
    suffixes = [request.tokens[request.history_tokens + 2 * fork :][:2] for fork in range(len(task.hidden))]
    last = [suffix for suffix, hidden in zip(suffixes, task.hidden, strict=True) if suffix != suffixes[0]]
    assert len(last) == 1 and last[0][0] > suffixes[0][0]  # a longer gap; the task's own token is the same
    assert last[0][1] == suffixes[0][1]


def test_nothing_is_asked_without_explain_or_without_a_history(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    recommend(scripted.server, explain=False)
    predict(scripted.server, explain=False)
    for answer in (recommend, predict):
        response = answer(scripted.server, customer=shop_pb2.Customer())
        assert [warning.code for warning in response.warnings] == ["EMPTY_HISTORY", "NOT_EXPLAINED"]
    assert not any(isinstance(request.task, Explain) for request in scripted.engine.requests)


def test_a_server_without_forks_says_so(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--explanation-forks", "0")
    response = recommend(scripted.server)
    assert [warning.code for warning in response.warnings] == ["NOT_EXPLAINED"]
    assert response.items[0].reasons and not response.items[0].influences
    assert [warning.code for warning in predict(scripted.server).warnings] == ["NOT_EXPLAINED"]


def test_forks_are_as_many_as_fit_into_the_context(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--explanation-forks", "256")
    ready = scripted.engine.ready
    assert ready is not None
    prompt = recommend(scripted.server, explain=False).usage.history_tokens
    room = prompt + 2 * (1 + len(feature_groups()) + 3)  # for three parts
    for context, parts in ((room, 3), (room + 1, 3), (room + 2, 4)):
        scripted.engine.ready = msgspec.structs.replace(ready, max_context_tokens=context)
        recommend(scripted.server)
        assert len(explanation(scripted).hidden) == 1 + parts
    scripted.engine.ready = msgspec.structs.replace(ready, max_context_tokens=room - 6)
    assert [warning.code for warning in recommend(scripted.server).warnings] == ["NOT_EXPLAINED"]


@pytest.mark.parametrize(
    "error",
    [OverloadedError("full", reason="QUEUE_FULL"), ExpiredError("too late"), EngineUnavailableError("it was lost")],
)
def test_an_explanation_is_dropped_first_with_the_callers_leave(serve_scripted: Serve, error: Exception) -> None:
    scripted = serve_scripted()
    scripted.engine.explaining = error
    response = recommend(scripted.server, allow_degraded=True)
    assert list(response.degradations) == [shop_pb2.DEGRADATION_NO_EXPLANATION]
    assert len(response.items) == 10 and response.items[0].reasons and not response.items[0].influences
    ranked = rank(scripted.server, allow_degraded=True)
    assert list(ranked.degradations) == [shop_pb2.DEGRADATION_NO_EXPLANATION]
    assert len(ranked.items) == 2 and ranked.items[0].reasons and not ranked.items[0].influences
    predicted = predict(scripted.server, allow_degraded=True)
    assert list(predicted.degradations) == [shop_pb2.DEGRADATION_NO_EXPLANATION]
    assert predicted.predictions and not predicted.predictions[0].influences
    registry = scripted.server.server.metrics.registry
    for service, count in (("recommendation", 2), ("prediction", 1)):
        labels = {"service": service, "degradation": "no_explanation"}
        assert registry.get_sample_value("shoplm_degraded_total", labels) == count
    for ask in (recommend, rank, predict):
        with pytest.raises(grpc.RpcError) as refused:
            ask(scripted.server)
        assert refused.value.code() is status_of(error).code


def test_an_answer_whose_explanation_fails_is_counted(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    scripted.engine.explaining = EngineUnavailableError("the engine was lost")
    registry = scripted.server.server.metrics.registry
    for ask, service in ((recommend, "recommendation"), (rank, "recommendation"), (predict, "prediction")):
        before = registry.get_sample_value("shoplm_prompt_tokens_total", {"service": service})
        with pytest.raises(grpc.RpcError, match="lost"):
            ask(scripted.server)
        answered = next(each for each in reversed(scripted.engine.requests) if not isinstance(each.task, Explain))
        after = registry.get_sample_value("shoplm_prompt_tokens_total", {"service": service})
        assert before is not None and after == before + len(answered.tokens)


def test_a_search_that_was_narrowed_is_not_explained(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    scripted.engine.degraded = (Degradation.NARROWER_BEAMS,)
    response = recommend(scripted.server, allow_degraded=True)
    assert list(response.degradations) == [
        shop_pb2.DEGRADATION_NO_EXPLANATION,
        shop_pb2.DEGRADATION_NARROWER_BEAMS,
    ]
    assert len(scripted.engine.requests) == 1


def test_an_explanation_that_may_be_dropped_leaves_time_for_the_answer(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    request = recommendation_pb2.RecommendRequest(customer=DEMO, explain=True)
    for allowed in (False, True):
        request.allow_degraded = allowed
        scripted.server.recommendation.Recommend(request, timeout=100)
    strict, lenient = (each for each in scripted.engine.requests if isinstance(each.task, Explain))
    assert strict.deadline_seconds is not None and lenient.deadline_seconds is not None
    # gRPC rounds a deadline up by as much as a hundredth.
    assert 93 < strict.deadline_seconds - strict.arrival_seconds < 102
    assert 60 < lenient.deadline_seconds - lenient.arrival_seconds < 92


def test_predictions_are_moved_by_visits_and_habits(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--explanation-forks", "6")
    response = predict(scripted.server)
    task = explanation(scripted)
    groups = feature_groups()
    assert len(task.hidden) == 1 + 6 + len(groups)
    assert isinstance(task.reads, HeadValues)
    features, *others = task.reads.features
    assert features not in others[:6]  # habits are counted again without the visit
    for members, replaced in zip(groups.values(), others[6:], strict=True):
        changed = {at for at, (one, other) in enumerate(zip(features, replaced, strict=True)) if one != other}
        assert changed <= set(members) and all(replaced[at] == 0.0 for at in members)  # the tiny shop's averages
    kinds = {influence.kind for each in response.predictions for influence in each.influences}
    assert kinds <= {Influence.KIND_VISIT, Influence.KIND_HABIT} and Influence.KIND_HABIT in kinds
    assert response.usage.explanation_tokens > 0


def test_a_real_engine_explains_what_it_answered(real_shop: ServerThread) -> None:
    best = recommend(real_shop, count=3)
    ranked = real_shop.recommendation.Rank(
        recommendation_pb2.RankRequest(customer=DEMO, item_ids=[item.item_id for item in best.items], explain=True)
    )
    found = {item.item_id: item.influences for item in ranked.items}
    for item in best.items:
        assert item.influences
        for one, other in zip(item.influences, found[item.item_id], strict=True):
            assert one.effect == pytest.approx(other.effect, abs=1e-3)
            assert one.kind == Influence.KIND_VISIT or one.item_id in HISTORY
    assert 0 < best.usage.explanation_tokens < 200
    past = shop_pb2.Customer(customer_id=DEMO_CUSTOMER, as_of=Timestamp(seconds=int(DEMO_AS_OF.timestamp())))
    assert any(each.influences for each in predict(real_shop, customer=past).predictions)
    assert len(best.items) < ITEMS
