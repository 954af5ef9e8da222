"""The examples of other languages, by the commands of docs/clients.md, where Debian's packages for them are there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from canned_server import ANSWER, RETRY_SECONDS, TOKEN, CannedServer
from google.rpc import status_pb2
from shoplm.client.channel import service_config

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
GO_CODE = Path("/usr/share/gocode")
JARS = Path("/usr/share/java")
JAR_NAMES = (
    *("grpc-api", "grpc-context", "grpc-core", "grpc-netty", "grpc-protobuf", "grpc-protobuf-lite", "grpc-stub"),
    *("gson", "guava", "opencensus-api", "perfmark-api", "protobuf", "geronimo-annotation-1.3-spec"),
    *(f"netty-{part}" for part in ("buffer", "codec", "codec-http", "codec-http2", "codec-socks", "common")),
    *(f"netty-{part}" for part in ("handler", "handler-proxy", "resolver", "transport")),
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The contract and the examples as they lie in the repository, and a folder for programs."""
    shutil.copytree(ROOT / "protos" / "shoplm", tmp_path / "protos" / "shoplm")
    shutil.copytree(ROOT / "clients" / "examples", tmp_path / "clients" / "examples")
    (tmp_path / "bin").mkdir()
    return tmp_path


def require(*programs: str, files: tuple[Path, ...] = ()) -> None:
    """Skip the test where something is missing."""
    missing = [name for name in programs if shutil.which(name) is None]
    missing += [str(path) for path in files if not path.exists()]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def commands(language: str) -> str:
    """The shell block below the heading of a language."""
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    found = re.search(rf"^### {language}\n.*?^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found, f"docs/clients.md has no commands for {language}"
    return found[1]


def run(command: str, copy: Path, environment: Mapping[str, str]) -> str:
    """What a command says, which must succeed."""
    environment = {**os.environ, "PATH": f"{copy / 'bin'}:{os.environ['PATH']}", **environment}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def check(language: str, copy: Path, environment: Mapping[str, str]) -> None:
    """Build and run an example; then as a customer whom the server refuses, and one whose calls take more attempts."""
    build_and_run = commands(language)
    with CannedServer(token=TOKEN) as server:
        environment = {**environment, "SHOPLM_ADDRESS": server.address, "SHOPLM_TOKEN": TOKEN}
        said = run(build_and_run, copy, environment)
        assert "cancelled: true" in said and server.record.cancelled.wait(10), said
        again = f"cd clients/examples/{language.lower()}; {build_and_run.splitlines()[-1]}"
        refused = run(f"{again} refused || true", copy, environment)
        server.record.attempts.clear()
        retried = run(f"{again} flaky-3", copy, environment)  # without ids, GetModel is one of the three
        assert "item: milk" in retried, retried
    lines = said.splitlines()
    for expected in (
        "item: milk Milk -1.0",
        "prediction: TARGET_KIND_PURCHASE within 7 days 0.75",
        f"chat: {''.join(ANSWER)}",
        "ended: FINISH_REASON_STOP",
        "reason: INVALID_REQUEST",
        "wrong: count 1000000 is over the limit of 100",
    ):
        assert any(line.startswith(expected) for line in lines), f"{expected!r} is not in:\n{said}"
    assert "reason: QUEUE_FULL" in refused
    told = re.search(r"try again in: ([\d.]+) ?(m?s)", refused)
    assert told and float(told[1]) * {"s": 1, "ms": 1e-3}[told[2]] == RETRY_SECONDS


def test_go(copy: Path) -> None:
    require("go", "protoc", "protoc-gen-go", files=(GO_CODE / "src/google.golang.org/grpc",))
    # Debian has no modules, but a GOPATH, and the source of this plugin.
    environment = {"GO111MODULE": "off", "GOPATH": f"{copy / 'go'}:{GO_CODE}", "GRPC_GO_RETRY": "on"}  # before 1.40
    run("go build -o bin/ google.golang.org/grpc/cmd/protoc-gen-go-grpc", copy, environment)
    (copy / "go" / "src").mkdir(parents=True)
    (copy / "go" / "src" / "shoplm-example").symlink_to(copy / "clients" / "examples" / "go")
    check("Go", copy, environment)


def test_ruby(copy: Path) -> None:
    require("ruby", "grpc_tools_ruby_protoc")
    check("Ruby", copy, {})


def test_java(copy: Path) -> None:
    jars = [JARS / f"{name}.jar" for name in JAR_NAMES]
    require("javac", "protoc", "grpc_java_plugin", files=tuple(jars))
    plugin = shutil.which("grpc_java_plugin")
    assert plugin is not None
    (copy / "bin" / "protoc-gen-grpc-java").symlink_to(plugin)
    # What Maven has as proto-google-common-protos; javac compiles what it needs of it.
    common = Path(status_pb2.__file__).parents[2]
    (copy / "common").mkdir()
    run(f"protoc -I{common} --java_out=common {common}/google/rpc/{{status,error_details}}.proto", copy, {})
    classes = ":".join(str(path) for path in (copy / "common", *jars))
    check("Java", copy, {"CLASSPATH": classes, "JAVA_TOOL_OPTIONS": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"})


def test_retries_are_those_of_the_client() -> None:
    given = json.loads((ROOT / "clients" / "examples" / "service_config.json").read_text(encoding="utf-8"))
    assert given == json.loads(service_config(retries=True, round_robin=False, health_checks=True))
