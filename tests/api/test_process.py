"""`shoplm serve` as a process, under load: SIGTERM, a lost engine, what cannot start, many connections."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served_shop import ShopFolders
from server_thread import TIMEOUT_SECONDS, detail
from shoplm.errors import ConfigurationError
from shoplm.open_files import raise_limit
from shoplm.v1 import chat_pb2, recommendation_pb2, shop_pb2
from shoplm.v1.chat_pb2_grpc import ChatServiceStub
from shoplm.v1.recommendation_pb2_grpc import RecommendationServiceStub
from tiny_shop import DEMO_CUSTOMER

SERVE = [sys.executable, "-m", "shoplm.cli", "serve"]
SMALL = ["--dtype", "float32", "--threads", "1", "--kv-cache-mib", "16", "--port", "0", "--metrics-port", "0"]
SMALL += ["--lame-duck-seconds", "0"]
SOFT_LIMIT = 256  # of open files, as some systems set it
LIMITED = ["sh", "-c", f'ulimit -S -n {SOFT_LIMIT}; exec "$@"', "sh"]
RESTART_SECONDS = 90.0  # a process that imports torch on a machine that is busy with other tests
SERVING = health_pb2.HealthCheckResponse.SERVING
RECOMMEND = recommendation_pb2.RecommendRequest(customer=shop_pb2.Customer(customer_id=DEMO_CUSTOMER))
ASK = chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="user", content="hello")], max_tokens=200)


class ServeProcess:
    """A server of the tiny shop, as `make serve` runs one."""

    def __init__(self, folders: ShopFolders) -> None:
        flags = ["--base", str(folders.base), "--bundle", str(folders.bundle), "--log-format", "json", *SMALL]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*LIMITED, *SERVE, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.ready_lines = [self.process.stdout.readline() for _ in range(6)]
        found = re.search(r"gRPC (127\.0\.0\.1:\d+)", self.ready_lines[1])
        assert found, (self.ready_lines, self.process.stderr.read() if self.process.stderr else "")
        self.address = found.group(1)
        self.channel = grpc.insecure_channel(self.address)
        self.recommendation = RecommendationServiceStub(self.channel)
        self.chat = ChatServiceStub(self.channel)

    def health(self) -> int:
        status: int = health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest()).status
        return status

    def engine_pid(self) -> int:
        (engine,) = children(self.process.pid)
        return engine

    def close(self) -> tuple[int, str]:
        """(exit code, standard error)."""
        self.channel.close()
        if self.process.poll() is None:
            self.process.terminate()
        _, errors = self.process.communicate(timeout=TIMEOUT_SECONDS)
        return self.process.returncode, errors


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def served(shop_folders: ShopFolders) -> Iterator[ServeProcess]:
    process = ServeProcess(shop_folders)
    yield process
    process.close()


class Load:
    """Calls without a pause from several threads until `stop`, each result kept.

    A thread that is refused goes away, as a client that has other replicas does, unless it `returns`.
    """

    def __init__(self, served: ServeProcess, threads: int = 6, *, returns: bool = False) -> None:
        self._returns = returns
        self.codes: list[grpc.StatusCode] = []
        self.errors: list[grpc.RpcError] = []
        self.done = threading.Semaphore(0)  # released once per call
        self._stopping = threading.Event()
        calls: list[Callable[[], object]] = [
            lambda: served.recommendation.Recommend(RECOMMEND, timeout=TIMEOUT_SECONDS),
            lambda: list(served.chat.Chat(ASK, timeout=TIMEOUT_SECONDS)),
        ]
        self._threads = [threading.Thread(target=self._run, args=(calls[n % 2],)) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        while not self._stopping.is_set():
            try:
                call()
                self.codes.append(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                self.codes.append(error.code())
                self.errors.append(error)
                if not self._returns:
                    return
                self._stopping.wait(0.1)
            finally:
                self.done.release()

    def wait_for(self, calls: int) -> None:
        for _ in range(calls):
            assert self.done.acquire(timeout=TIMEOUT_SECONDS)

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(TIMEOUT_SECONDS)
            assert not thread.is_alive()


def test_sigterm_under_load_fails_nothing_that_runs(served: ServeProcess) -> None:
    assert len([line for line in served.ready_lines if line.startswith("  shoplm ")]) == 3
    load = Load(served)
    load.wait_for(20)
    streaming: Any = served.chat.Chat(ASK, timeout=TIMEOUT_SECONDS)
    next(streaming)  # it runs
    served.process.send_signal(signal.SIGTERM)
    assert list(streaming)[-1].HasField("summary")
    assert served.process.wait(TIMEOUT_SECONDS) == 0
    load.stop()
    # The server answers what it has taken. A new call finds the port closed; one that is under way while it closes is
    # broken off by gRPC, which a client with other servers tries again.
    assert grpc.StatusCode.OK in load.codes
    assert {error.code() for error in load.errors} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert not any(error.trailing_metadata() for error in load.errors)


def test_a_lost_engine_fails_its_calls_at_once_and_comes_back(served: ServeProcess) -> None:
    load = Load(served, returns=True)
    load.wait_for(12)
    streaming: Any = served.chat.Chat(ASK, timeout=TIMEOUT_SECONDS)
    next(streaming)
    os.kill(served.engine_pid(), signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(grpc.RpcError) as raised:
        list(streaming)
    assert time.monotonic() - killed < 2.0
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert detail(raised.value, error_details_pb2.RetryInfo).retry_delay.seconds == 1
    assert served.health() != SERVING
    load.stop()
    watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest(), timeout=RESTART_SECONDS)
    assert any(update.status == SERVING for update in watch)
    watch.cancel()
    assert set(load.codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert served.recommendation.Recommend(RECOMMEND).items
    assert list(served.chat.Chat(ASK))[-1].HasField("summary")
    code, errors = served.close()
    assert code == 0
    messages = [json.loads(line)["message"] for line in errors.splitlines() if line.startswith("{")]
    assert "the engine was lost; it is started again" in messages
    assert "the engine serves again" in messages


def test_a_server_whose_bundle_was_changed_before_its_engine_was_lost_ends_to_be_started_again(
    shop_folders: ShopFolders, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(shop_folders.bundle, tmp_path / "bundle"))
    served = ServeProcess(ShopFolders(shop_folders.base, bundle))
    with (bundle / "shop.toml").open("a") as manifest:
        manifest.write("# edited\n")
    os.kill(served.engine_pid(), signal.SIGKILL)
    assert served.process.wait(RESTART_SECONDS) == 75
    _, errors = served.close()
    said = [json.loads(line) for line in errors.splitlines()]  # every line, of both processes
    assert f"{bundle} is another bundle than when the server started" in next(
        line["message"] for line in said if line["message"].startswith("the engine is not started again")
    )
    assert said[-1]["message"] == "draining"


def test_connections_beyond_the_soft_limit_of_open_files_leave_the_probes_alone(served: ServeProcess) -> None:
    host, port = served.address.split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(SOFT_LIMIT + 50)]
    try:
        assert served.health() == SERVING  # the server has taken the connections before this one
        metrics = served.ready_lines[1].split()[-1]
        with urllib.request.urlopen(metrics.replace("/metrics", "/healthz"), timeout=TIMEOUT_SECONDS) as answer:
            assert answer.status == 200
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("what", ["port", "metrics port", "download", "engine"])
def test_what_may_succeed_at_another_time_ends_with_a_status_of_its_own(
    shop_folders: ShopFolders, tmp_path: Path, what: str
) -> None:
    flags = ["--base", "someone/some-model" if what == "download" else str(shop_folders.base), *SMALL]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if what.endswith("port"):
            flags += [f"--{what.replace(' ', '-')}", str(taken.getsockname()[1])]
        process = subprocess.Popen([*SERVE, *flags], stderr=subprocess.PIPE, text=True, env={**os.environ, **offline})
        if what == "engine":
            while not (started := children(process.pid)):
                assert process.poll() is None
            os.kill(started[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75, errors
    assert errors.startswith("shoplm serve: ")
    assert len(errors.splitlines()) == 1
    words = {"download": "could not be fetched", "engine": "the engine ended with code -9 while it was loading"}
    assert words.get(what, "cannot listen on 127.0.0.1:") in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bundle", "/no/such/shop", *SMALL], "/no/such/shop: no bundle there (shop.toml is missing)"),
        (["--prot", "1"], "--prot: no such flag; did you mean --port?"),
        (["--base", "/no/such/folder", "--port", "0", "--metrics-port", "0"], "/no/such/folder"),
        (["--kv-cache-mib", "0"], "--kv-cache-mib is '0'"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(flags: list[str], message: str) -> None:
    ended = subprocess.run([*SERVE, *flags], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert ended.stderr.startswith("shoplm serve: ")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_too_few_open_files_to_start_with_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 20))
    with pytest.raises(ConfigurationError, match=r"20 open files are allowed \(ulimit -n\)"):
        raise_limit()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, resource.RLIM_INFINITY))
    raise_limit()


def test_a_server_that_does_not_start_leaves_no_engine_behind() -> None:
    mark = f"SHOPLM_TEST_MARK_{os.getpid()}"
    command = [*SERVE, "--port", "99999"]
    ended = subprocess.run(command, capture_output=True, check=False, env={**os.environ, mark: "1"})
    assert ended.returncode == 2
    left = [process.pid for process in psutil.process_iter() if _has(process, mark)]
    assert not left


def _has(process: psutil.Process, variable: str) -> bool:
    try:
        return variable in process.environ()
    except psutil.Error:
        return False


def test_the_settings_can_be_printed_and_used_again(tmp_path: Path) -> None:
    shown = subprocess.run([*SERVE, "--print-config", "--max-events", "77"], capture_output=True, text=True, check=True)
    assert "max_events = 77" in shown.stdout
    (tmp_path / "shoplm.toml").write_text(shown.stdout)
    command = [*SERVE, "--config", str(tmp_path / "shoplm.toml"), "--print-config"]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == shown.stdout
