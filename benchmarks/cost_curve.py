"""What a step costs on this machine: the backend that a server takes on a CPU, under a mixed load, and the
coefficients that the scheduler learns.

    python benchmarks/cost_curve.py --seconds 60 --out benchmarks/results/cost-cpu.json

Writes what `shoplm simulate --cost` reads. SmolLM2-135M's shape with random weights and token ids: the time of a step
depends on neither. `error` is how far the predictions were from the steps of the second half, each predicted before
it ran.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from backend_cpu import CONFIG, header, random_weights
from shoplm.engine.engine import Engine
from shoplm.model.native.backend import NativeBackend, native_refusal
from shoplm.model.shop_weights import random_trie
from shoplm.model.torch_backend import TorchBackend
from shoplm.request import Generate, Request, Select, Service, Task, token_ids
from shoplm.scheduler.config import SchedulerConfig

TARGET_RUNNING = (1, 2, 4, 8, 16, 24)  # requests at once; each for a while, so that all sizes of a step occur


class Load:
    """Requests of the three services about a few customers; some histories are in the cache, some are not."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self._histories = [self._tokens(300) for _ in range(12)]
        self._number = 0

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(3, CONFIG.vocab_size) for _ in range(count))

    def submit(self) -> None:
        """One request."""
        draw = self._random
        history = draw.choice(self._histories) if draw.random() < 0.5 else self._tokens(draw.randrange(50, 600))
        kind = draw.random()
        service = Service.CHAT
        task: Task = Generate(draw.randrange(8, 48))
        if kind < 0.5:
            service, task = Service.RECOMMENDATION, Select(10, 32, trie="flat")
        elif kind < 0.55:
            service, task = Service.RECOMMENDATION, Select(10, 32, trie="catalogue")
        self._number += 1
        tokens = token_ids((*history, *self._tokens(draw.randrange(2, 30))))
        self._engine.submit(Request(f"r{self._number}", service, tokens, task, arrival_seconds=time.monotonic()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tries = [
        random_trie("catalogue", items=100_000, level_sizes=(256,) * 3, hidden_size=576, seed=0),
        random_trie("flat", items=20_000, level_sizes=(20_000,), hidden_size=576, seed=0),
    ]
    weights, is_native = random_weights(CONFIG, torch.bfloat16), native_refusal(CONFIG, torch.bfloat16, 16) is None
    kind = NativeBackend if is_native else TorchBackend
    backend = kind(CONFIG, weights, tries=tries, pages=2400, state_slots=64)
    engine = Engine(backend, SchedulerConfig())
    load = Load(engine, arguments.seed)
    errors: list[float] = []
    steps = 0
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < arguments.seconds:
        at_once = TARGET_RUNNING[int(elapsed / arguments.seconds * 5 * len(TARGET_RUNNING)) % len(TARGET_RUNNING)]
        while len(engine.scheduler.alive()) < at_once:
            load.submit()
        engine.step()
        steps += 1
        report = engine.report() if steps % 50 == 0 else None
        if report is not None and elapsed > arguments.seconds / 2:
            errors.extend(report.cost_errors)
    each = engine.scheduler.cost.coefficients
    result = {
        "step_seconds": each.step,
        "token_seconds": each.token,
        "kv_token_seconds": each.kv,
        "row_seconds": each.row,
        "error": {"median": statistics.median(errors), "p90": statistics.quantiles(errors, n=10)[-1]},
        "steps": steps,
        **header(arguments.threads),
        "model": "SmolLM2-135M's shape, bfloat16",
        "backend": backend.info.name,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
