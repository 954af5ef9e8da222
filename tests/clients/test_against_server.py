"""The clients against a whole server of a tiny shop, its engine in a process of its own, over loopback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_client import needs_node, run_node_tests
from shoplm.client import Client, FinishReason, InvalidArgumentError
from shoplm.config_sources import load_config
from shoplm.server import engine_process

# Test modules are imported one by one (importlib mode); the tiny shop lies beside the tests of the services.
sys.path.insert(0, str(Path(__file__).parents[1] / "api"))

from server_thread import ServerThread
from tiny_shop import write_base, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, beside its base model."""
    root = tmp_path_factory.mktemp("tiny-shop")
    write_bundle(root / "bundle", write_base(root / "base"))
    return root / "bundle"


@pytest.fixture(scope="module")
def shop(bundle: Path) -> Iterator[ServerThread]:
    """The server."""
    flags = ["--base", str(bundle.parent / "base"), "--bundle", str(bundle), "--port", "0", "--metrics-port", "0"]
    small = ["--dtype", "float32", "--threads", "1", "--kv-cache-mib", "16"]
    with ServerThread(load_config([*flags, *small], environment={}), engine_process) as server:
        yield server


@needs_node
def test_node_client(shop: ServerThread) -> None:
    done = run_node_tests({"SHOPLM_ADDRESS": shop.address, "SHOPLM_CANNED_ADDRESS": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout


def test_python_client(shop: ServerThread) -> None:
    with Client(shop.address) as client:
        model = client.get_model()
        customer = model.demo_customer_ids[0]
        answer = client.recommend(customer, count=3, explain=True)
        assert len(answer.items) == 3
        for item in answer.items:
            assert sum(reason.contribution for reason in item.reasons) == pytest.approx(item.score, abs=1e-4)
        ranking = client.rank(customer, [item.item_id for item in reversed(answer.items)])
        assert [item.item_id for item in ranking.items] == [item.item_id for item in answer.items]
        assert len(client.predict(customer).predictions) == len(model.targets)
        with client.chat("Hello", customer=customer, max_tokens=3) as chat:
            chat.text()
            assert chat.summary.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        with pytest.raises(InvalidArgumentError) as caught:
            client.recommend(customer, count=model.limits.max_count + 1)
    assert [violation.field for violation in caught.value.violations] == ["count"]
    assert caught.value.reason == "INVALID_REQUEST"
