"""What Triton's launcher would compile for the element-wise, sampling and beam ops (see step_op_launches.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def recording(launches_of: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return launches_of("step_op_launches.py")


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
