"""Compile every kernel for every architecture, without a GPU, and hold each to its budget.

    python benchmarks/kernel_budget.py                 about 75 representative cells: rules, and growth past the table
    python benchmarks/kernel_budget.py --write         the table's cells (about 250), and write the table anew
    python benchmarks/kernel_budget.py --full --write  the whole matrix against the rules as well (`make budget`), and a
                                                       summary of it

`--keep FILE` adds each measured cell to a file and compiles no cell again that the file has, of the same kernel source
and the same compiler: a run of the whole matrix that was stopped goes on, and one after a change compiles what changed.
`--arch 90` (or `80,89`) leaves the other architectures as the table has them; the summary says which it is of.
`--op forks` (or `forks,decode`) compiles these ops alone, and leaves the others' rows of the table and of the summary.

A cell is one kernel specialisation exactly as its launcher would ask for it (`shoplm.kernels.aot`). Its numbers come
from Triton's own ptxas run: registers a thread, spilled bytes, shared memory, and instruction counts in the PTX.
Rules that no cell may break: it compiles; nothing spills; shared memory fits the architecture; wgmma is there where the
tile was chosen for it, and not serialised; key and value loads of attention loops are asynchronous (cp.async). Beyond
the rules a cell may not grow past its row of the table by more than the slack below.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import triton
from budget_matrix import MATRIX_PATH, KeptRows, Measured, write_matrix
from budget_table import TABLE_PATH, BudgetRow, BudgetTable
from shoplm.kernels.aot import AotCell
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource

OPS = (
    "prefill",
    "decode",
    "beam",
    "merge",
    "forks",
    "span_mass",
    "kv_write",
    "norm",
    "swiglu",
    "weight_only",
    "quantise_rows",
    "beam_step",
    "sample",
)
ARCHES = (80, 89, 90, 100)
WORKERS = 2

Scope = Literal["representative", "table", "full"]


def cells_in(scope: Scope, ops: Sequence[str] = OPS) -> list[AotCell]:
    """The cells of some ops in a scope, on every architecture; each name occurs once.

    `table`: the shapes that each op calls representative. `full`: the whole matrix besides. `representative`: about 75
    of the table's: on sm_90 every attention cell and the first of each other kernel, elsewhere the first of each op.
    """
    modules = [importlib.import_module(f"shoplm.kernels.{op}") for op in ops]
    sizes = (False, True) if scope == "full" else (False,)
    cells = [cell for arch in ARCHES for m in modules for size in sizes for cell in m.aot_cells(arch, full=size)]
    cells = list({cell.name: cell for cell in cells}.values())
    if scope != "representative":
        return cells
    chosen = []
    seen = set()
    for cell in cells:
        first = (cell.arch, cell.op, cell.kernel.__name__ if cell.arch == 90 else "")
        if first not in seen or (cell.arch == 90 and cell.head_dim and cell.op != "kv_write"):
            chosen.append(cell)
        seen.add(first)
    return chosen


def compiled_cell(cell: AotCell) -> Any:
    """What Triton makes of a cell. Raises what it raises where it does not compile."""
    source = ASTSource(cell.kernel, dict(cell.signature), dict(cell.constexprs), cell.divisibility())
    options = {"num_warps": cell.num_warps, "num_stages": cell.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", cell.arch, 32), options=options)


def measure(cell: AotCell) -> BudgetRow:
    """Compile one cell and count. Raises as `compiled_cell`."""
    log = io.StringIO()
    # A cache hit would leave no ptxas log to read.
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = compiled_cell(cell)
    ptx = compiled.asm["ptx"]
    spilled = re.findall(r"(\d+) bytes spill", log.getvalue())
    return BudgetRow(
        name=cell.name,
        num_warps=cell.num_warps,
        num_stages=cell.num_stages,
        registers=max(int(count) for count in re.findall(r"Used (\d+) registers", log.getvalue())),
        spill_bytes=sum(int(count) for count in spilled),
        shared_bytes=compiled.metadata.shared,
        instructions=len(re.findall(r"^\s+(?:@!?%p\d+ )?[a-z][\w.:]*\s.*;", ptx, re.MULTILINE)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\b(?:mma\.sync|tcgen05\.mma)", ptx)),
        cp_async=len(re.findall(r"\bcp\.async\.c[ag]", ptx)),
        wgmma_serialised="wgmma.mma_async instructions are serialized" in log.getvalue(),
    )


@functools.cache
def _worker_cells(scope: Scope, ops: tuple[str, ...]) -> list[AotCell]:
    return cells_in(scope, ops)


def _measure_at(position: int, scope: Scope, ops: tuple[str, ...]) -> BudgetRow | str:
    """In a worker: kernels do not travel between processes, so a cell is named by its place in the list."""
    cell = _worker_cells(scope, ops)[position]
    try:
        return measure(cell)
    except Exception as error:  # the report of a failed compile is the result; Triton raises many kinds
        return f"does not compile: {type(error).__name__}: {str(error)[:500]}"


def measure_all(
    scope: Scope,
    workers: int = WORKERS,
    keep: Path | None = None,
    arches: Sequence[int] = ARCHES,
    ops: tuple[str, ...] = OPS,
) -> list[Measured]:
    """Every (cell, row or the reason why it has none) of some ops in a scope on `arches`, compiled in `workers`
    processes.

    `keep`: a file that has cells measured before, and gets each new one.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET is set: there is nothing to compile under the interpreter; unset it")
    cells = cells_in(scope, ops)
    kept = KeptRows(keep, compiler_versions())
    wanted = [position for position, cell in enumerate(cells) if cell.arch in arches]
    rows = {position: kept.find(cells[position]) for position in wanted}
    missing = [position for position in wanted if rows[position] is None]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        repeated = (itertools.repeat(each) for each in (scope, ops))
        for position, row in zip(missing, pool.map(_measure_at, missing, *repeated), strict=True):
            rows[position] = row
            kept.add(cells[position], row)
    return [(cells[position], row) for position, row in rows.items() if row is not None]


