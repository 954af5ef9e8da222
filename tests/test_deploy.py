"""What deploy/ asks for exists: no alert, panel, probe or setting is silent because a name or a port changed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from shoplm.config import ServerConfig
from shoplm.metrics import Metrics

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "shoplm.rules.yml"
_NAME = re.compile(r"\b(?:shoplm|grpc_server|process)_[a-z0-9_]+")
_RECORDED = re.compile(r"shoplm(?::[a-z0-9_]+)+")
_WITHOUT_LABELS = re.compile(r"\"[^\"]*\"")


def exported_names() -> set[str]:
    """Series that a server exports: family names with what each type adds."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    families = list(Metrics().registry.collect())
    return {family.name + suffix for family in families for suffix in suffixes.get(family.type, [""])}


def panel_queries() -> Iterator[tuple[str, str]]:
    """(title, PromQL) of every panel."""
    dashboard: dict[str, Any] = json.loads((DEPLOY / "grafana" / "shoplm.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def test_every_panel_asks_for_what_is_exported() -> None:
    names, recorded = exported_names(), set(re.findall(r"record: (\S+)", RULES.read_text()))
    queries = list(panel_queries())
    assert len(queries) > 25
    for title, query in queries:
        plain = _WITHOUT_LABELS.sub("", query)
        used = set(_NAME.findall(_RECORDED.sub("", plain)))
        assert used <= names, (title, used - names)
        assert set(_RECORDED.findall(plain)) <= recorded, title
        assert used or _RECORDED.search(plain), title


def test_every_rule_asks_for_what_is_exported() -> None:
    text = RULES.read_text()
    queries = re.sub(r"(summary|description|alert|name): .*|#.*", "", text)
    used = set(_NAME.findall(_RECORDED.sub("", _WITHOUT_LABELS.sub("", queries))))
    assert used <= exported_names(), used - exported_names()
    assert "shoplm_requests_total" in used


def test_every_metric_of_our_own_is_described_for_operators() -> None:
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    ours = {family.name for family in Metrics().registry.collect() if family.name.startswith(("shoplm_", "grpc_"))}
    assert ours
    assert {name for name in ours if f"`{name}" not in page} == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "--lint-fatal", "shoplm.rules.yml"],
        ["test", "rules", "shoplm.rules.test.yml"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_promtool_accepts_the_files(command: list[str]) -> None:
    done = subprocess.run(
        ["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_every_panel_is_valid_promql(tmp_path: Path) -> None:
    groups = []
    for number, (_, query) in enumerate(panel_queries()):
        plain = query.replace("$__rate_interval", "5m").replace("$job", "shoplm").replace("$instance", ".+")
        groups.append({"record": f"panel:{number}", "expr": plain})
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": groups}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", "panels.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def default_of(setting: str) -> Any:
    return ServerConfig.model_fields[setting].default


@pytest.mark.parametrize("path", ["container/Containerfile", "kubernetes/shoplm.yaml", "systemd/shoplm.service"])
def test_every_variable_is_a_setting(path: str) -> None:
    used = set(re.findall(r"SHOPLM_[A-Z_]+", (DEPLOY / path).read_text())) - {"SHOPLM_CACHE"}
    assert used
    assert {name.removeprefix("SHOPLM_").lower() for name in used} <= set(ServerConfig.model_fields)


def test_a_pod_is_asked_where_the_server_answers_and_given_time_to_drain() -> None:
    deployment, service, _ = yaml.safe_load_all((DEPLOY / "kubernetes" / "shoplm.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": default_of("port"), "metrics": default_of("metrics_port")}
    paths = {probe: container[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe: each["path"] for probe, each in paths.items()} == {
        "startupProbe": "/readyz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/healthz",
    }
    assert all(each["port"] == "metrics" for each in paths.values())
    assert service["spec"]["clusterIP"] == "None"  # a client sees all replicas
    assert pod["terminationGracePeriodSeconds"] > default_of("drain_seconds")
    unit = (DEPLOY / "systemd" / "shoplm.service").read_text()
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > default_of("drain_seconds")  # type: ignore[index]
