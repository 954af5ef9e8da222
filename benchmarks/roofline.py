"""The floor of every kernel: the least bytes and operations it can do with, and the time they take on a card.

    python benchmarks/roofline.py                      every op and model shape on every card
    python benchmarks/roofline.py --model qwen3-1.7b --card H100 --json

A kernel's time is at least `max(bytes / bandwidth, tensor operations / tensor peak, vector operations / fp32 peak)`
(roofline model, Williams et al. 2009). Bytes count every input element once and every output element once, from and to
device memory, with nothing in cache before and everything reused after: no kernel can do better on cold data. The floor
divided by a measured time is the fraction of the hardware that was used. Launch overhead is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

INDEX_BYTES = 4  # int32
SCALE_BYTES = 4  # fp32, per (token, head)


@dataclass(frozen=True)
class Card:
    """Peak numbers of a data sheet, dense (no structured sparsity), boost clock."""

    name: str
    memory_gb_per_second: float
    tensor_tflops: float  # fp16 and bf16 products, fp32 sums
    fp8_tflops: float  # equal to tensor_tflops where there are no fp8 tensor cores
    vector_tflops: float  # fp32, fused multiply-add counted as two
    device: str  # as the driver names the card that the numbers are of


CARDS = {
    card.name: card
    for card in (
        # NVIDIA A100 datasheet (2021), 80 GB SXM: 2,039 GB/s; 312 TFLOPS bf16; 19.5 TFLOPS fp32; no fp8.
        Card("A100", 2039, 312, 312, 19.5, "NVIDIA A100-SXM4-80GB"),
        # NVIDIA L4 datasheet (2023): 300 GB/s; 242 and 485 TFLOPS bf16 and fp8 with sparsity, half dense; 30.3 fp32.
        Card("L4", 300, 121, 242.5, 30.3, "NVIDIA L4"),
        # NVIDIA H100 datasheet (2023), SXM5: 3.35 TB/s; 1,979 and 3,958 TFLOPS with sparsity, half dense; 67 fp32.
        Card("H100", 3350, 989.5, 1979, 67, "NVIDIA H100 80GB HBM3"),
        # NVIDIA H200 datasheet (2024), SXM: 4.8 TB/s; compute as H100.
        Card("H200", 4800, 989.5, 1979, 67, "NVIDIA H200"),
        # NVIDIA HGX B200 product page (2025), one of eight GPUs: 8 TB/s; 4.5 and 9 PFLOPS with sparsity, half dense;
        # fp32 600 TFLOPS for eight.
        Card("B200", 8000, 2250, 4500, 75, "NVIDIA B200"),
    )
}


def card_of(device: str) -> Card | None:
    """The card that the driver calls `device`. None for any other: a PCIe or NVL board, less memory or a part of a card
    (MIG) has other peaks under nearly the same name."""
    return next((card for card in CARDS.values() if card.device == device), None)


@dataclass(frozen=True)
class ModelShape:
    """What the kernels see of a model."""

    name: str
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    features: int  # of the feed-forward's inner layer
    vocab: int


# The config.json of each checkpoint.
MODELS = {
    model.name: model
    for model in (
        ModelShape("smollm2-135m", 576, 9, 3, 64, 1536, 49_152),
        ModelShape("qwen2.5-0.5b", 896, 14, 2, 64, 4864, 151_936),
        ModelShape("qwen3-1.7b", 2048, 16, 8, 128, 6144, 151_936),
        ModelShape("qwen2.5-7b", 3584, 28, 4, 128, 18_944, 152_064),
    )
}


@dataclass(frozen=True)
class Work:
    """The least that a call must move and compute."""

    bytes: int
    tensor_flops: int = 0  # on tensor cores; a multiply-add is two
    vector_flops: int = 0  # on fp32 units

    def floor_microseconds(self, card: Card, *, fp8: bool = False) -> float:
        """Least time on `card`; `fp8`: the products take fp8 operands."""
        tensor = card.fp8_tflops if fp8 else card.tensor_tflops
        seconds = max(
            self.bytes / (card.memory_gb_per_second * 1e9),
            self.tensor_flops / (tensor * 1e12),
            self.vector_flops / (card.vector_tflops * 1e12),
        )
        return seconds * 1e6

    def bound_by(self, card: Card) -> str:
        """`memory`, `tensor` or `vector`: which of the three is the floor."""
        times = {
            "memory": self.bytes / card.memory_gb_per_second,
            "tensor": self.tensor_flops / card.tensor_tflops / 1e3,
            "vector": self.vector_flops / card.vector_tflops / 1e3,
        }
        return max(times, key=lambda name: times[name])


def kv_bytes(model: ModelShape, tokens: int, element_bytes: int) -> int:
    """K and V of `tokens` tokens of one layer, scales of one-byte pools included."""
    scales = 2 * SCALE_BYTES if element_bytes == 1 else 0
    return tokens * model.kv_heads * (2 * model.head_dim * element_bytes + scales)


def query_bytes(model: ModelShape, tokens: int, element_bytes: int = 2) -> int:
    """Queries of `tokens` tokens; the attention output is as large."""
    return tokens * model.q_heads * model.head_dim * element_bytes


def prefill(model: ModelShape, new: int, cached: int = 0, rows: int = 1, cache_bytes: int = 2) -> Work:
    """`rows` causal chunks of `new` tokens behind `cached` ones: QK and PV over the pairs that the mask leaves."""
    pairs = new * cached + new * (new + 1) // 2
    moved = 2 * query_bytes(model, new) + kv_bytes(model, cached + new, cache_bytes)
    return Work(rows * moved, rows * 4 * pairs * model.head_dim * model.q_heads)


def decode(model: ModelShape, rows: int, kv_len: int, cache_bytes: int = 2) -> Work:
    """One new token per row that reads `kv_len` tokens."""
    return prefill(model, 1, kv_len - 1, rows, cache_bytes)


def beam(model: ModelShape, groups: int, width: int, prompt: int, step: int, cache_bytes: int = 2) -> Work:
    """`width` beams per group: the prompt's KV once per group, the step + 1 own tokens of each beam once each."""
    keys = prompt + step + 1
    own = kv_bytes(model, width * (step + 1), cache_bytes)
    parents = width * step * INDEX_BYTES
    moved = kv_bytes(model, prompt, cache_bytes) + own + parents + 2 * query_bytes(model, width)
    return Work(groups * moved, groups * 4 * width * keys * model.head_dim * model.q_heads)


