"""Many prompts of one customer as few passes: cut-offs share the history before them.

A prompt is `prefix + suffix`. While the prompt builder drops no further basket, an earlier cut-off's prefix is the
beginning of a later one's; so one pass over the longest serves all of them, each suffix attending to its own part.
When baskets were dropped in between, the earlier prefix starts elsewhere and needs a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from shoplm.engine.batch import Batch, EmbedReadout, Row
from shoplm.history import History
from shoplm.prompt import Prefix, PromptBuilder
from shoplm.training.samples import Sample, Task


@dataclass(slots=True)
class Pack:
    """One pass: a prefix, and the suffixes that attend to its first tokens."""

    prefix: tuple[int, ...]
    samples: list[Sample] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of each sample's own prefix
    suffixes: list[tuple[int, ...]] = field(default_factory=list)

    def holds(self, prefix: tuple[int, ...]) -> bool:
        """Whether `prefix` is the beginning of this one."""
        return self.prefix[: len(prefix)] == prefix

    def add(self, sample: Sample, length: int, suffix: tuple[int, ...]) -> None:
        self.samples.append(sample)
        self.lengths.append(length)
        self.suffixes.append(suffix)

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.suffixes))


def pack_samples(builder: PromptBuilder, history: History, samples: Sequence[Sample]) -> list[Pack]:
    """Packs for the required samples, and those others that fit into one of them; the rest is left out."""
    packs: list[Pack] = []
    prompts: dict[float, tuple[History, Prefix]] = {}

    def place(sample: Sample) -> None:
        if sample.moment not in prompts:
            known = history.before(sample.moment)
            prompts[sample.moment] = known, builder.prefix(known)
        known, prefix = prompts[sample.moment]
        prompt = (builder.recommend if sample.task == Task.RECOMMEND else builder.predict)(prefix, known)
        length = len(prefix.tokens)
        for pack in packs:
            if pack.holds(prefix.tokens):
                pack.add(sample, length, prompt[length:])
                return
        if sample.required:
            packs.append(Pack(prefix.tokens))
            packs[-1].add(sample, length, prompt[length:])

    # Latest first: a later prefix is the longer one while nothing is dropped.
    ordered = sorted(samples, key=lambda sample: (not sample.required, -sample.moment, sample.task))
    for sample in ordered:
        place(sample)
    return packs


def pack_batch(pack: Pack) -> Batch:
    """The pack as one step for a backend with pages of one token: the prefix is one row, each suffix another that
    reads the prefix's first pages and its own. The readouts are those of rows 1, 2, …, in the order of `samples`."""
    count = len(pack.prefix)
    tokens, positions = [*pack.prefix], [*range(count)]
    rows = [Row(0, 0, count, np.arange(count, dtype=np.int32), count)] if count else []
    for index, (length, suffix) in enumerate(zip(pack.lengths, pack.suffixes, strict=True)):
        start = len(tokens)
        own = np.arange(start, start + len(suffix), dtype=np.int32)
        rows.append(
            Row(
                state_slot=index + 1,
                query_start=start,
                query_len=len(suffix),
                pages=np.concatenate([np.arange(length, dtype=np.int32), own]),
                kv_len=length + len(suffix),
                readout=EmbedReadout(),
            )
        )
        tokens += suffix
        positions += range(length, length + len(suffix))
    total = len(tokens)
    return Batch(
        np.array(tokens, np.int32), np.array(positions, np.int32), np.arange(total, dtype=np.int64), tuple(rows)
    )
