"""Which format `weight_format = "auto"` stands for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from shoplm.engine import load
from shoplm.engine.spec import EngineSpec
from shoplm.model.native.library import InstructionSet


@pytest.mark.parametrize(
    ("changes", "instructions", "passed", "refusal", "found"),
    [
        ({}, InstructionSet.AMX, ("int4", "int8"), None, "int8"),
        ({}, InstructionSet.AVX512, ("int8",), None, "int8"),
        ({}, InstructionSet.AVX2, ("int8",), None, "model"),
        ({}, InstructionSet.AVX512, ("int4",), None, "model"),
        ({}, InstructionSet.AVX512, ("int8",), "no compiler", "model"),
        ({"backend": "triton"}, InstructionSet.AVX512, ("int8",), None, "model"),
        ({"bundle_folder": None}, InstructionSet.AVX512, ("int8",), None, "model"),
        ({"weight_format": "int4"}, InstructionSet.AVX512, (), None, "int4"),
        ({"weight_format": "model"}, InstructionSet.AVX512, ("int8",), None, "model"),
    ],
)
def test_int8_is_taken_where_it_is_fast_and_the_bundle_bears_it(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str | None],
    instructions: InstructionSet,
    passed: tuple[str, ...],
    refusal: str | None,
    found: str,
) -> None:
    monkeypatch.setattr(load, "read_manifest", lambda folder, verify: SimpleNamespace(cpu_formats=passed))
    monkeypatch.setattr(load, "native_refusal", lambda *asked: refusal)
    monkeypatch.setattr(load, "best_library", lambda: SimpleNamespace(instructions=instructions))
    spec = EngineSpec(**{"base_folder": "base", "bundle_folder": "bundle", "weight_format": "auto", **changes})  # type: ignore[arg-type]
    assert load.served_weight_format(spec, None) == found  # type: ignore[arg-type]