def merge(model: ModelShape, rows: int, splits: int) -> Work:
    """fp32 partial outputs and log-sum-exps of every split, one output."""
    partial = rows * splits * model.q_heads * (model.head_dim + 1)
    return Work(4 * partial + query_bytes(model, rows), vector_flops=2 * partial)


def forks(model: ModelShape, rows: int, new: int, history: int, cache_bytes: int = 2) -> Work:
    """`new` tokens of forks per explained prompt, which read the history, its KV once per prompt; their own keys are
    few. A bit for each key that each might read."""
    keys = history + new
    moved = 2 * query_bytes(model, new) + kv_bytes(model, keys, cache_bytes) + new * keys // 8
    return Work(rows * moved, rows * 4 * new * history * model.head_dim * model.q_heads)


def span_mass(model: ModelShape, rows: int, kv_len: int, spans: int, cache_bytes: int = 2) -> Work:
    """Keys only, once per explained row; one sum per (row, KV head, span)."""
    keys = kv_bytes(model, kv_len, cache_bytes) // 2
    small = model.q_heads * 4 + spans * (2 * INDEX_BYTES + 4 * model.kv_heads)
    moved = rows * (keys + query_bytes(model, 1) + small)
    return Work(moved, rows * 2 * kv_len * model.head_dim * model.q_heads)


def kv_write(model: ModelShape, tokens: int, cache_bytes: int = 2) -> Work:
    """q read and written, k and v read and stored, one fp32 row of the cos and sin tables, position and slot."""
    projections = 2 * query_bytes(model, tokens) + kv_bytes(model, tokens, 2)
    stored = kv_bytes(model, tokens, cache_bytes)
    indices = tokens * (4 * model.head_dim + INDEX_BYTES + 8)
    rotated = tokens * (model.q_heads + model.kv_heads) * model.head_dim
    return Work(projections + stored + indices, vector_flops=3 * rotated)


def norm(model: ModelShape, tokens: int, *, residual: bool = True) -> Work:
    """x read, output written, with a residual that also is read and written; the weight once."""
    elements = tokens * model.hidden
    return Work(2 * ((4 if residual else 2) * elements + model.hidden), vector_flops=(5 if residual else 4) * elements)


def swiglu(model: ModelShape, tokens: int) -> Work:
    """gate and up read, output written."""
    elements = tokens * model.features
    return Work(2 * 3 * elements, vector_flops=4 * elements)


def weight_only(outputs: int, inputs: int, rows: int, bits: int) -> Work:
    """The weight in 8 bits with a scale of 4 bytes per output, or in 4 with a scale and a low of 2 bytes each per 32
    inputs; x read, output written."""
    return Work(_packed_bytes(outputs, inputs, bits) + 2 * rows * (inputs + outputs), 2 * rows * outputs * inputs)


def unpack(outputs: int, inputs: int, bits: int) -> Work:
    """The weight read and written in 16 bits; a product and, in 4 bits, a sum an element."""
    elements = outputs * inputs
    return Work(_packed_bytes(outputs, inputs, bits) + 2 * elements, vector_flops=(1 if bits == 8 else 2) * elements)


