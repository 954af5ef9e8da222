"""The whole matrix of cells: what a long run keeps, so that it can go on, and the summary that it leaves."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from budget_table import BudgetRow
from shoplm.kernels.aot import AotCell

MATRIX_PATH = Path(__file__).parent / "results" / "kernel_matrix.md"

Measured = tuple[AotCell, BudgetRow | str]  # a str says why the cell has no row
Versions = tuple[str, str]  # of Triton and of ptxas


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


def write_matrix(measured: Sequence[Measured], problems: Sequence[str], versions: Versions, path: Path) -> None:
    """Write one line per kernel and architecture, the worst of its cells, and every cell with a problem."""
    groups: defaultdict[tuple[str, str, int], list[BudgetRow | str]] = defaultdict(list)
    for cell, row in measured:
        groups[cell.op, str(cell.kernel.__name__), cell.arch].append(row)
    arches = ", ".join(f"sm_{arch}" for arch in sorted({cell.arch for cell, _ in measured}))
    lines = [
        "# The whole matrix of kernels",
        "",
        f"Written by `make budget`; Triton {versions[0]}, ptxas {versions[1]}. Compiled: all {len(measured)} cells of "
        f"{arches}; {len(problems)} problems. Largest values of each kernel's; `kernel_budget.md` has single cells.",
        "",
        "| kernel | cells | registers | spilled B | shared B | instructions |",
        "|---|" + "--:|" * 5,
    ]
    for (op, kernel, arch), rows in sorted(groups.items()):
        compiled = [row for row in rows if isinstance(row, BudgetRow)]
        columns = ("registers", "spill_bytes", "shared_bytes", "instructions")
        worst = (max((getattr(row, column) for row in compiled), default="-") for column in columns)
        lines.append(f"| {op}/{kernel}/sm{arch} | {len(rows)} | " + " | ".join(map(str, worst)) + " |")
    if problems:
        lines += ["", "## Problems", "", *(f"- {text}" for text in problems)]
    path.write_text("\n".join(lines) + "\n")