def compiler_versions() -> tuple[str, str]:
    """(Triton's version, the bundled ptxas's)."""
    match = re.search(r"V(\d+\.\d+\.\d+)", get_ptxas_version(90))
    return triton.__version__, match.group(1) if match else "unknown"


def problems(measured: Sequence[Measured], table: BudgetTable | None) -> list[str]:
    """Every broken rule and, against a table of the same compiler, every cell that it lacks and every regression."""
    found = []
    for cell, row in measured:
        if isinstance(row, str):
            found.append(f"{cell.name} {row}")
            continue
        found += [f"{cell.name} {text}" for text in row.broken_rules(cell)]
        if table is not None and cell.name not in table.rows:
            found.append(f"{cell.name} is not in the table: run `make budget` and review the difference")
        elif table is not None:
            found += [f"{cell.name} {text}" for text in row.regressions(table.rows[cell.name])]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and its problems; exit status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the whole matrix instead of the representative cells")
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--keep", type=Path, help="file of cells measured before; each new one is added")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that compile")
    parser.add_argument("--arch", default=",".join(map(str, ARCHES)), help="which, separated by commas; default: all")
    parser.add_argument("--op", default=",".join(OPS), help="which, separated by commas; default: all")
    options = parser.parse_args(arguments)
    arches = [int(arch) for arch in options.arch.split(",")]
    if unknown := set(arches) - set(ARCHES):
        parser.error(f"unknown architectures {sorted(unknown)}; there are {', '.join(map(str, ARCHES))}")
    ops = tuple(options.op.split(","))
    if unknown_ops := set(ops) - set(OPS):
        parser.error(f"unknown ops {sorted(unknown_ops)}; there are {', '.join(OPS)}")
    scope: Scope = "full" if options.full else "table" if options.write else "representative"
    measured = measure_all(scope, options.workers, options.keep, arches, ops)
    for cell, row in measured:
        detail = row if isinstance(row, str) else f"{row.registers} registers, {row.shared_bytes} B shared"
        print(f"{cell.name:90s} {detail}")
    table = None
    if options.write:
        listed = {cell.name: cell for cell in cells_in("table")}
        rows = {row.name: row for _, row in measured if isinstance(row, BudgetRow) and row.name in listed}
        if len(arches) < len(ARCHES) or len(ops) < len(OPS):
            older = BudgetTable.read()
            if (older.triton_version, older.ptxas_version) != compiler_versions():
                parser.error(f"the table is of Triton {older.triton_version}: write all ops and architectures anew")
            for name in listed.keys() & older.rows.keys():
                if listed[name].arch not in arches or listed[name].op not in ops:
                    rows[name] = older.rows[name]
        BudgetTable(*compiler_versions(), rows).write()
    elif not options.full and TABLE_PATH.exists() and (read := BudgetTable.read()).triton_version == triton.__version__:
        table = read
    found = problems(measured, table)
    if options.full and options.write:
        write_matrix(measured, found, compiler_versions(), MATRIX_PATH, only_ops=None if set(ops) == set(OPS) else ops)
    for text in found:
        print(f"PROBLEM {text}")
    compared = "the committed table" if table else "the rules only"
    print(f"{len(measured)} cells against {compared}: {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
