"""The whole matrix of cells: what a long run keeps, so that it can go on, and the summary that it leaves."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from budget_table import BudgetRow
from shoplm.kernels.aot import AotCell

MATRIX_PATH = Path(__file__).parent / "results" / "kernel_matrix.md"

Measured = tuple[AotCell, BudgetRow | str]  # a str says why the cell has no row
Versions = tuple[str, str]  # of Triton and of ptxas
_Kernel = tuple[str, str, int]  # op, kernel, architecture


class KeptRows:
    """Cells measured before, in a file of JSON lines; a cell is the same only with the same source and compiler."""

    def __init__(self, path: Path | None, versions: Versions) -> None:
        """`path` None: nothing is kept."""
        self._path = path
        self._versions = versions
        self._rows: dict[str, BudgetRow | str] = {}
        for line in path.read_text().splitlines() if path is not None and path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the run was stopped within this line
            row = entry["row"]
            self._rows[entry["key"]] = row if isinstance(row, str) else BudgetRow(**row)

    def find(self, cell: AotCell) -> BudgetRow | str | None:
        """What the cell compiled to, or why it did not; None: it was not measured yet."""
        return self._rows.get(self._key(cell)) if self._path is not None else None

    def add(self, cell: AotCell, row: BudgetRow | str) -> None:
        """Keep a cell."""
        if self._path is None:
            return
        value = row if isinstance(row, str) else asdict(row)
        with self._path.open("a") as file:
            file.write(json.dumps({"key": self._key(cell), "row": value}) + "\n")

    def _key(self, cell: AotCell) -> str:
        """Triton's own key of the kernel's source, which covers the functions that it calls, and all of the cell."""
        types, constants = sorted(cell.signature.items()), sorted(map(repr, cell.constexprs.items()))
        options = (cell.num_warps, cell.num_stages, cell.arch, *self._versions)
        facts = (cell.name, cell.kernel.cache_key, types, constants, cell.attrs, options)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def write_matrix(
    measured: Sequence[Measured],
    problems: Sequence[str],
    versions: Versions,
    path: Path,
    *,
    only_ops: Sequence[str] | None = None,
) -> None:
    """Write one line per kernel and architecture, the worst of its cells, and every cell with a problem.

    `only_ops`: what was measured of; the lines that the file at `path` has of other ops stay.
    """
    groups: defaultdict[_Kernel, list[BudgetRow | str]] = defaultdict(list)
    for cell, row in measured:
        groups[cell.op, str(cell.kernel.__name__), cell.arch].append(row)
    older, older_problems = _others(path, only_ops) if only_ops is not None else ({}, [])
    entries = older | {kernel: _worst(rows) for kernel, rows in groups.items()}
    problems = [*older_problems, *problems]
    cells = sum(count for count, _ in entries.values())
    arches = ", ".join(f"sm_{arch}" for arch in sorted({arch for _, _, arch in entries}))
    lines = [
        "# The whole matrix of kernels",
        "",
        f"Written by `make budget`; Triton {versions[0]}, ptxas {versions[1]}. Compiled: all {cells} cells of "
        f"{arches}; {len(problems)} problems. Largest values of each kernel's; `kernel_budget.md` has single cells.",
        "",
        "| kernel | cells | registers | spilled B | shared B | instructions |",
        "|---|" + "--:|" * 5,
    ]
    for (op, kernel, arch), (count, worst) in sorted(entries.items()):
        lines.append(f"| {op}/{kernel}/sm{arch} | {count} | {worst} |")
    if problems:
        lines += ["", "## Problems", "", *(f"- {text}" for text in problems)]
    path.write_text("\n".join(lines) + "\n")


def _worst(rows: Sequence[BudgetRow | str]) -> tuple[int, str]:
    """How many cells, and the largest of each column."""
    compiled = [row for row in rows if isinstance(row, BudgetRow)]
    columns = ("registers", "spill_bytes", "shared_bytes", "instructions")
    worst = (max((getattr(row, column) for row in compiled), default="-") for column in columns)
    return len(rows), " | ".join(map(str, worst))


def _others(path: Path, ops: Sequence[str]) -> tuple[dict[_Kernel, tuple[int, str]], list[str]]:
    """The lines and the problems of a summary that are not of these ops."""
    text = path.read_text()
    lines = re.findall(r"^\| (\w+)/(\w+)/sm(\d+) \| (\d+) \| (.*) \|$", text, re.MULTILINE)
    kept = {(op, kernel, int(arch)): (int(count), worst) for op, kernel, arch, count, worst in lines if op not in ops}
    problems = re.findall(r"^- ((\w+)/.*)$", text, re.MULTILINE)
    return kept, [problem for problem, op in problems if op not in ops]
