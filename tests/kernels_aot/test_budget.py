# mypy: allow-untyped-decorators
"""Every representative kernel compiles within its budget, on every architecture, without a GPU.

Compiles for real, so it must not run under the interpreter: `make test` gives it a process of its own.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import kernel_budget
import pytest
import torch
import triton
import triton.language as tl
from budget_matrix import KeptRows, write_matrix
from budget_table import BudgetRow, BudgetTable
from shoplm.kernels.aot import AotCell, AttentionShape, make_cell
from shoplm.kernels.beam import beam_cells
from shoplm.kernels.decode import split_cell
from shoplm.kernels.prefill import prefill_cell

Measured = list[tuple[AotCell, BudgetRow | str]]


@pytest.fixture(scope="module", autouse=True)
def _compiles() -> None:
    """Fail, rather than test nothing, where Triton was imported as an interpreter."""
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "unset TRITON_INTERPRET: it compiles nothing"


@pytest.fixture(scope="module")
def measured() -> Measured:
    return kernel_budget.measure_all("representative")


@pytest.fixture(scope="module")
def table() -> BudgetTable:
    return BudgetTable.read()


def test_no_cell_breaks_a_rule(measured: Measured) -> None:
    """Compiles, no spills, shared memory fits, wgmma where expected and not serialised, loads pipelined."""
    assert kernel_budget.problems(measured, None) == []


def test_no_cell_grows_past_the_committed_table(measured: Measured, table: BudgetTable) -> None:
    if table.triton_version != triton.__version__:
        pytest.skip(f"the table is of Triton {table.triton_version}, this is {triton.__version__}: only the rules hold")
    assert kernel_budget.problems(measured, table) == []


def test_the_table_lists_the_cells_that_exist(table: BudgetTable) -> None:
    """Neither a cell without a row nor a row whose cell is gone: `make budget` after adding or removing cells."""
    assert sorted(table.rows) == sorted(cell.name for cell in kernel_budget.cells_in("table"))


def test_representative_cells_cover_every_op_and_architecture(measured: Measured) -> None:
    cells = [cell for cell, _ in measured]
    assert 50 <= len(cells) <= 80
    pairs = {(cell.op, cell.arch) for cell in cells}
    without_e4m3 = {("quantise_rows", 80)}
    assert pairs == {(op, arch) for op in kernel_budget.OPS for arch in kernel_budget.ARCHES} - without_e4m3


@pytest.mark.parametrize("window", [False, True])
def test_the_fp32_kernels_of_the_proof_do_not_spill(window: bool) -> None:
    """The backend's check on a card runs them, within a time that compiling large tiles of multiply-adds would take."""
    shape = AttentionShape(64, torch.float32, torch.float32, 16, 2, window, kv_heads=1)
    cells = (split_cell(shape, 90, short=True), beam_cells(shape, 90, max_width=32)[0], prefill_cell(shape, 90))
    for cell in cells:
        measured = kernel_budget.measure(cell)
        assert measured.spill_bytes == 0 and measured.instructions < 3000, measured


def row(**changes: int | bool) -> BudgetRow:
    good = BudgetRow("cell", 4, 3, 100, 0, 65_536, 1000, 8, 0, 6, False)
    return dataclasses.replace(good, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"spill_bytes": 4}, "spills 4 bytes"),
        ({"shared_bytes": 227 * 1024 + 1}, "sm_90 has at most 232448"),
        ({"wgmma": 0}, "has no wgmma"),
        ({"wgmma_serialised": True}, "serialises its wgmma"),
        ({"cp_async": 0}, "its loads are not pipelined"),
    ],
)
def test_each_rule_is_seen_broken(changes: dict[str, int], message: str | None, measured: Measured) -> None:
    prefill = next(cell for cell, _ in measured if cell.op == "prefill" and cell.arch == 90)
    broken = row(**changes).broken_rules(prefill)
    assert broken == [] if message is None else (len(broken) == 1 and message in broken[0])


def test_growth_beyond_the_slack_is_a_regression() -> None:
    allowed = row(registers=108, shared_bytes=65_536 + 1024, instructions=1100)
    assert allowed.regressions(row()) == []
    for field in ("registers", "shared_bytes", "instructions"):
        grown = dataclasses.replace(allowed, **{field: getattr(allowed, field) + 1})
        assert len(grown.regressions(row())) == 1 and grown.regressions(row())[0].startswith(f"{field} grew")


