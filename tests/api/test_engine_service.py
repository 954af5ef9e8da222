"""EngineService over a real engine: raw tokens in and out."""

from __future__ import annotations

import grpc
import msgspec
import pytest
from served_shop import Serve
from server_thread import ServerThread, bad_fields
from shoplm.v1 import engine_pb2 as pb
from tiny_shop import CONTEXT, ITEMS, VOCABULARY

PROMPT = list(range(5, 60))


def generate(server: ServerThread, **fields: object) -> list[pb.GenerateResponse]:
    request = pb.GenerateRequest(**{"token_ids": PROMPT, "max_tokens": 8, **fields})  # type: ignore[arg-type]
    return list(server.engine_api.Generate(request))


def tokens(responses: list[pb.GenerateResponse]) -> list[int]:
    return [token for response in responses for token in response.token_ids]


def test_tokens_are_repeatable_and_the_prompt_is_cached(real_shop: ServerThread) -> None:
    first, second = (generate(real_shop, ignore_eos=True) for _ in range(2))
    assert tokens(first) == tokens(second)
    assert len(tokens(first)) == 8
    assert all(token < VOCABULARY for token in tokens(first))
    last = second[-1]
    assert last.finished
    assert last.cached_tokens == 48  # the whole pages of 16 before the last token
    assert 0.0 <= last.timings.queue_seconds <= last.timings.first_seconds <= last.timings.total_seconds
    assert [response.finished for response in first] == [False] * (len(first) - 1) + [True]


def test_a_seed_repeats_a_sampled_answer(real_shop: ServerThread) -> None:
    answers = [
        tokens(generate(real_shop, temperature=1.5, seed=seed, ignore_eos=True, max_tokens=12)) for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_search_finds_the_best_of_a_named_trie(real_shop: ServerThread) -> None:
    wide = real_shop.engine_api.Search(pb.SearchRequest(token_ids=PROMPT, trie="toy", beam_width=64, count=10))
    scores = [hit.score for hit in wide.hits]
    assert len(scores) == 10
    assert scores == sorted(scores, reverse=True)
    assert len({hit.item for hit in wide.hits}) == 10
    assert all(hit.item < 50 for hit in wide.hits)
    catalogue = real_shop.engine_api.Search(pb.SearchRequest(token_ids=PROMPT, count=3))
    assert all(hit.item < ITEMS for hit in catalogue.hits)
    assert catalogue.timings.total_seconds > 0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [5, 10_000_000]}, "token_ids[1]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**32 - 1}, "max_tokens"),
        ({"max_tokens": CONTEXT - 10}, "max_tokens"),
        ({"max_tokens": CONTEXT - len(PROMPT) + 1}, "max_tokens"),
        ({"token_ids": [5] * CONTEXT}, "token_ids"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_generated_is_refused(real_shop: ServerThread, fields: dict[str, object], field: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        generate(real_shop, **fields)
    assert list(bad_fields(raised.value)) == [field]


def test_too_many_tokens_are_told_what_the_prompt_leaves(real_shop: ServerThread) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        generate(real_shop, max_tokens=CONTEXT)
    assert bad_fields(raised.value)["max_tokens"] == (
        f"is {CONTEXT}, at most {CONTEXT - len(PROMPT)} is allowed "
        f"(max_context_tokens or kv_cache_mib, less {len(PROMPT)} token_ids)"
    )


def test_a_server_without_named_tries_says_so(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--engine-api")
    ready = scripted.engine.ready
    assert ready is not None
    for tries, known in (({"": 24}, "has no named trie"), ({"": 24, "toy": 8}, "known are: 'toy'")):
        scripted.engine.ready = msgspec.structs.replace(ready, tries=tries)
        with pytest.raises(grpc.RpcError) as raised:
            scripted.server.engine_api.Search(pb.SearchRequest(token_ids=PROMPT, trie="zz", count=3))
        assert known in bad_fields(raised.value)["trie"]


def test_an_unset_seed_is_a_seed(real_shop: ServerThread) -> None:
    answers = [tokens(generate(real_shop, temperature=1.5, ignore_eos=True, **seed)) for seed in ({}, {}, {"seed": 0})]
    assert answers[0] == answers[1] == answers[2]


def test_beams_that_no_step_holds_are_refused_by_name(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--engine-api", "--max-step-tokens", "100")
    ready = scripted.engine.ready
    assert ready is not None
    scripted.engine.ready = msgspec.structs.replace(ready, tries={"toy": 8}, trie_depths={"toy": 3})
    search = pb.SearchRequest(token_ids=PROMPT, trie="toy", count=3, beam_width=69)  # and 32 items that ride along
    with pytest.raises(grpc.RpcError) as raised:
        scripted.server.engine_api.Search(search)
    assert bad_fields(raised.value) == {"beam_width": "is 69, at most 68 is allowed (max_beam_width, max_step_tokens)"}
    search.beam_width = 68
    assert scripted.server.engine_api.Search(search).hits


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"trie": "toyy"}, "trie"),
        ({"count": 0}, "count"),
        ({"count": 5000}, "count"),
        ({"beam_width": 5000}, "beam_width"),
        ({"token_ids": list(range(3, 300)) * 10}, "token_ids"),
        ({"token_ids": [5] * (CONTEXT - 1)}, "token_ids"),
    ],
)
def test_what_cannot_be_searched_is_refused(real_shop: ServerThread, fields: dict[str, object], field: str) -> None:
    request = pb.SearchRequest(**{"token_ids": PROMPT, "count": 3, "trie": "toy", **fields})  # type: ignore[arg-type]
    with pytest.raises(grpc.RpcError) as raised:
        real_shop.engine_api.Search(request)
    fields_refused = bad_fields(raised.value)
    assert list(fields_refused) == [field]
    if field == "token_ids":  # two of an item's three codes follow it
        assert f"at most {CONTEXT - 2} are allowed" in fields_refused["token_ids"]
    if field == "trie":
        assert "did you mean 'toy'" in fields_refused["trie"]
