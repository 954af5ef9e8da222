"""Many prompts of one customer as few passes: cut-offs share the history before them.

A prompt is `prefix + suffix`. While the prompt builder drops no further basket, an earlier cut-off's prefix is the
beginning of a later one's; so one pass over the longest serves all of them, each suffix attending to its own part
(`passes`). When baskets were dropped in between, the earlier prefix starts elsewhere and needs a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoplm.history import History
from shoplm.prompt import Prefix, PromptBuilder
from shoplm.training.samples import Sample, Task


@dataclass(slots=True)
class Pack:
    """A prefix, and the suffixes that attend to its first tokens."""

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
