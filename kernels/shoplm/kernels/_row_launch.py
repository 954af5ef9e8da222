"""The launch of kernels in which one program owns a row and keeps it in registers."""

from __future__ import annotations

import triton


def row_launch(columns: int, thread_elements: int) -> tuple[int, int]:
    """(BLOCK, num_warps): so many elements a thread, of two to sixteen warps; more of them behind the last."""
    block = max(128, triton.next_power_of_2(columns))
    return block, min(16, max(2, block // (32 * thread_elements)))
