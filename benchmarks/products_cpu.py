"""GFLOP/s of one core in the C++ decoder's products: SmolLM2-135M's gate and up, weights read from memory each time.

    python benchmarks/products_cpu.py [avx512]

By the thread's own processor time, the best of several rounds, so that other work on the machine costs little but
caches and bandwidth. Rounding the inputs and the results is in it.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from shoplm.model.native.library import InstructionSet, NativeLibrary, best_library, native_library
from shoplm.model.native.linear import PackedLinear, WeightFormat

OUTPUTS, INPUTS = 3072, 576
COLD_BYTES = 128 << 20  # more than a cache keeps
ROWS = (1, 8, 32, 128, 512)
ROUNDS = 5


def rates(library: NativeLibrary, format: WeightFormat) -> list[float]:
    """GFLOP/s for each of `ROWS`."""
    weight = torch.randn(OUTPUTS, INPUTS) * INPUTS**-0.5
    copies = COLD_BYTES // (OUTPUTS * INPUTS * 2)
    linears = [PackedLinear(library, weight, format=format) for _ in range(copies)]
    found = []
    for rows in ROWS:
        states = torch.randn(rows, INPUTS).bfloat16()
        best = float("inf")
        for _ in range(ROUNDS):
            start = time.thread_time()
            for linear in linears:
                linear(states)
            best = min(best, (time.thread_time() - start) / copies)
        found.append(2e-9 * rows * OUTPUTS * INPUTS / best)
    return found


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("instructions", nargs="?", type=InstructionSet, choices=list(InstructionSet))
    chosen = parser.parse_args().instructions
    library = best_library() if chosen is None else native_library(chosen)
    print(f"{library.instructions}, load {os.getloadavg()[0]:.1f}; rows: {', '.join(map(str, ROWS))}")
    for format in WeightFormat:
        print(f"{format.name.lower()}: {', '.join(f'{rate:.0f}' for rate in rates(library, format))} GFLOP/s")


if __name__ == "__main__":
    main()
