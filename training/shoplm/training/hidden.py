"""The base's hidden states at every sample, computed once and kept in shards, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from shoplm.training.histories import Histories
from shoplm.training.packing import Pack, pack_samples
from shoplm.training.reader import Reader
from shoplm.training.samples import HiddenTable, samples_of
from shoplm.training.timeline import Timeline

SHARD_CUSTOMERS = 32

Progress = Callable[[int, int, int], None]  # customers done, customers, tokens computed


class HiddenStates:
    """Hidden states of a shop's customers, in a seeded random order, so that any number of them is a fair sample."""

    def __init__(
        self,
        folder: Path,
        reader: Reader,
        histories: Histories,
        timeline: Timeline,
        identity: dict[str, object],
        seed: int,
    ) -> None:
        """`folder` keeps the shards; those of another `identity` (data, base, prompt, seed) are not used."""
        self._reader = reader
        self._histories = histories
        self._timeline = timeline
        self._order = np.random.default_rng(seed).permutation(len(histories))
        text = json.dumps({**identity, "seed": seed, "timeline": msgspec.to_builtins(timeline)}, sort_keys=True)
        self.folder = folder / f"hidden-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokens_computed = 0
        self.seconds = 0.0

    def compute(self, customers: int, deadline: float | None, progress: Progress) -> tuple[HiddenTable, int]:
        """The states of the first `customers` of the order, from shards where they exist. After `deadline`
        (time.monotonic) no new shard is begun, beyond the first. Also returns how many customers were read."""
        shards: list[dict[str, torch.Tensor]] = []
        customers, read = min(customers, len(self._order)), 0
        for start in range(0, customers, SHARD_CUSTOMERS):
            chosen = self._order[start : min(start + SHARD_CUSTOMERS, customers)]
            path = self.folder / f"{start:07d}-{len(chosen)}.safetensors"
            if not path.exists():
                if deadline is not None and time.monotonic() > deadline and shards:
                    break
                self._write(path, chosen.tolist())
            shards.append(load_file(path))
            read = start + len(chosen)
            progress(read, customers, self.tokens_computed)
        columns = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        table = HiddenTable(
            customer=columns["customer"].numpy(),
            moment=columns["moment"].numpy(),
            task=columns["task"].numpy(),
            use=columns["use"].numpy(),
            hidden=columns["hidden"].float().numpy(),
        )
        return table, read

    def estimate_tokens(self, sampled: int = 24) -> float:
        """Tokens per customer, from the first of the order."""
        chosen = self._order[:sampled].tolist()
        return float(np.mean([sum(pack.tokens for pack in self._packs(customer)) for customer in chosen]))

    def measure_speed(self, customers: int) -> float:
        """Tokens per second on this machine, of the first `customers`; one pack goes before, to warm up."""
        begun, tokens = time.perf_counter(), 0
        packs = [pack for customer in self._order[:customers].tolist() for pack in self._packs(customer)]
        packing = time.perf_counter() - begun
        self._reader.read(packs[:1])
        begun = time.perf_counter()
        self._reader.read(packs)
        tokens = sum(pack.tokens for pack in packs)
        return max(1.0, tokens / (time.perf_counter() - begun + packing))

    def _packs(self, customer: int) -> list[Pack]:
        history = self._histories[customer]
        return pack_samples(self._reader.builder, history, samples_of(history, self._timeline))

    def _write(self, path: Path, customers: Sequence[int]) -> None:
        begun = time.perf_counter()
        packs = [(customer, pack) for customer in customers for pack in self._packs(customer)]
        samples = [(customer, sample) for customer, pack in packs for sample in pack.samples]
        bare = HiddenTable.bare(samples)
        hidden = self._reader.read([pack for _, pack in packs])
        columns = {name: torch.from_numpy(getattr(bare, name)) for name in ("customer", "moment", "task", "use")}
        # bf16 loses nothing of what a bf16 model gives, and 0.4 % of what an fp32 one does.
        temporary = path.with_suffix(".partial")
        save_file({**columns, "hidden": hidden.to(torch.bfloat16)}, temporary)
        temporary.replace(path)
        self.tokens_computed += sum(pack.tokens for _, pack in packs)
        self.seconds += time.perf_counter() - begun
