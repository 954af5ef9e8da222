"""The command-line verbs against a server: readable and JSON output, errors in one line, exit codes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from canned_server import ANSWER, TOKEN, CannedServer
from shoplm.client.cli import parse_target, register
from shoplm.client.types import Target, TargetKind
from shoplm.v1 import shop_pb2
from typer.testing import CliRunner, Result

application = typer.Typer()
register(application)


def run(server: CannedServer | None, *arguments: str, text: str | None = None) -> Result:
    environment = {"COLUMNS": "160"} if server is None else {"COLUMNS": "160", "SHOPLM_ADDRESS": server.address}
    return CliRunner().invoke(application, list(arguments), input=text, env=environment)


@pytest.fixture
def closed_address() -> Iterator[str]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{unused.getsockname()[1]}"


def test_recommend_shows_items_with_reasons(server: CannedServer) -> None:
    result = run(server, "recommend", "--customer", "7", "--count", "2", "--explain")
    assert result.exit_code == 0, result.stderr
    for shown in ("milk", "Milk", "1.25", "-1.00", "Goes with what was bought last.", "+0.50", "EMPTY_HISTORY"):
        assert shown in result.stdout
    assert "coffee" not in result.stdout


def test_reasons_keep_their_lines_in_a_narrow_terminal(server: CannedServer) -> None:
    environment = {"COLUMNS": "80", "SHOPLM_ADDRESS": server.address}
    for verb, shown in (("recommend", "-1.50  Goes with what was bought last."), ("predict", "-0.50  spends little")):
        result = CliRunner().invoke(application, [verb, "--customer", "7", "--explain"], env=environment)
        assert shown in result.stdout


def test_rank_shows_the_named_items(server: CannedServer) -> None:
    result = run(server, "rank", "coffee", "milk", "--customer", "7", "--explain")
    assert result.exit_code == 0, result.stderr
    assert list(server.record.last_request.item_ids) == ["coffee", "milk"] and server.record.last_request.explain
    assert "Coffee" in result.stdout and "Milk" in result.stdout
    as_json = run(server, "rank", "coffee", "--json")
    assert "demo-1" in as_json.stderr and json.loads(as_json.stdout)["items"][0]["item_id"] == "coffee"
    assert run(server, "rank", "--customer", "7").exit_code == 2  # no items


def test_filters_reach_the_wire(server: CannedServer) -> None:
    result = run(server, "recommend", "--customer", "7", "--min-price", "1.5", "--max-price", "3", "--in-stock")
    assert result.exit_code == 0, result.stderr
    sent = server.record.last_request.filter
    assert (sent.min_price, sent.max_price, sent.in_stock_only) == (1.5, 3.0, True)


def test_demo_customer_is_the_default_and_said_on_stderr(server: CannedServer) -> None:
    result = run(server, "recommend", "--json")
    assert server.record.last_request.customer.customer_id == "demo-1"
    assert "demo-1" in result.stderr and "demo-2" in result.stderr
    answer = json.loads(result.stdout)
    assert answer["items"][0]["item_id"] == "milk"
    assert answer["usage"]["cached_tokens"] == 96


def test_history_file_is_sent(server: CannedServer, tmp_path: Path) -> None:
    path = tmp_path / "customer.json"
    event = {"item_id": "milk", "time": "2026-01-31T18:05:00Z", "type": "EVENT_TYPE_VIEW", "price": 1.5}
    path.write_text(json.dumps({"customer_id": "filed", "events": [event], "attributes": {"age": "35-44"}}))
    assert run(server, "predict", "--history", str(path)).exit_code == 0
    sent = server.record.last_request.customer
    assert (sent.customer_id, sent.events[0].item_id, sent.events[0].price) == ("filed", "milk", 1.5)
    assert sent.events[0].quantity == 1.0

    path.write_text(json.dumps({"events": [{**event, "quantity": 0}]}))
    run(server, "predict", "--history", str(path))
    sent = server.record.last_request.customer
    assert (sent.events[0].HasField("quantity"), sent.events[0].quantity) == (True, 0.0)  # the server's to refuse

    del event["type"]
    path.write_text(json.dumps({"events": [event]}))
    run(server, "predict", "--history", str(path))
    assert server.record.last_request.customer.events[0].type == shop_pb2.EVENT_TYPE_UNSPECIFIED  # the server warns

    path.write_text(json.dumps({"events": [{"item_id": "milk"}]}))
    result = run(server, "predict", "--history", str(path))
    assert result.exit_code == 2
    assert "events[0].time is missing" in result.stderr

    path.write_text(json.dumps({"events": [{**event, "type": 9}]}))
    result = run(server, "predict", "--history", str(path))
    assert result.exit_code == 2
    assert "events[0].type is 9, which is no event type" in result.stderr

    path.write_text("[]")
    result = run(server, "predict", "--history", str(path))
    assert result.exit_code == 2
    assert "is not the JSON of a shoplm.v1.Customer" in result.stderr


def test_predict_shows_probabilities_and_amounts(server: CannedServer) -> None:
    result = run(server, "predict", "--customer", "7")
    for shown in ("buys within 7 days", "75.0%", "42.50", "10.00 to 90.00", "does not apply"):
        assert shown in result.stdout
    result = run(server, "predict", "--customer", "7", "--explain", "--allow-degraded")
    assert "spends little" in result.stdout and "no explanation" in result.stdout
    result = run(server, "predict", "--customer", "7", "--target", "spend:30", "--json")
    assert [prediction["amount"] for prediction in json.loads(result.stdout)["predictions"]] == [42.5]


def test_chat_prints_the_answer_alone_on_stdout(server: CannedServer) -> None:
    result = run(server, "chat", "How do returns work?", "--no-grounding")
    assert result.stdout == "".join(ANSWER) + "\n"
    assert "returns.md" in result.stderr
    piped = run(server, "chat", "--system", "Be brief.", text="How do returns work?\n")
    assert piped.stdout == result.stdout
    assert [message.role for message in server.record.last_request.messages] == ["system", "user"]
    assert run(server, "chat", text="").exit_code == 2


def test_chat_json_is_one_object_a_line(server: CannedServer) -> None:
    lines = [json.loads(line) for line in run(server, "chat", "hi", "--json").stdout.splitlines()]
    assert "".join(line["delta"] for line in lines[:-1]) == "".join(ANSWER)
    assert lines[-1]["summary"]["finish_reason"] == "FINISH_REASON_STOP"


def test_model_shows_what_is_served(server: CannedServer) -> None:
    result = run(server, "model")
    for shown in ("canned 1", "demo-1, demo-2", "spends within 30 days", "Canned answers.", "age (19-24, 25-34); town"):
        assert shown in result.stdout
    assert json.loads(run(server, "model", "--json").stdout)["item_count"] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["recommend", "--customer", "7", "--count", "101"], 2, "count: 101 is over the limit"),
        (["recommend", "--customer", "denied"], 6, "the token does not allow this"),
        (["recommend", "--customer", "refused"], 4, "try again in 0.25 s"),
        (["recommend", "--customer", "slow", "--timeout", "0.2"], 5, "--timeout"),
        (["recommend", "--customer", "broken"], 1, "its log has request"),
        (["recommend", "--customer", "7", "--timeout", "-1"], 2, "timeout=-1"),
        (["model", "--tenant", "not blue"], 2, "tenant='not blue'"),
        (["model", "--key-file", __file__], 2, "--cert-file and --key-file come together"),
        (["predict", "--target", "luck"], 2, "'luck' is not one of purchase"),
    ],
)
def test_errors_are_told_with_an_exit_code(server: CannedServer, arguments: list[str], code: int, says: str) -> None:
    result = run(server, *arguments)
    assert result.exit_code == code
    assert says in result.stderr
    assert result.stdout == ""
    if arguments[-1] != "luck":  # a wrong option is answered by the parser, with its usage
        assert len(result.stderr.splitlines()) == 1


def test_no_server_says_how_to_start_one(closed_address: str) -> None:
    result = run(None, "model", "--address", closed_address)
    assert result.exit_code == 3
    assert "shoplm serve" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_token_comes_from_the_option() -> None:
    with CannedServer(token=TOKEN) as server:
        assert run(server, "model", "--token", TOKEN).exit_code == 0
        result = run(server, "model")
    assert result.exit_code == 6
    assert "SHOPLM_TOKEN" in result.stderr


def test_the_tenant_is_sent_and_a_smaller_answer_says_so(server: CannedServer) -> None:
    result = run(server, "recommend", "--customer", "7", "--tenant", "blue", "--allow-degraded")
    assert "narrower beams" in result.stdout
    (metadata,) = server.record.metadata.values()
    assert metadata["x-tenant-id"] == "blue"
    spoken = run(server, "chat", "hi", "--allow-degraded")
    assert "fewer tokens" in spoken.stderr


@pytest.mark.parametrize("verb", [["recommend"], ["rank", "milk"], ["predict"], ["chat", "hi"]])
def test_the_priority_is_sent(server: CannedServer, verb: list[str]) -> None:
    result = run(server, *verb, "--customer", "7", "--priority", "-3")
    assert result.exit_code == 0, result.stderr
    (metadata,) = server.record.metadata.values()
    assert metadata["x-priority"] == "-3"
    refused = run(server, *verb, "--customer", "7", "--priority", "101")
    assert refused.exit_code == 2 and "101" in refused.stderr


def test_targets_are_parsed() -> None:
    assert parse_target("purchase:7") == Target(TargetKind.PURCHASE, 7)
    assert parse_target("churn") == Target(TargetKind.CHURN)
    assert parse_target("coupon_redemption:TypeA") == Target(TargetKind.COUPON_REDEMPTION, campaign_type="TypeA")
    with pytest.raises(typer.BadParameter, match="'soon' is not a number of days"):
        parse_target("purchase:soon")


def test_the_client_and_its_verbs_import_nothing_heavy() -> None:
    program = "import sys, shoplm.client.cli; print([m for m in ('torch', 'numpy', 'polars') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"