def _packed_bytes(outputs: int, inputs: int, bits: int) -> int:
    return outputs * inputs * bits // 8 + 4 * outputs * (1 if bits == 8 else inputs // 32)


def quantise_rows(rows: int, columns: int) -> Work:
    """x read in 16 bits and written in 8, a scale of 4 bytes a row; four operations an element."""
    return Work(3 * rows * columns + 4 * rows, vector_flops=4 * rows * columns)


def beam_step(groups: int, live: int, children: int, select: int, *, filtered: bool = True) -> Work:
    """`live` beams per group with `children` candidates each: the logit of each, and code, item range and prefix sum of
    each once for all groups, which stand at the same nodes under the same filter."""
    candidates = groups * live * children
    tables = live * children * (INDEX_BYTES + (3 * INDEX_BYTES if filtered else 0))
    written = groups * select * 4 * INDEX_BYTES
    read = groups * live * (2 * INDEX_BYTES + 4)
    return Work(4 * candidates + tables + written + read, vector_flops=4 * candidates)


def sample(model: ModelShape, rows: int) -> Work:
    """Every logit once, scaled, perturbed and compared (the noise itself is integer work and not counted)."""
    tokens = rows * model.vocab
    return Work(2 * tokens, vector_flops=4 * tokens)


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    op: str
    model: str
    shape: str
    work: Work


def entries(model: ModelShape) -> list[Entry]:
    """Each op at the shapes that the targets are stated for."""
    cases: list[tuple[str, str, Work]] = [
        ("prefill", "1 x 8192", prefill(model, 8192)),
        ("prefill", "8 x 512 behind 3584", prefill(model, 512, 3584, rows=8)),
        ("decode", "64 x 4096", decode(model, 64, 4096)),
        ("decode", "64 x 4096 int8", decode(model, 64, 4096, cache_bytes=1)),
        ("beam", "1 x 256 beams, prompt 1000, step 2", beam(model, 1, 256, 1000, 2)),
        ("beam", "8 x 256 beams, prompt 5000, step 2", beam(model, 8, 256, 5000, 2)),
        ("merge", "64 x 8 splits", merge(model, 64, 8)),
        ("forks", "1 x 33 forks x 4 tokens behind 1024", forks(model, 1, 132, 1024)),
        ("span_mass", "8 x 4096, 64 spans", span_mass(model, 8, 4096, 64)),
        ("kv_write", "64 tokens", kv_write(model, 64)),
        ("kv_write", "8192 tokens", kv_write(model, 8192)),
        ("norm", "8192 tokens", norm(model, 8192)),
        ("swiglu", "8192 tokens", swiglu(model, 8192)),
        ("weight_only", "64 rows, gate and up, int8", weight_only(2 * model.features, model.hidden, 64, 8)),
        ("weight_only", "64 rows, gate and up, int4", weight_only(2 * model.features, model.hidden, 64, 4)),
        ("unpack", "gate and up, int8", unpack(2 * model.features, model.hidden, 8)),
        ("unpack", "gate and up, int4", unpack(2 * model.features, model.hidden, 4)),
        ("quantise_rows", "8192 tokens", quantise_rows(8192, model.features)),
        ("beam_step", "1 x 1M items, top 256", beam_step(1, 1, 10**6, 256)),
        ("beam_step", "1 x 256 beams x 256 children", beam_step(1, 256, 256, 256)),
        ("sample", "64 rows", sample(model, 64)),
    ]
    return [Entry(op, model.name, shape, work) for op, shape, work in cases]


def table(models: Sequence[ModelShape], cards: Sequence[Card]) -> str:
    """The floors as aligned text, microseconds; the letter says what bounds: memory, tensor or vector."""
    head = f"{'model':14s} {'op':11s} {'shape':36s} {'MB':>9s} {'GFLOP':>9s}"
    lines = [head + "".join(f"{card.name:>12s}" for card in cards)]
    for model in models:
        for entry in entries(model):
            work = entry.work
            flops = (work.tensor_flops + work.vector_flops) / 1e9
            start = f"{entry.model:14s} {entry.op:11s} {entry.shape:36s} {work.bytes / 1e6:9.2f} {flops:9.2f}"
            floors = (f"{work.floor_microseconds(card):10.2f} {work.bound_by(card)[0]}" for card in cards)
            lines.append(start + "".join(floors))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="default: all")
    parser.add_argument("--card", choices=sorted(CARDS), action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    options = parser.parse_args(arguments)
    models = [MODELS[name] for name in options.model or MODELS]
    cards = [CARDS[name] for name in options.card or CARDS]
    if not options.json:
        print(table(models, cards))
        return 0
    for model in models:
        for entry in entries(model):
            floors = {card.name: entry.work.floor_microseconds(card) for card in cards}
            print(json.dumps(asdict(entry) | {"floor_microseconds": floors}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
