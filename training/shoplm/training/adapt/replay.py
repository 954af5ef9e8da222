"""The base's own answers to ordinary prompts: what an adapter has to keep saying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from shoplm.engine.direct import DirectRunner
from shoplm.engine.load import load_backend
from shoplm.engine.spec import EngineSpec
from shoplm.prompt import PromptBuilder
from shoplm.request import Generate, Sampling

_AT_ONCE = 48
_MAX_ANSWER_TOKENS = 72
_TEMPERATURE, _TOP_K = 0.8, 50
_KV_BYTES = 1 << 29


class Replay(msgspec.Struct, frozen=True):
    """A prompt and its answer, as tokens behind a prefix."""

    suffix: tuple[int, ...]
    answer: tuple[int, ...]


def replays_of(
    path: Path,
    base: Path,
    builder: PromptBuilder,
    prompts: Sequence[str],
    end_tokens: Sequence[int],
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Replay]:
    """The base's answers to `prompts`, each with the token that ends it where it ends, from `path` where it has them,
    else written there."""
    if path.exists():
        return msgspec.json.decode(path.read_bytes(), type=list[Replay])
    prefix = builder.prefix(None)
    work = []
    for number, prompt in enumerate(prompts):
        sampling = Sampling(_TEMPERATURE, _TOP_K, seed=seed * len(prompts) + number)
        work.append(
            (builder.chat(prefix, [("user", prompt)]), Generate(_MAX_ANSWER_TOKENS, sampling, tuple(end_tokens)))
        )
    backend = load_backend(EngineSpec(str(base), kv_cache_bytes=_KV_BYTES))
    runner, replays = DirectRunner(backend), list[Replay]()
    try:
        for start in range(0, len(work), _AT_ONCE):
            some = work[start : start + _AT_ONCE]
            for (tokens, _), answer in zip(some, runner.run(some), strict=True):
                assert isinstance(answer, tuple)
                end = end_tokens[:1] if len(answer) < _MAX_ANSWER_TOKENS else ()
                replays.append(Replay(tokens[len(prefix.tokens) :], (*map(int, answer), *end)))
            progress(len(replays), len(work))
    finally:
        backend.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(msgspec.json.encode(replays))
    temporary.replace(path)
    return replays
