"""What the loops of a kernel consist of, in machine code, found without a GPU.

    python benchmarks/kernel_loops.py --op prefill,decode --arch 90

Compiles the representative cells of `kernel_budget.py` and takes their loops apart with the disassembler that Triton
brings. For each loop with tensor-core products: the instructions of one turn by kind, and `issue`, the cycles that a
multiprocessor's four schedulers need at least to issue them for all warps of a thread block. To be held against the
cycles that the turn's products or its bytes take: whichever is the largest bounds the kernel, if all of it overlaps.

`narrow` are copies to shared memory of fewer than 16 bytes a thread: of a page table's entries, of scales, and of tiles
that are too small for more.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from kernel_budget import ARCHES, OPS, cells_in, compiled_cell
from shoplm.kernels.aot import AotCell

SCHEDULERS = 4  # of a multiprocessor, each issues one instruction a cycle
_DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_JUMP = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
# Kinds by the first letters of an instruction's name; the first that fits counts.
KINDS: dict[str, tuple[str, ...]] = {
    "products": ("HGMMA", "QGMMA", "HMMA", "IMMA", "QMMA", "UTCHMMA"),
    "copies": ("LDGSTS", "UTMALDG"),
    "loads": ("LDG", "LDC"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "exponentials": ("MUFU",),
    "conversions": ("F2F", "I2F", "F2I", "HADD2.F32", "HADD2.BF16"),
    "fp32": ("FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "FSETP"),
    "shuffles": ("SHFL", "REDUX"),
    "barriers": ("BAR", "WARPGROUP", "DEPBAR", "LDGDEPBAR"),
}


@dataclass(frozen=True)
class LoopBody:
    """One turn of a loop."""

    kinds: Counter[str]
    narrow: int  # copies of fewer than 16 bytes a thread

    @classmethod
    def of(cls, instructions: Sequence[str]) -> LoopBody:
        kinds = Counter(_kind(each) for each in instructions)
        copies = [each for each in instructions if each.startswith("LDGSTS")]
        return cls(kinds, sum(".128" not in each.split()[0] for each in copies))

    def issue_cycles(self, warps: int) -> int:
        """At least, for all warps of a thread block."""
        return -(-self.kinds.total() * warps // SCHEDULERS)


def _kind(instruction: str) -> str:
    return next((kind for kind, names in KINDS.items() if instruction.startswith(names)), "others")


def loops(disassembly: str) -> list[LoopBody]:
    """Of a kernel's machine code as `nvdisasm -c` prints it: those with products, from the first on."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if (label := _LABEL.match(line)) is not None:
            labels[label[1]] = len(instructions)
        elif (found := _INSTRUCTION.match(line)) is not None:
            instructions.append(found[1])
    bodies = []
    for at, instruction in enumerate(instructions):
        jump = _JUMP.search(instruction)
        if jump is not None and (start := labels.get(jump[1], at + 1)) <= at:
            bodies.append(LoopBody.of(instructions[start : at + 1]))
    return [body for body in bodies if body.kinds["products"]]


def disassembled(cell: AotCell) -> str:
    """The cell's machine code. Raises as `compiled_cell`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled_cell(cell).asm["cubin"])
        file.flush()
        return subprocess.run([_DISASSEMBLER, "-c", file.name], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="prefill,decode,beam", help=f"separated by commas, of: {', '.join(OPS)}")
    parser.add_argument("--arch", type=int, default=90, choices=ARCHES)
    options = parser.parse_args()
    ops = options.op.split(",")
    if unknown := set(ops) - set(OPS):
        parser.error(f"unknown ops {sorted(unknown)}; there are {', '.join(OPS)}")
    for cell in cells_in("table", ops):
        if cell.arch != options.arch:
            continue
        for body in loops(disassembled(cell)):
            parts = ", ".join(f"{count} {kind}" for kind, count in body.kinds.most_common())
            print(f"{cell.name}: {body.kinds.total()} a turn, issue {body.issue_cycles(cell.num_warps)} cycles "
                  f"({cell.num_warps} warps); {parts}; {body.narrow} narrow")  # fmt: skip


if __name__ == "__main__":
    main()
