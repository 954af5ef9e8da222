"""The blocking client over loopback: answers, error mapping, retries, deadlines and cancellation."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta, timezone

import grpc
import pytest
from canned_server import ANSWER, RETRY_SECONDS, TOKEN, CannedServer
from shoplm import client as shoplm_client
from shoplm.client import (
    Client,
    Customer,
    DeadlineExceededError,
    Degradation,
    Event,
    EventType,
    FieldViolation,
    FinishReason,
    Influence,
    InfluenceKind,
    InvalidArgumentError,
    ItemFilter,
    Message,
    OverloadedError,
    PermissionDeniedError,
    ReasonKind,
    ServerError,
    Target,
    TargetKind,
    Timeouts,
    UnauthenticatedError,
    UnavailableError,
)
from shoplm.client.channel import Connection, service_config
from shoplm.v1 import prediction_pb2, shop_pb2


def test_recommend_returns_dataclasses(server: CannedServer) -> None:
    with Client(server.address) as client:
        answer = client.recommend("7", count=2, explain=True, allow_degraded=True)
    assert [item.item_id for item in answer.items] == ["milk", "bread"]
    assert answer.items[0].price == 1.25
    assert answer.items[1].price is None
    first = answer.items[0]
    assert [reason.kind for reason in first.reasons] == [ReasonKind.MODEL, ReasonKind.REPEAT]
    assert sum(reason.contribution for reason in first.reasons) == pytest.approx(first.score)
    assert (answer.model.bundle, answer.usage.cached_tokens) == ("canned", 96)
    assert answer.warnings[0].code == "EMPTY_HISTORY"
    assert answer.raw.items[0].title == "Milk"


def test_influences_come_with_items_and_predictions(server: CannedServer) -> None:
    expected = (
        Influence(
            *(InfluenceKind.ITEM, "milk", "Milk", datetime(2023, 11, 14, 22, 13, 20, 500_000, UTC), 3, 0.75, 0.25),
            "Milk, in 3 visits",
        ),
        Influence(InfluenceKind.HABIT, "", "how much is spent", None, 0, -0.5, None, "spends little"),
    )
    with Client(server.address) as client:
        assert client.recommend("7", explain=True).items[1].influences == expected
        assert client.rank("7", ["milk"], explain=True).items[0].influences == expected
        predicted = client.predict("7", explain=True, allow_degraded=True)
        assert not client.predict("7").predictions[0].influences
    assert predicted.predictions[0].influences == expected
    assert predicted.degradations == (Degradation.NO_EXPLANATION,)


def test_events_and_filter_reach_the_wire(server: CannedServer) -> None:
    moment = datetime(2026, 1, 31, 18, 5, tzinfo=timezone(timedelta(hours=2)))
    customer = Customer(
        "new",
        events=[Event("milk", moment, quantity=2, price=16_777_217.0), Event("rice", moment, EventType.VIEW)],
        attributes={"age": "35-44"},
        as_of=moment,
    )
    with Client(server.address) as client:
        client.recommend(customer, filter=ItemFilter(exclude_categories=["pets"], max_price=3.49, in_stock_only=True))
    sent = server.record.last_request
    assert sent.count == 0
    assert [event.type for event in sent.customer.events] == [shop_pb2.EVENT_TYPE_PURCHASE, shop_pb2.EVENT_TYPE_VIEW]
    assert sent.customer.events[0].time.ToDatetime(UTC) == moment
    assert sent.customer.events[0].price == 16_777_217.0  # which fp32 does not have
    assert not sent.customer.events[1].HasField("price")
    assert sent.customer.as_of.ToDatetime(UTC) == moment
    assert sent.customer.attributes["age"] == "35-44"
    assert list(sent.filter.exclude_categories) == ["pets"]
    assert not sent.filter.HasField("min_price")
    assert sent.filter.max_price == 3.49
    assert sent.filter.in_stock_only


def test_rank_predict_and_model(server: CannedServer) -> None:
    with Client(server.address) as client:
        ranking = client.rank("7", ["rice", "milk", "no such item"])
        smaller = client.rank("7", ["milk"], explain=True, allow_degraded=True)
        spend, churn = client.predict("7", [Target(TargetKind.SPEND, 30), Target(TargetKind.CHURN)]).predictions
        model = client.get_model()
    assert [item.item_id for item in ranking.items] == ["milk", "rice"]
    assert ranking.warnings[0].count == 1
    assert (ranking.degradations, smaller.degradations) == ((), (Degradation.NO_EXPLANATION,))
    assert (spend.population_mean, churn.population_mean) == (30.0, 0.5)
    assert (spend.amount, spend.interval, spend.probability) == (42.5, (10.0, 90.0), None)
    assert (churn.probability, churn.amount, churn.interval, churn.applicable) == (0.75, None, None, False)
    assert churn.target == Target(TargetKind.CHURN)
    assert model.demo_customer_ids == ("demo-1", "demo-2")
    assert model.targets[0] == Target(TargetKind.PURCHASE, 7)
    assert (model.limits.max_count, model.limits.max_candidates) == (100, 500)
    assert model.limits.max_targets == 0  # not told


def test_chat_streams_text_then_summary(server: CannedServer) -> None:
    with Client(server.address) as client, client.chat("How do returns work?", customer="7", grounding=False) as chat:
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = chat.summary
        assert list(chat) == list(ANSWER)
        assert chat.summary.finish_reason is FinishReason.STOP
        assert chat.summary.citations[0].source == "returns.md"
        assert chat.summary.usage.completion_tokens == len(ANSWER)
    sent = server.record.last_request
    assert [(message.role, message.content) for message in sent.messages] == [("user", "How do returns work?")]
    assert not sent.HasField("temperature")


def test_leaving_a_chat_cancels_it_on_the_server(server: CannedServer) -> None:
    with Client(server.address) as client:
        with client.chat("hang") as chat:
            assert next(chat) == ANSWER[0]
        assert server.record.cancelled.wait(10)


def test_invalid_argument_names_the_field(server: CannedServer) -> None:
    with Client(server.address) as client:
        with pytest.raises(InvalidArgumentError) as caught:
            client.recommend("7", count=101, request_id="abc")
        with pytest.raises(InvalidArgumentError, match="role"):
            client.chat([Message("robot", "hi")]).text()
    assert caught.value.violations == (FieldViolation("count", "101 is over the limit of 100"),)
    assert caught.value.reason == "INVALID_REQUEST"
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.request_id == "abc"


def test_overload_says_when_to_try_again(server: CannedServer) -> None:
    with Client(server.address) as client, pytest.raises(OverloadedError) as caught:
        client.recommend("refused", request_id="full")
    assert caught.value.retry_seconds == pytest.approx(RETRY_SECONDS)
    assert caught.value.reason == "QUEUE_FULL"
    assert server.record.attempts["full"] == 1  # a pushback of -1 means: do not retry


def test_unavailable_is_retried_with_the_same_request_id(server: CannedServer) -> None:
    with Client(server.address) as client:
        assert client.recommend("flaky-3", request_id="again").items
        assert server.record.attempts["again"] == 4
        with pytest.raises(UnavailableError):
            client.predict("flaky-4", request_id="too-often")
        assert server.record.attempts["too-often"] == 4
        assert client.chat("hi", customer="flaky-1", request_id="chat").text() == "".join(ANSWER)
        assert server.record.attempts["chat"] == 2


def test_a_call_that_a_closing_port_breaks_off_is_tried_again(server: CannedServer) -> None:
    with Client(server.address) as client:
        assert client.recommend("broken-off", request_id="again").items
    assert server.record.attempts["again"] == 2


def test_retries_can_be_switched_off(server: CannedServer) -> None:
    with Client(server.address, retries=False) as client, pytest.raises(UnavailableError):
        client.recommend("flaky-1", request_id="once")
    assert server.record.attempts["once"] == 1


def test_server_faults_are_not_retried(server: CannedServer) -> None:
    with Client(server.address) as client, pytest.raises(ServerError, match="a step failed"):
        client.recommend("broken", request_id="fault")
    assert server.record.attempts["fault"] == 1


def test_deadline_is_sent_and_enforced(server: CannedServer) -> None:
    with Client(server.address, timeout=Timeouts(prediction_seconds=33.0)) as client:
        client.wait_until_ready()  # else a busy machine's deadline passes before there is a connection
        with pytest.raises(DeadlineExceededError):
            client.recommend("slow", timeout=0.5)
        assert server.record.cancelled.wait(10)
        client.predict("7", request_id="given")
        client.predict("7", request_id="own", timeout=5.0)
    given, own = (server.record.remaining_seconds[name] for name in ("given", "own"))
    assert given is not None and 32 < given < 34
    assert own is not None and 4 < own < 6  # the wire rounds


def test_token_is_sent_as_bearer() -> None:
    with CannedServer(token=TOKEN) as server:
        with Client(server.address, token=TOKEN) as client:
            assert client.get_model().item_count == 5
        with Client(server.address) as client, pytest.raises(UnauthenticatedError):
            client.get_model()


def test_a_right_that_the_token_does_not_have_is_told_from_a_wrong_token(server: CannedServer) -> None:
    with Client(server.address) as client, pytest.raises(PermissionDeniedError, match="not for this token") as denied:
        client.recommend("denied")
    assert not isinstance(denied.value, UnauthenticatedError)


def test_the_priority_of_a_call_is_sent(server: CannedServer) -> None:
    with Client(server.address) as client:
        client.recommend("7", priority=-100, request_id="recommend")
        client.rank("7", ["milk"], priority=0, request_id="rank")
        client.predict("7", priority=7, request_id="predict")
        client.chat("hi", priority=100, request_id="chat").text()
        client.recommend("7", request_id="none")
        for wrong in (101, -101, 1.5, "7"):
            with pytest.raises(ValueError, match=f"priority={wrong!r} must be a whole number from -100 to 100"):
                client.recommend("7", priority=wrong, request_id="wrong")  # type: ignore[arg-type]
    sent = {name: metadata.get("x-priority") for name, metadata in server.record.metadata.items()}
    assert sent == {"recommend": "-100", "rank": "0", "predict": "7", "chat": "100", "none": None}


def test_no_server_is_unavailable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with Client(address, retries=False) as client:
            with pytest.raises(UnavailableError):
                client.get_model()
            with pytest.raises(UnavailableError, match=address):
                client.wait_until_ready(timeout=0.2)


def test_round_robin_reaches_every_address() -> None:
    with CannedServer() as one, CannedServer() as other:
        addresses = ",".join(server.address for server in (one, other))
        with Client(f"ipv4:{addresses}", round_robin=True) as client:
            for _ in range(40):  # the second connection may come up a little later
                client.get_model()
                if one.record.attempts and other.record.attempts:
                    break
        assert one.record.attempts and other.record.attempts


def test_round_robin_leaves_out_a_server_that_does_not_serve() -> None:
    with CannedServer() as one, CannedServer() as other:
        one.set_serving(False)
        with Client(f"ipv4:{one.address},{other.address}", round_robin=True, retries=False) as client:
            for _ in range(20):
                client.get_model()
        assert not one.record.attempts


@pytest.mark.parametrize("round_robin", [False, True])
def test_health_checks_need_no_health_service(*, round_robin: bool) -> None:
    with (
        CannedServer(health=False) as server,
        Client(server.address, round_robin=round_robin, retries=False) as client,
    ):
        assert client.get_model().item_count == 5


@pytest.mark.parametrize("options", [{"round_robin": False}, {"round_robin": True, "health_checks": False}])
def test_without_health_checks_a_server_that_does_not_serve_is_called(options: dict[str, bool]) -> None:
    with CannedServer() as server:
        server.set_serving(False)
        with Client(server.address, retries=False, **options) as client:  # type: ignore[arg-type]
            assert client.get_model().item_count == 5


def test_no_proxy_is_asked_for_the_own_machine(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    port = server.address.split(":")[1]
    for address in (server.address, f"ipv4:{server.address}", f"localhost:{port}", f"dns:///localhost:{port}"):
        with Client(address, retries=False) as client:
            assert client.get_model().item_count == 5
    away = ("shop.example:50051", "dns:///shop.example", "127.0.0.1.example:1", "ipv4:127.0.0.1:1,10.0.0.1:1")
    for address in away:
        assert "grpc.enable_http_proxy" not in dict(Connection(address).options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Event("milk", datetime(2026, 1, 31)), "no time zone"),
        (lambda: Customer("7", as_of=datetime(2026, 1, 31)), "Customer.as_of"),
        (lambda: Event("milk", datetime.now(UTC), type="stolen"), "stolen"),  # type: ignore[arg-type]
        (lambda: Target("luck"), "luck"),  # type: ignore[arg-type]
        (lambda: Timeouts(chat_seconds=0), "chat_seconds=0"),
        (lambda: Timeouts.of(float("nan")), "timeout=nan"),
        (lambda: Connection(address=""), "address is empty"),
        (lambda: Connection(address="http://127.0.0.1:50051"), "must be host:port without http://"),
        (lambda: Connection(token="a\nb"), "token must be"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_once(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()


def test_a_connection_that_is_printed_shows_no_secret() -> None:
    shown = repr(Connection(token="hunter2", private_key=b"hunter3", certificate_chain=b"public"))
    assert "hunter" not in shown and "public" in shown


def test_zero_is_refused_rather_than_sent_as_the_default(server: CannedServer) -> None:
    with Client(server.address) as client:
        with pytest.raises(ValueError, match="count=0"):
            client.recommend("7", count=0)
        with pytest.raises(ValueError, match="count=99999999999 must be at most 4294967295"):
            client.recommend("7", count=99_999_999_999)
        with pytest.raises(TypeError, match="customer must be"):
            client.recommend(7)  # type: ignore[arg-type]
    assert not server.record.attempts


def test_every_kind_of_the_contract_has_a_name() -> None:
    assert {f"TARGET_KIND_{kind.name}" for kind in TargetKind} == set(prediction_pb2.TargetKind.keys())
    named = {f"EVENT_TYPE_{kind.name}" for kind in EventType} | {"EVENT_TYPE_UNSPECIFIED"}
    assert named == set(shop_pb2.EventType.keys())


def test_service_config_follows_the_options() -> None:
    full = json.loads(service_config(retries=True, round_robin=True, health_checks=True))
    assert full["loadBalancingConfig"] == [{"round_robin": {}}]
    assert full["methodConfig"][0]["retryPolicy"]["retryableStatusCodes"] == [
        *("UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED")
    ]
    assert full["healthCheckConfig"] == {"serviceName": ""}
    assert "healthCheckConfig" not in service_config(retries=True, round_robin=True, health_checks=False)
    assert json.loads(service_config(retries=False, round_robin=False, health_checks=True)) == {}


def test_public_names_are_exactly_the_listed_ones() -> None:
    listed = shoplm_client.__all__
    public = {
        name
        for name, value in vars(shoplm_client).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("shoplm.client.")
    }
    assert set(listed) == public
    assert len(listed) == len(set(listed))
    assert all(getattr(shoplm_client, name).__doc__ for name in listed)
