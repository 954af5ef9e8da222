"""What the Python clients refuse before anything goes over the wire, and what may leave the process of a client."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from canned_server import CannedServer
from shoplm.client import (
    AsyncClient,
    Client,
    Customer,
    Event,
    InvalidArgumentError,
    ItemFilter,
    Message,
    Target,
    TargetKind,
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.rank("7", "milk"), "item_ids must be a sequence of str, not one: 'milk'"),
        (lambda client: client.rank("7", [7]), "item_ids\\[0\\] must be of type str, not int: 7"),
        (lambda client: client.recommend("7", filter=ItemFilter(include_categories="pets")), "filter.include_categor"),
        (
            lambda client: client.recommend("7", filter=ItemFilter(exclude_item_ids="12")),
            "filter.exclude_item_ids must",
        ),
        (lambda client: client.recommend("7", filter={"max_price": 1}), "filter must be a shoplm.client.ItemFilter"),
        (lambda client: client.recommend(Customer(7)), "Customer.id must be a string, not int: 7"),
        (
            lambda client: client.recommend(Customer(events=[{"item_id": "7"}])),
            "customer.events\\[0\\] must be of type",
        ),
        (lambda client: client.recommend(Customer(attributes={"age": 35})), "customer.attributes of 'age' must be a"),
        (lambda client: Event(7, datetime.now(UTC)), "Event.item_id must be a string, not int: 7"),
        (lambda client: client.predict("7", Target(TargetKind.CHURN)), "targets must be a sequence of Target, not one"),
        (lambda client: client.predict("7", ["churn"]), "targets\\[0\\] must be of type Target, not str"),
        (lambda client: client.chat(Message("user", "hi")), "messages must be a sequence of Message"),
        (lambda client: client.chat([("user", "hi")]), "messages\\[0\\] must be of type Message, not tuple"),
    ],
)
def test_what_is_of_a_wrong_type_is_named(server: CannedServer, call: Callable[[Client], object], message: str) -> None:
    with Client(server.address) as client, pytest.raises(TypeError, match=message):
        call(client)
    assert not server.record.attempts


@pytest.mark.parametrize("request_id", ["", "a b", "line\n", "ä", "i" * 129])
def test_a_request_id_that_servers_do_not_take_is_refused(server: CannedServer, request_id: str) -> None:
    with Client(server.address) as client, pytest.raises(ValueError, match="must be 1 to 128 letters"):
        client.get_model(request_id=request_id)
    assert not server.record.attempts


async def test_a_closed_client_makes_no_calls(server: CannedServer) -> None:
    blocking, fresh, used = Client(server.address), AsyncClient(server.address), AsyncClient(server.address)
    await used.get_model(request_id="first")
    blocking.close()
    await fresh.close()
    await used.close()
    for client in (blocking, fresh, used):
        with pytest.raises(ValueError, match="the client is closed"):
            client.chat("hi")
    for asynchronous in (fresh, used):
        with pytest.raises(ValueError, match="the client is closed"):
            await asynchronous.get_model()
    assert list(server.record.attempts) == ["first"]


def test_answers_and_errors_go_through_pickle(server: CannedServer) -> None:
    """As they do on the way back from a worker process."""
    with Client(server.address) as client:
        answer = client.recommend("7", explain=True)
        with pytest.raises(InvalidArgumentError) as caught:
            client.recommend("7", count=101)
    again = pickle.loads(pickle.dumps(answer))
    assert (again, again.raw) == (answer, answer.raw)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (type(error), str(error), vars(error)) == (InvalidArgumentError, str(caught.value), vars(caught.value))
