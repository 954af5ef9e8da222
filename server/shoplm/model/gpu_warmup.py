"""Work before the first request, so that it does not wait for Triton's compiler: one request of each kind.

Kernels are specialised on what a model and its catalogues fix, never on lengths, so a few requests compile nearly all
of them: a prompt long enough for every split and merge, a short one behind it, greedy and random draws, each catalogue
at the usual widths with and without a filter, and explanations. What is left compiles where it is first asked for.
"""

from __future__ import annotations

import logging
import time

from shoplm.model.backend import Backend
from shoplm.model.direct import DirectRunner
from shoplm.model.gpu import memory_for
from shoplm.request import Explain, Generate, HeadValues, ItemScores, Predict, Sampling, Select, Task

LONGEST = 2100  # tokens: more than one split of a short chunk on every card
WIDTHS = (16, 32, 64, 128)  # beams and items: the powers of two that narrower ones are rounded up to
_FORKS = ((), ((0, 1),))  # what they hide of a history

log = logging.getLogger("shoplm.warmup")


def warm_up(backend: Backend, max_lanes: int) -> float:
    """Run the requests on pages that nobody uses yet; returns seconds. What they leave in the pages is never read.

    `max_lanes` bounds the lanes of a step: wider searches are left out. Raises ConfigurationError where the GPU's
    memory does not suffice for a step.
    """
    start = time.perf_counter()
    info = backend.info
    longest = min(LONGEST, info.max_context_tokens - 4, (info.pages - 1) * info.page_size - 4)
    prompt = [index % info.vocab_size for index in range(longest)]
    runner = DirectRunner(backend, chunk_tokens=max(1, longest - 3), step_tokens=longest)
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
                if width <= items and backend.lanes(select) <= max_lanes:
                    tasks.append(select)
    with memory_for(f"a step of {longest} tokens", "lower kv_cache_mib or max_step_tokens"):
        runner.run([(prompt, Generate(1))])
        for task in tasks:
            runner.run([(prompt[:5], task)])
    seconds = time.perf_counter() - start
    log.info("warmed up with %d requests in %.1f s", len(tasks) + 1, seconds)
    return seconds
