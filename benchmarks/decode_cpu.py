"""What a decode step costs behind long contexts, by what the C++ decoder keeps keys and values in.

    python benchmarks/decode_cpu.py --output benchmarks/results/decode-cpu.json

SmolLM2-135M's shape, random weights in int8, one step of `rows` answers of `context` tokens each. Forms take turns
step by step, so that a slow spell of the machine hits both: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from backend_cpu import CONFIG, header, random_weights
from shoplm.batch import Batch, Row
from shoplm.model.native.decoder import NativeDecoder
from shoplm.model.native.library import best_library
from shoplm.model.native.linear import WeightFormat
from shoplm.model.native.pool import NativePool

PAGE_SIZE = 16
KV_FORMATS = ("model", "int8")
SHAPES = ((1, 2048), (8, 512), (8, 2048), (32, 128), (32, 512), (32, 1024))  # rows, context


def filled_pool(pages: int, kv_format: str) -> NativePool:
    """Keys and values of about unit size in every slot."""
    pool = NativePool(best_library().instructions, CONFIG, pages=pages, page_size=PAGE_SIZE, kv_format=kv_format)
    for part in (pool.keys, pool.values):
        part.random_(-127, 128) if part.dtype == torch.int8 else part.normal_()
    for scales in (pool.key_scales, pool.value_scales):
        if scales is not None:
            scales.fill_(1.0 / 64)
    return pool


def step(rows: int, context: int) -> tuple[Batch, np.ndarray, np.ndarray]:
    """The next token of `rows` answers: the batch, its tokens, and which of them are read."""
    pages = context // PAGE_SIZE + 1
    table = np.random.default_rng(0).permutation(rows * pages).astype(np.int32).reshape(rows, pages)
    tokens = np.random.default_rng(1).integers(3, CONFIG.vocab_size, rows)
    positions = np.full(rows, context, np.int32)
    slots = table[:, -1].astype(np.int64) * PAGE_SIZE + context % PAGE_SIZE
    parts = tuple(Row(index, index, 1, table[index], kv_len=context + 1) for index in range(rows))
    return Batch(tokens.astype(np.int32), positions, slots, parts), tokens, np.arange(rows)


def measure(repeats: int) -> list[dict[str, float]]:
    """Milliseconds a step by shape, and how many times as long bf16 takes: medians."""
    weights = random_weights(CONFIG, torch.bfloat16)
    pages = max(rows * (context // PAGE_SIZE + 1) for rows, context in SHAPES)
    decoders = {
        kv_format: NativeDecoder(
            best_library(), CONFIG, weights, None, 4096, filled_pool(pages, kv_format), format=WeightFormat.INT8
        )
        for kv_format in KV_FORMATS
    }
    found = []
    for rows, context in SHAPES:
        batch, tokens, outputs = step(rows, context)
        seconds: dict[str, list[float]] = {kv_format: [] for kv_format in KV_FORMATS}
        for turn in range(repeats + 2):
            for kv_format, decoder in decoders.items():
                start = time.perf_counter()
                decoder.forward(batch, tokens, outputs, {})
                if turn >= 2:
                    seconds[kv_format].append(time.perf_counter() - start)
        ratios = [wide / narrow for wide, narrow in zip(seconds["model"], seconds["int8"], strict=True)]
        medians = {name: round(1e3 * statistics.median(of), 2) for name, of in seconds.items()}
        found.append(
            {"rows": rows, "context": context, "bf16_ms": medians["model"], "int8_ms": medians["int8"]}
            | {"bf16_over_int8": round(statistics.median(ratios), 3)}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = {
        **header(arguments.threads),
        "instructions": str(best_library().instructions),
        "steps": measure(arguments.repeats),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
