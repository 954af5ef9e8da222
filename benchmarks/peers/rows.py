"""What is measured: requests of random token ids, and in which unit. Standard library only: every worker imports it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Ids that are ordinary text in SmolLM2's vocabulary.
TOKEN_IDS = range(1_000, 30_000)
BEAM_WIDTH = 32
TRIE_ITEMS, TRIE_LEVELS = 100_000, (256, 256, 256)
LONGEST_CONTEXT, MOST_REQUESTS = 640, 32  # what every contestant must have room for


@dataclass(frozen=True, slots=True)
class Row:
    """`requests` prompts of `prompt_tokens` at once, `output_tokens` out of each; all share their first `shared`.

    `counted` tokens give a rate; 0 means that the row is reported in seconds. `beams` turns it into one beam search.
    """

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    counted: int = 0
    shared: int = 0
    beams: int = 0
    warm: bool = False  # the prompts of the row before it, once more

    @property
    def unit(self) -> str:
        return "tokens/s" if self.counted else "s"

    def value(self, seconds: float) -> float:
        """The row's result: tokens per second, or seconds."""
        return self.counted / seconds if self.counted else seconds

    def ratio(self, ours: float, peers: float) -> float:
        """How many times better we are; over 1 is ahead, whatever the unit."""
        return ours / peers if self.counted else peers / ours

    def prompts(self, seed: int) -> list[list[int]]:
        """Token ids, equal for all contestants and different in every repeat, so that no cache has seen them."""
        generator = random.Random(f"{seed}/{self.requests}/{self.prompt_tokens}/{self.output_tokens}/{self.shared}")

        def tokens(count: int) -> list[int]:
            return [generator.randrange(TOKEN_IDS.start, TOKEN_IDS.stop) for _ in range(count)]

        prefix = tokens(self.shared)
        return [prefix + tokens(self.prompt_tokens - self.shared) for _ in range(self.requests)]


ROWS = {  # cheap ones first
    row.name: row
    for row in (
        Row("1x128-64", 1, 128, 64, counted=64),
        Row("8x128-64", 8, 128, 64, counted=8 * 64),
        Row("beams", 1, 512, 3, beams=BEAM_WIDTH),
        Row("32x128-64", 32, 128, 64, counted=32 * 64),
        Row("shared-cold", 32, 512, 8, shared=480),
        Row("shared-warm", 32, 512, 8, shared=480, warm=True),
        Row("32x512-1", 32, 512, 1, counted=32 * 512),
        Row("32x512-32", 32, 512, 32, counted=32 * (512 + 32)),
    )
}
WARM_UPS = (Row("warm-up", 4, 64, 4), Row("warm-up-beams", 1, 64, 3, beams=BEAM_WIDTH))


def trie_items() -> list[tuple[int, ...]]:
    """100,000 different items of three tokens each, for peers that search with a constraint."""
    generator = random.Random(0)
    levels = [generator.sample(TOKEN_IDS, size) for size in TRIE_LEVELS]
    items: set[tuple[int, ...]] = set()
    while len(items) < TRIE_ITEMS:
        items.add(tuple(generator.choice(level) for level in levels))
    return sorted(items)


def check_counts(row: Row, outputs: Sequence[Sequence[int]]) -> None:
    """Raises ValueError unless every request of `row` gave exactly the tokens that were asked for."""
    lengths = [len(tokens) for tokens in outputs]
    expected = [row.output_tokens] * row.requests
    if lengths != expected:
        raise ValueError(f"{row.name}: expected {row.requests} x {row.output_tokens} tokens, got lengths {lengths}")
