"""EngineService: raw token ids in and out, for benchmarks and debugging. Only with `--engine-api`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from shoplm.api.chat import MAX_TEMPERATURE
from shoplm.api.core import Context, Core
from shoplm.api.validation import Violations, nearest, quote
from shoplm.request import FinishedOutput, Generate, Sampling, Select, Service, Timings
from shoplm.v1 import engine_pb2 as pb
from shoplm.v1.engine_pb2_grpc import EngineServiceServicer

_CACHE_ROOT = "engine-api"  # what raw callers compute is never shared with customers


class EngineService(EngineServiceServicer):
    """See protos/shoplm/v1/engine.proto. Limits on the answer's length are the context's alone."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        violations = Violations()
        self._check_tokens(request.token_ids, violations)
        if request.max_tokens < 1:
            violations.add("max_tokens", "is 0, expected at least 1")
        violations.number("temperature", request.temperature, 0.0, MAX_TEMPERATURE)
        violations.raise_if_any()
        self._core.check_prompt("token_ids", len(request.token_ids), produced=1)
        room = self._core.ready().max_context_tokens - len(request.token_ids)
        setting = f"max_context_tokens or kv_cache_mib, less {len(request.token_ids)} token_ids"
        violations.at_most("max_tokens", request.max_tokens, room, setting)
        violations.raise_if_any()
        stops = () if request.ignore_eos else self._core.served.tokenizer.end_token_ids
        task = Generate(request.max_tokens, Sampling(temperature=request.temperature, seed=request.seed), stops)
        work = self._core.request(Service.CHAT, tuple(request.token_ids), task, context, cache_root=_CACHE_ROOT)
        async with aclosing(self._core.engine.generate(work)) as outputs:
            async for output in outputs:
                if isinstance(output, FinishedOutput):
                    yield pb.GenerateResponse(
                        finished=True, timings=_timings(output.timings), cached_tokens=output.cached_tokens
                    )
                else:
                    yield pb.GenerateResponse(token_ids=output.tokens)

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:
        config, violations = self._core.config, Violations()
        self._check_tokens(request.token_ids, violations)
        ready = self._core.ready()
        tries = ready.tries
        if request.trie:
            if request.trie not in tries:
                violations.add("trie", f"is {quote(request.trie)}, {_known(sorted(filter(None, tries)), request.trie)}")
        else:
            self._core.shop()
        if request.count < 1:
            violations.add("count", "is 0, expected at least 1")
        violations.at_most("count", request.count, config.max_count, "max_count")
        violations.raise_if_any()
        widest = self._core.max_beam_width(ready.trie_depths[request.trie])
        violations.at_most("beam_width", request.beam_width, widest, "max_beam_width, max_step_tokens")
        violations.raise_if_any()
        self._core.check_prompt("token_ids", len(request.token_ids), produced=ready.trie_depths[request.trie] - 1)
        task = Select(
            count=request.count, beam_width=request.beam_width or config.default_beam_width, trie=request.trie
        )
        work = self._core.request(
            Service.RECOMMENDATION, tuple(request.token_ids), task, context, cache_root=_CACHE_ROOT
        )
        finished = await self._core.engine.run(work)
        if finished.selected is None:
            raise RuntimeError("the engine answered a search without items")
        pairs = zip(finished.selected.items, finished.selected.scores, strict=True)
        return pb.SearchResponse(
            hits=[pb.SearchHit(item=item, score=score) for item, score in pairs],
            timings=_timings(finished.timings),
            cached_tokens=finished.cached_tokens,
        )

    def _check_tokens(self, tokens: Sequence[int], violations: Violations) -> None:
        if not tokens:
            violations.add("token_ids", "is empty")
            return
        size = self._core.served.vocabulary_size
        if (largest := max(tokens)) >= size:
            index = list(tokens).index(largest)
            violations.add(f"token_ids[{index}]", f"is {largest}, expected a token id below {size}")


def _known(names: Sequence[str], asked: str) -> str:
    """Which names there are, for the error about another one."""
    if not names:
        return "but this server has no named trie (synthetic_tries)"
    return f"known are: {', '.join(map(quote, names))}{nearest(asked, names)}"


def _timings(timings: Timings) -> pb.Timings:
    return pb.Timings(
        queue_seconds=timings.queue_seconds,
        first_seconds=timings.first_seconds,
        total_seconds=timings.total_seconds,
    )