@triton.jit
def _greedy_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, SIZE: tl.constexpr) -> None:
    """Keeps two products of one warp in registers at once: far more than there are."""
    rows = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + rows)
    product = tl.dot(x, tl.trans(x))
    tl.store(out_ptr + rows, product + tl.trans(tl.dot(product.to(tl.float16), x)))


def test_a_spill_in_the_compiler_log_is_measured() -> None:
    """The rules above read the log of a real ptxas run; this kernel shows that they would see a spill there."""
    cell = make_cell(
        "control", _greedy_kernel, {"x_ptr": "*fp16", "out_ptr": "*fp32"}, {"SIZE": 128}, aligned=("x_ptr", "out_ptr"),
        num_warps=1, num_stages=2, arch=80, head_dim=0, dtype=torch.float16, expect_wgmma=False,
    )  # fmt: skip
    measured = kernel_budget.measure(cell)
    assert isinstance(measured, BudgetRow)
    assert measured.spill_bytes > 0 and measured.mma > 0


def test_the_table_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    written = BudgetTable("3.7.1", "12.9.86", {"cell": row()})
    written.write(path)
    assert BudgetTable.read(path) == written
    assert "| cell | 4 | 3 | 100 | 0 | 65536 | 1000 | 8 | 0 | 6 |" in path.with_suffix(".md").read_text()


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """A cell is kept with its compiler and all that it was compiled with; a line that was cut off is no cell."""
    path, versions = tmp_path / "kept.jsonl", ("3.7.1", "12.8.93")
    first, second, third = kernel_budget.cells_in("table")[:3]
    kept = KeptRows(path, versions)
    assert kept.find(first) is None
    kept.add(first, row())
    kept.add(second, "does not compile: because")
    path.write_text(path.read_text() + '{"key": "half')
    again = KeptRows(path, versions)
    assert again.find(first) == row()
    assert again.find(second) == "does not compile: because"
    assert again.find(third) is None
    assert again.find(dataclasses.replace(first, num_stages=first.num_stages + 1)) is None
    assert KeptRows(path, ("3.6.0", versions[1])).find(first) is None


def test_the_matrix_shows_the_worst_of_a_kernels_cells(tmp_path: Path) -> None:
    cell = kernel_budget.cells_in("table")[0]
    reason = f"{cell.name} does not compile: because"
    path = tmp_path / "matrix.md"
    write_matrix([(cell, row()), (cell, row(registers=200)), (cell, reason)], [reason], ("3.7.1", "12.8.93"), path)
    text = path.read_text()
    assert f"| {cell.op}/{cell.kernel.__name__}/sm{cell.arch} | 3 | 200 | 0 | 65536 | 1000 |" in text
    assert f"all 3 cells of sm_{cell.arch}; 1 problems" in text
    assert text.endswith(f"## Problems\n\n- {reason}\n")


def test_a_summary_of_one_op_leaves_the_lines_of_others(tmp_path: Path) -> None:
    """Their cells are counted, their problems stay; those of the op itself are replaced."""
    versions, path = ("3.7.1", "12.8.93"), tmp_path / "matrix.md"
    merge, swiglu = (
        next(cell for cell in kernel_budget.cells_in("table", (op,)) if cell.arch == 90) for op in ("merge", "swiglu")
    )
    first = [f"{cell.name} spills 4 bytes" for cell in (merge, swiglu)]
    write_matrix([(merge, row()), (merge, row()), (swiglu, row())], first, versions, path)
    write_matrix([(swiglu, row(registers=90))], [], versions, path, only_ops=("swiglu",))
    text = path.read_text()
    assert "all 3 cells of sm_90; 1 problems" in text and text.endswith(f"\n- {first[0]}\n")
    assert "| merge/_merge_kernel/sm90 | 2 | 100 | 0 | 65536 | 1000 |" in text
    assert "| swiglu/_swiglu_kernel/sm90 | 1 | 90 | 0 | 65536 | 1000 |" in text
