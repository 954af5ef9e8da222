"""The loops of machine code: read from a listing, and of a kernel as it compiles."""

from __future__ import annotations

from kernel_budget import cells_in
from kernel_loops import disassembled, loops

LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64] ;
        /*0040*/                   LDGSTS.E [R5], desc[UR4][R8.64] ;
        /*0050*/               @P1 HMMA.16816.F32.BF16 R12, R16, R20, R12 ;
        /*0060*/                   MUFU.EX2 R3, R3 ;
        /*0070*/                   FFMA R3, R3, R4, R5 ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
        /*0090*/               @P3 BRA `(.L_x_3) ;
.L_x_3:
        /*00a0*/                   EXIT ;
"""


def test_a_loop_is_what_a_jump_back_encloses() -> None:
    (body,) = loops(LISTING)  # the first loop has no products
    assert dict(body.kinds) == {"copies": 2, "products": 1, "exponentials": 1, "fp32": 1, "others": 1}
    assert body.narrow == 1
    assert body.issue_cycles(8) == 12


def test_keys_and_values_come_by_16_bytes() -> None:
    """Of a pool that is not quantised: only the page table's entries are narrower."""
    cell = next(cell for cell in cells_in("table", ("decode",)) if cell.arch == 90)
    bodies = loops(disassembled(cell))
    assert len(bodies) == 2  # tiles that every row sees, and those that need a mask
    for body in bodies:
        assert body.kinds["copies"] - body.narrow >= 4
        assert body.narrow <= 2
