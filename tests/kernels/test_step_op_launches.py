"""What Triton's launcher would compile for the element-wise, sampling and beam ops (see step_op_launches.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("step_op_launches.py")
    finished = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return dict(json.loads(finished.stdout))


def test_other_lengths_compile_nothing(recording: dict[str, Any]) -> None:
    """One token, odd counts, unaligned index slices: no kernel that the first step had not compiled."""
    assert recording["steps"]["first"] == [
        "_quantise_rows_kernel",
        "_rms_norm_kernel",
        "_rms_norm_kernel",
        "_swiglu_kernel",
        "final_kernel",
        "kv_write_kernel",
        "kv_write_kernel",
        "lse_kernel",
        "plan_kernel",
        "sample_row_kernel",
        "sample_tile_kernel",
        "tile_kernel",
        *["unpack_kernel"] * 2,
        *["weight_only_kernel"] * 4,  # 8 and 4 bits, few rows and more
    ]
    assert recording["steps"]["new"] == []


def test_a_step_neither_allocates_nor_waits(recording: dict[str, Any]) -> None:
    assert recording["steps"]["operators"] == []


def test_budget_cells_are_what_the_launchers_compile(recording: dict[str, Any]) -> None:
    assert recording["cell_mismatches"] == []
