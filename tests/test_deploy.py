"""What deploy/ asks for exists: no alert, panel, probe or setting is silent because a name or a port changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from shoplm.api.status import CODES
from shoplm.config import ServerConfig
from shoplm.errors import DrainingError, ShopLMError
from shoplm.metrics import Metrics
from shoplm.serve import EXIT_CONFIGURATION

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "shoplm.rules.yml"
_NAME = re.compile(r"\b(?:shoplm|grpc_server|process)_[a-z0-9_]+")
_RECORDED = re.compile(r"shoplm(?::[a-z0-9_]+)+")
_WITHOUT_LABELS = re.compile(r"\"[^\"]*\"")


def server_metrics() -> Metrics:
    """As a server has them, which has an engine."""
    metrics = Metrics()
    metrics.watch_engine(os.getpid)
    return metrics


def exported_names() -> set[str]:
    """Series that a server exports: family names with what each type adds."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    families = list(server_metrics().registry.collect())
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


def test_errors_are_what_the_server_is_to_blame_for_and_no_rollout() -> None:
    blamed = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
    reasons = {ShopLMError.reason, *(kind.reason for kind, code in CODES.items() if code in blamed)}
    counted = re.findall(r"shoplm_refusals_total\{reason=~\"([A-Z_|]+)\"", RULES.read_text())
    assert [set(each.split("|")) for each in counted] == [reasons - {DrainingError.reason}]


def test_every_metric_of_our_own_is_described_for_operators() -> None:
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    ours = {
        family.name for family in server_metrics().registry.collect() if family.name.startswith(("shoplm_", "grpc_"))
    }
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


def kubernetes() -> dict[str, Any]:
    """The objects by their kind."""
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "shoplm.yaml").read_text())
    return {document["kind"]: document for document in documents}


def test_a_pod_is_asked_where_the_server_answers_and_given_time_to_drain() -> None:
    kinds = kubernetes()
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
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
    assert kinds["Service"]["spec"]["clusterIP"] == "None"  # a client sees all replicas
    assert pod["terminationGracePeriodSeconds"] > default_of("drain_seconds")
    unit = (DEPLOY / "systemd" / "shoplm.service").read_text()
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > default_of("drain_seconds")  # type: ignore[index]


def test_pods_are_spread_hold_no_token_and_show_metrics_to_prometheus_only() -> None:
    kinds = kubernetes()
    deployment = kinds["Deployment"]["spec"]
    pod, labels = deployment["template"]["spec"], deployment["template"]["metadata"]["labels"]
    (spread,) = pod["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["labelSelector"]["matchLabels"]) == ("kubernetes.io/hostname", labels)
    assert pod["automountServiceAccountToken"] is False
    assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"])
    policy = kinds["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    callers = {port["port"]: rule.get("from") for rule in policy["ingress"] for port in rule["ports"]}
    assert callers["grpc"] is None and callers["metrics"]
    assert set(callers) == {port["name"] for port in pod["containers"][0]["ports"]}


def test_images_have_a_version() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", (DEPLOY / "container" / "Containerfile").read_text(), re.MULTILINE)
    (container,) = kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"]
    for image in (base, container["image"]):
        assert re.search(r":\d+\.\d+", image), image


def unit() -> str:
    """As it is once tokens and TLS are taken in."""
    return re.sub(r"^#(?=\w+=)", "", (DEPLOY / "systemd" / "shoplm.service").read_text(), flags=re.MULTILINE)


def test_the_unit_starts_again_what_may_succeed_and_nothing_else() -> None:
    (prevented,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit(), re.MULTILINE)
    assert prevented.split() == [str(EXIT_CONFIGURATION)]
    assert "\nStartLimitIntervalSec=0\n" in unit()
    (files,) = re.findall(r"^LimitNOFILE=(\d+)$", unit(), re.MULTILINE)
    assert int(files) >= 4 * default_of("max_concurrent_calls")


def test_every_secret_file_of_the_unit_is_a_credential() -> None:
    loaded = set(re.findall(r"^LoadCredential=([^:]+):/etc/", unit(), re.MULTILINE))
    assert set(re.findall(r"%d/(\S+)", unit())) == loaded
    named = dict(re.findall(r"SHOPLM_([A-Z_]+)=%d/(\S+)", unit()))
    assert {"AUTH_TOKENS_FILE", "TLS_KEY"} <= set(named)
    assert all(ServerConfig.model_fields[name.lower()].annotation == Path | None for name in named)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = "/opt/shoplm/bin/shoplm"
    for name, text in (("plain", (DEPLOY / "systemd" / "shoplm.service").read_text()), ("secret", unit())):
        path = tmp_path / f"{name}.service"
        path.write_text(text.replace(program, "/bin/true"))
        done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert path.name not in done.stderr, done.stderr  # it only warns of a name that it does not know
