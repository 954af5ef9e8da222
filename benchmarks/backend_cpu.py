"""Throughput of the CPU backends alone, without engine and gRPC: SmolLM2-135M's shape, random weights and token ids.

    python benchmarks/backend_cpu.py --threads 2 --repeats 3 --contestants torch native native-int8

Prints one JSON object: machine, versions, and for each contestant and row the median of the repeats. Contestants take
turns row by row, so that a slow spell of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from shoplm.bench.report import machine, versions
from shoplm.engine.direct import DirectRunner
from shoplm.model.backend import Backend
from shoplm.model.config import ModelConfig, RopeConfig
from shoplm.model.native.backend import NativeBackend, native_refusal
from shoplm.model.native.linear import WeightFormat
from shoplm.model.shop_weights import random_trie
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import DecoderWeights, LayerWeights
from shoplm.request import Generate, Select, Task

NATIVE = {"native": WeightFormat.BF16, "native-int8": WeightFormat.INT8, "native-int4": WeightFormat.INT4}
LAYERS = 30
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=LAYERS,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(100000.0),
    uses_rope=(True,) * LAYERS,
    sliding_windows=(None,) * LAYERS,
    max_positions=8192,
    tied_head=True,
    qkv_bias=False,
    output_bias=False,
    qk_norm=False,
    bos_token_id=1,
    eos_token_ids=(2,),
)


def random_weights(config: ModelConfig, dtype: torch.dtype) -> DecoderWeights:
    """Weights of a typical scale, the same on every machine."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight: torch.Tensor = torch.randn(rows, columns, generator=generator) * float(columns) ** -0.5
        return weight.to(dtype)

    hidden, middle = config.hidden_size, config.intermediate_size
    ones = torch.ones(hidden, dtype=dtype)
    layers = tuple(
        LayerWeights(
            input_norm=ones,
            qkv=matrix(config.qkv_size, hidden),
            qkv_bias=None,
            query_norm=None,
            key_norm=None,
            output=matrix(hidden, config.num_heads * config.head_dim),
            output_bias=None,
            mlp_norm=ones,
            gate_up=matrix(2 * middle, hidden),
            down=matrix(hidden, middle),
        )
        for _ in range(config.num_layers)
    )
    embedding = matrix(config.vocab_size, hidden)
    return DecoderWeights(embedding, layers, ones, embedding)


def prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids."""
    tokens: list[list[int]] = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (count, length)).tolist()
    return tokens


def seconds(backend: Backend, requests: Sequence[Sequence[int]], task: Task) -> float:
    """Wall-clock time of one run of all requests together."""
    runner = DirectRunner(backend)
    start = time.perf_counter()
    runner.run([(tokens, task) for tokens in requests])
    return time.perf_counter() - start


def make(contestant: str, dtype: torch.dtype) -> Backend:
    """A backend over random weights and a catalogue of 100,000 items. Raises SystemExit where it cannot run here."""
    weights = random_weights(CONFIG, dtype)
    tries = [random_trie("catalogue", items=100_000, level_sizes=(256,) * 3, hidden_size=576, seed=0)]
    if contestant == "torch":
        return TorchBackend(CONFIG, weights, tries=tries, pages=1200, state_slots=32)
    refusal = native_refusal(CONFIG, dtype, 16)
    if refusal is not None:
        raise SystemExit(f"{contestant} cannot run here: {refusal}")
    return NativeBackend(CONFIG, weights, tries=tries, pages=1200, state_slots=32, format=NATIVE[contestant])


def measure(backends: Mapping[str, Backend], repeats: int) -> dict[str, dict[str, float]]:
    """All rows by contestant, median of `repeats`."""
    search = Select(count=10, beam_width=32, trie="catalogue")
    rows: dict[str, tuple[int, int, Task, int]] = {  # requests, prompt tokens, task, tokens that are counted
        "prompt_tokens_per_second_32x512_1": (32, 512, Generate(1), 32 * 512),
        "output_tokens_per_second_32x128_64": (32, 128, Generate(64), 32 * 64),
        "output_tokens_per_second_8x128_64": (8, 128, Generate(64), 8 * 64),
        "output_tokens_per_second_1x128_64": (1, 128, Generate(64), 64),
        "searches_per_second_512_beams_32": (1, 512, search, 1),
    }
    rates: dict[str, dict[str, list[float]]] = {name: {row: [] for row in rows} for name in backends}
    for backend in backends.values():
        seconds(backend, prompts(2, 64), Generate(4))
    for _ in range(repeats):
        for row, (count, length, task, counted) in rows.items():
            for name, backend in backends.items():
                rates[name][row].append(counted / seconds(backend, prompts(count, length), task))
    return {
        name: {row: round(statistics.median(values), 2) for row, values in of_rows.items()}
        for name, of_rows in rates.items()
    }


def header(threads: int) -> dict[str, Any]:
    """The machine, as it is now, and the versions: before anything is measured."""
    return {"machine": {**machine(), "threads": threads}, "versions": versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--contestants", nargs="+", choices=("torch", *NATIVE), default=["torch"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backends = {name: make(name, getattr(torch, arguments.dtype)) for name in arguments.contestants}
    report = {
        **header(arguments.threads),
        "dtype": arguments.dtype,
        "model": "SmolLM2-135M's shape, random weights",
        "rows": measure(backends, arguments.repeats),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
