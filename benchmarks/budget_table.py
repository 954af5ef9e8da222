"""What the compiler made of a kernel: rows of the budget table, the rules that they are held to, and its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from shoplm.kernels.aot import AotCell

# Opt-in limit of a thread block, CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
SHARED_LIMIT_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PIPELINED_KERNELS = ("_prefill_kernel", "_split_kernel", "_beam_prompt_kernel", "_forks_kernel", "_span_mass_kernel")

REGISTER_SLACK = 8  # ptxas allocates in steps of 8
SHARED_SLACK_BYTES = 1024
INSTRUCTION_SLACK = 1.10

TABLE_PATH = Path(__file__).parent / "results" / "kernel_budget.json"


@dataclass(frozen=True)
class BudgetRow:
    """What one cell compiled to."""

    name: str
    num_warps: int
    num_stages: int
    registers: int  # per thread
    spill_bytes: int  # stores plus loads, per thread
    shared_bytes: int  # per thread block
    instructions: int  # in the PTX, all kinds
    wgmma: int  # asynchronous warp-group products (sm_90)
    mma: int  # synchronous tensor-core products, and tcgen05 ones (sm_100)
    cp_async: int  # asynchronous copies to shared memory
    wgmma_serialised: bool

    def broken_rules(self, cell: AotCell) -> list[str]:
        """Hard rules that this cell breaks, in words."""
        broken = []
        if self.spill_bytes:
            broken.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT_BYTES[cell.arch]:
            broken.append(f"needs {self.shared_bytes} bytes of shared memory, sm_{cell.arch} has at most "
                          f"{SHARED_LIMIT_BYTES[cell.arch]}")  # fmt: skip
        if cell.expect_wgmma and not self.wgmma:
            broken.append("has no wgmma")
        if self.wgmma_serialised:
            broken.append("serialises its wgmma")
        if cell.kernel.__name__ in PIPELINED_KERNELS and not self.cp_async:
            broken.append("has no cp.async: its loads are not pipelined")
        return broken

    def regressions(self, committed: BudgetRow) -> list[str]:
        """Growth past the committed row by more than the slack, in words."""
        limits = (
            ("registers", self.registers, committed.registers + REGISTER_SLACK),
            ("shared_bytes", self.shared_bytes, committed.shared_bytes + SHARED_SLACK_BYTES),
            ("instructions", self.instructions, int(committed.instructions * INSTRUCTION_SLACK)),
        )
        return [f"{field} grew to {value}, budget {limit}" for field, value, limit in limits if value > limit]


@dataclass(frozen=True)
class BudgetTable:
    """The committed table and the compiler that it is of."""

    triton_version: str
    ptxas_version: str
    rows: dict[str, BudgetRow]

    @staticmethod
    def read(path: Path = TABLE_PATH) -> BudgetTable:
        """The table at `path`; FileNotFoundError where there is none yet."""
        data = json.loads(path.read_text())
        rows = [BudgetRow(**row) for row in data["rows"]]
        return BudgetTable(data["triton_version"], data["ptxas_version"], {row.name: row for row in rows})

    def write(self, path: Path = TABLE_PATH) -> None:
        """Write the JSON and, beside it, the same table in Markdown."""
        rows = [asdict(self.rows[name]) for name in sorted(self.rows)]
        head = {"triton_version": self.triton_version, "ptxas_version": self.ptxas_version}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        path.write_text(json.dumps(head)[:-1] + f', "rows": [\n  {lines}\n]}}\n')
        path.with_suffix(".md").write_text(self._markdown())

    def _markdown(self) -> str:
        columns = ("warps", "stages", "registers", "spilled B", "shared B", "instructions", "wgmma", "mma", "cp.async")
        lines = [
            "# Kernel budget",
            "",
            f"Written by `make budget`; Triton {self.triton_version}, ptxas {self.ptxas_version}.",
            "",
            "| kernel | " + " | ".join(columns) + " |",
            "|---|" + "--:|" * len(columns),
        ]
        for name in sorted(self.rows):
            row = self.rows[name]
            values = (row.num_warps, row.num_stages, row.registers, row.spill_bytes, row.shared_bytes)
            counts = (row.instructions, row.wgmma, row.mma, row.cp_async)
            lines.append(f"| {name} | " + " | ".join(str(value) for value in values + counts) + " |")
        return "\n".join(lines) + "\n"
