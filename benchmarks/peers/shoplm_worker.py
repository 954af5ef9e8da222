"""ShopLM through gRPC: a server of its own, raw token ids. Arguments: dtype, weight format, threads, the log's path,
and further ones of `shoplm serve`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoplm.bench.calls import open_channel
from shoplm.bench.launch import own_server
from shoplm.v1 import engine_pb2, engine_pb2_grpc

from peers.rows import TRIE_ITEMS, TRIE_LEVELS
from peers.worker import Tokens, serve, versions

CACHE_MIB = 2048  # as much as the peers get
TRIE = "catalogue"
TIMEOUT_SECONDS = 600.0
# Nobody waits for the next token, here as with the peers: prompts need not be cut up between the tokens of answers.
FOR_THROUGHPUT = ("--chat-token-target-seconds", "5", "--max-mixed-prompt-tokens", "512")


class ShopLm:
    """A client of our server, on an event loop of its own."""

    def __init__(self, address: str, described: dict[str, str]) -> None:
        self.described = described
        self._loop = asyncio.new_event_loop()
        self._stub = self._loop.run_until_complete(self._open(address))

    async def _open(self, address: str) -> Any:
        self._channel = open_channel(address)
        return engine_pb2_grpc.EngineServiceStub(self._channel)

    def close(self) -> None:
        self._loop.run_until_complete(self._channel.close(None))
        self._loop.close()

    def generate(self, prompts: Tokens, output_tokens: int) -> Tokens:
        async def one(prompt: Sequence[int]) -> list[int]:
            request = engine_pb2.GenerateRequest(token_ids=prompt, max_tokens=output_tokens, ignore_eos=True)
            return [
                token
                async for answer in self._stub.Generate(request, timeout=TIMEOUT_SECONDS)
                for token in answer.token_ids
            ]

        async def all_at_once() -> Tokens:
            return await asyncio.gather(*map(one, prompts))

        return self._loop.run_until_complete(all_at_once())

    def search(self, prompt: Sequence[int], beams: int, tokens: int) -> None:
        request = engine_pb2.SearchRequest(token_ids=prompt, trie=TRIE, beam_width=beams, count=beams)

        async def one() -> Any:
            return await self._stub.Search(request, timeout=TIMEOUT_SECONDS)

        hits = self._loop.run_until_complete(one()).hits
        if len({hit.item for hit in hits}) != beams or tokens != len(TRIE_LEVELS):
            raise ValueError(f"expected {beams} different items of {tokens} tokens, got {len(hits)}")


@contextmanager
def load() -> Iterator[ShopLm]:
    dtype, weight_format, threads, log, *options = sys.argv[1:]
    trie = f"{TRIE}={TRIE_ITEMS}:{'x'.join(map(str, TRIE_LEVELS))}"
    arguments = ["--dtype", dtype, "--weight-format", weight_format, "--threads", threads, "--synthetic-tries", trie]
    with own_server([*arguments, *FOR_THROUGHPUT, "--kv-cache-mib", str(CACHE_MIB), *options], Path(log)) as server:
        contestant = ShopLm(
            server.address,
            {**versions("shoplm", "torch", "grpcio"), "computes": dtype, "weights": weight_format, "kv_cache": dtype},
        )
        try:
            yield contestant
        finally:
            contestant.close()


if __name__ == "__main__":
    serve(load)
