"""The driver of the GPU proof: limits, failures, missing packages, the table. A script stands in for the stages."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gpu
import pytest
from gpu_stages.__main__ import STAGES

STAGE = """
import json, sys, time
stage, out = sys.argv[1], sys.argv[3]
row = {"stage": stage, "name": "one", "value": 1.0, "unit": "us", "passed": stage != "decode", "target": None,
       "note": "", "details": {}, "machine": {"card": "none"}}
open(f"{out}/{stage}.jsonl", "w").write(json.dumps(row) + "\\n" + "{half a row")
print("Traceback\\nValueError: broken" if stage == "beams" else "msgspec, grpc")
time.sleep(60 if stage == "prefill" else 0)
sys.exit({"decode": 1, "beams": 1, "server": 3}.get(stage, 0))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "stages" / "gpu_stages"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "__main__.py").write_text(STAGE)
    return {**os.environ, "PYTHONPATH": str(folder.parent)}


def test_a_stage_that_fails_or_hangs_does_not_end_the_others(tmp_path: Path, environment: dict[str, str]) -> None:
    ended = gpu.run_together(["ops", "decode", "beams", "server"], tmp_path, environment, 30, smoke=False)
    ended += gpu.run_together(["prefill"], tmp_path, environment, 5, smoke=False)
    ended += gpu.run_together(["search"], tmp_path, environment, 0, smoke=False)
    outcomes = {end.stage: (end.outcome, end.note) for end in ended}
    assert outcomes["ops"] == ("passed", "")
    assert outcomes["decode"] == ("failed", "a row failed")
    assert outcomes["beams"] == ("failed", "ValueError: broken")
    assert outcomes["server"] == ("skipped", "needs msgspec, grpc: carry the wheels and pass --wheels")
    assert outcomes["prefill"] == ("stopped", "limit 5 s")
    assert outcomes["search"] == ("stopped", "no time was left")
    # A stopped stage keeps the rows it had; the half-written one is dropped.
    rows = gpu.read_rows(tmp_path, ["prefill", "decode"])
    assert [(row["stage"], row["value"]) for row in rows] == [("prefill", 1.0), ("decode", 1.0)]
    lines = gpu.table(rows, ended).splitlines()
    assert "MISSED" in lines[1] and "MISSED" not in lines[0]
    assert lines[-1] == "card none"


def test_the_limits_leave_time_within_nine_minutes() -> None:
    assert sum(plan.limit_seconds for plan in gpu.PLANS) <= gpu.TOTAL_SECONDS < 540
    assert len(set(gpu.STAGES)) == len(gpu.STAGES)


def test_the_stages_are_those_that_exist() -> None:
    assert set(gpu.STAGES) == set(STAGES)


def test_kernel_stages_import_nothing_but_torch_triton_and_numpy() -> None:
    """On a machine that has no more, what they import must not ask for it."""
    script = (
        "import sys\n"
        "for name in ('msgspec', 'pydantic', 'safetensors', 'grpc'): sys.modules[name] = None\n"
        "import gpu_stages.kernels, gpu_stages.ops, gpu_stages.correctness, gpu_stages.correctness_ops\n"
    )
    environment = gpu.stage_environment(Path("/nowhere"), None, smoke=True)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


def test_wheels_are_unpacked_and_come_behind_the_sources(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried-1-py3-none-any.whl", "w") as archive:
        archive.writestr("carried/__init__.py", "value = 1")
    with zipfile.ZipFile(tmp_path / "wheels" / "numpy-9-py3-none-any.whl", "w") as archive:
        archive.writestr("numpy/__init__.py", "value = 1")
    environment = gpu.stage_environment(tmp_path, tmp_path / "wheels", smoke=False)
    folders = environment["PYTHONPATH"].split(os.pathsep)
    carried = [at for at, folder in enumerate(folders) if (Path(folder) / "carried" / "__init__.py").exists()]
    assert carried and carried[0] > folders.index(str(gpu.REPOSITORY / "server"))
    assert not any((Path(folder) / "numpy").exists() for folder in folders)
    assert "TRITON_INTERPRET" not in environment
