"""Which format `weight_format = "auto"` stands for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from shoplm.engine import load
from shoplm.engine.spec import EngineSpec


@pytest.mark.parametrize(
    ("changes", "passed", "refusal", "found"),
    [
        ({}, ("int4", "int8"), None, "int8"),
        ({}, ("int4",), None, "model"),
        ({}, ("int8",), "no compiler", "model"),
        ({"backend": "triton"}, ("int8",), None, "model"),
        ({"bundle_folder": None}, ("int8",), None, "model"),
        ({"weight_format": "int4"}, (), None, "int4"),
        ({"weight_format": "model"}, ("int8",), None, "model"),
    ],
)
def test_int8_is_taken_where_the_decoder_runs_and_the_bundle_bears_it(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str | None],
    passed: tuple[str, ...],
    refusal: str | None,
    found: str,
) -> None:
    monkeypatch.setattr(load, "read_manifest", lambda folder, verify: SimpleNamespace(cpu_formats=passed))
    monkeypatch.setattr(load, "native_refusal", lambda *asked: refusal)
    spec = EngineSpec(**{"base_folder": "base", "bundle_folder": "bundle", "weight_format": "auto", **changes})  # type: ignore[arg-type]
    assert load.served_weight_format(spec, None) == found  # type: ignore[arg-type]
