"""Work before the first request, so that it does not wait for Triton's compiler: one request of each kind.

Kernels are specialised on what a model and its catalogues fix, never on lengths, so a few requests compile nearly all
of them: a prompt long enough for every split and merge, a short chunk and single tokens behind it, greedy and random
draws, each catalogue at the usual widths with and without a filter, and explanations. What is left compiles where it is
first asked for. A full step of several prompts comes first: it shows whether the memory suffices.
"""

from __future__ import annotations

import logging
import time

from shoplm.engine.direct import DirectRunner
from shoplm.model.backend import Backend, BackendInfo
from shoplm.model.gpu import memory_for
from shoplm.request import Explain, Generate, HeadValues, ItemScores, Predict, Sampling, Select, Task

LONGEST = 2100  # tokens: more than one split of a short chunk on every card
BEHIND = 2  # tokens of the prompt in a step of their own: a short chunk however many heads share a key
PROMPTS = 8  # of a full step, at least
WIDTHS = (16, 32, 64, 128)  # beams and items: the powers of two that narrower ones are rounded up to
_FORKS = ((), ((0, 1),))  # what they hide of a history

log = logging.getLogger("shoplm.warmup")


def warm_up(backend: Backend, max_step_tokens: int) -> float:
    """Run the requests on pages that nobody uses yet; returns seconds. What they leave in the pages is never read.

    `max_step_tokens` bounds the lanes of a step as well: wider searches are left out. Raises ConfigurationError where
    the GPU's memory does not suffice for a step.
    """
    start = time.perf_counter()
    info = backend.info
    longest = max(1, min(LONGEST, info.max_context_tokens - 4, (info.pages - 1) * info.page_size - 4))
    steps = max(1, -(-(longest - BEHIND) // max_step_tokens))
    chunk = max(1, (longest - BEHIND) // steps)
    prompt = _tokens(info, steps * chunk + BEHIND)
    runner = DirectRunner(backend, chunk_tokens=chunk, step_tokens=max_step_tokens)
    drawn = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=1)
    tasks: list[Task] = [Generate(2), Generate(2, drawn), Generate(2, Sampling(temperature=0.8))]
    if info.feature_count:
        features = (0.0,) * info.feature_count
        tasks += [Predict(features), Explain(1, _FORKS, HeadValues((features,) * len(_FORKS)))]
    tasks += [Explain(1, _FORKS, ItemScores((0,), name)) for name, depth in info.trie_depths.items() if depth == 1]
    for name, items in info.trie_items.items():
        for width in WIDTHS:
            for excluded in ((), (0,)):
                select = Select(width, width, trie=name, own_items=(0,), own_counts=(1.0,), exclude_items=excluded)
                if width <= items and backend.lanes(select) <= max_step_tokens:
                    tasks.append(select)
    with memory_for(f"a step of {max_step_tokens} tokens", "lower kv_cache_mib or max_step_tokens"):
        filled = DirectRunner(backend, chunk_tokens=max_step_tokens, step_tokens=max_step_tokens)
        filled.run(_full_step(info, longest, max_step_tokens))
        runner.run([(prompt, Generate(2))])
        for task in tasks:
            runner.run([(prompt[:5], task)])
    seconds = time.perf_counter() - start
    log.info("warmed up with %d requests in %.1f s", len(tasks) + 2, seconds)
    return seconds


def _full_step(info: BackendInfo, longest: int, tokens: int) -> list[tuple[list[int], Task]]:
    """Prompts that fill a step of so many tokens, as far as there is room for them."""
    count = min(max(PROMPTS, -(-tokens // longest)), tokens, info.state_slots, info.pages)
    length = min(-(-tokens // count), longest, info.pages // count * info.page_size)
    return [(_tokens(info, length), Generate(1))] * count


def _tokens(info: BackendInfo, count: int) -> list[int]:
    return [index % info.vocab_size for index in range(count)]
