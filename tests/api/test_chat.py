"""ChatService: streamed text, stop strings, limits, citations."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from scripted_engine import CONTEXT_TOKENS
from served_shop import Scripted, Serve
from shoplm.grounding import Grounding
from shoplm.prompt import PromptBuilder
from shoplm.request import Generate
from shoplm.retrieval import Passage
from shoplm.v1 import chat_pb2 as pb
from shoplm.v1 import shop_pb2
from tiny_shop import DEMO_CUSTOMER, item_id


def ask(text: str = "hello", **fields: object) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[pb.Message(role="user", content=text)], **fields)  # type: ignore[arg-type]


def answer(scripted: Scripted, request: pb.ChatRequest) -> tuple[list[str], pb.ChatSummary]:
    """(deltas, summary); the summary is the last message and the only one."""
    events = list(scripted.server.chat.Chat(request))
    assert [event.WhichOneof("event") for event in events] == ["delta"] * (len(events) - 1) + ["summary"]
    return [event.delta for event in events[:-1]], events[-1].summary


def say(scripted: Scripted, text: str) -> None:
    """The engine's answer from now on: each byte a token of its own, where the vocabulary has it."""
    assert scripted.server.server.served is not None
    tokenizer = scripted.server.server.served.tokenizer
    single = {tokenizer.token_bytes(token): token for token in range(3, 320) if len(tokenizer.token_bytes(token)) == 1}
    scripted.engine.answer = [(single[bytes([byte])],) for byte in text.encode()]


def generation(scripted: Scripted) -> Generate:
    task = scripted.engine.requests[-1].task
    assert isinstance(task, Generate)
    return task


def test_the_text_comes_in_whole_characters(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    say(scripted, "Grüße 🥖!")
    deltas, summary = answer(scripted, ask())
    assert "".join(deltas) == "Grüße 🥖!"
    assert all("\ufffd" not in delta for delta in deltas)
    assert summary.finish_reason == pb.FINISH_REASON_STOP
    assert summary.usage.completion_tokens == len("Grüße 🥖!".encode())
    assert summary.usage.prompt_tokens == len(scripted.engine.requests[-1].tokens)
    assert summary.usage.cached_tokens == 3
    assert summary.model.bundle == "tiny-shop"


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (["STOP"], "one two "),
        (["two STOP thr", "x"], "one "),
        (["one two STOP three."], ""),
        (["nothing"], "one two STOP three"),
        (["three?"], "one two STOP three"),
    ],
)
def test_a_stop_string_never_shows_even_split_over_tokens(
    serve_scripted: Serve, stops: Sequence[str], shown: str
) -> None:
    scripted = serve_scripted()
    say(scripted, "one two STOP three" + ("." if stops == ["one two STOP three."] else ""))
    deltas, summary = answer(scripted, ask(stop=stops))
    assert "".join(deltas) == shown
    assert summary.finish_reason == pb.FINISH_REASON_STOP
    assert summary.usage.cached_tokens == 3


def test_a_stop_string_ends_the_work_in_the_engine(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    say(scripted, "a|b")
    scripted.engine.holds = True
    deltas, summary = answer(scripted, ask(stop=["|"]))
    assert deltas == ["a"]
    assert summary.usage.completion_tokens == 2
    assert scripted.engine.satisfied == [scripted.engine.requests[0].request_id]


def test_the_answer_is_cut_to_the_context(serve_scripted: Serve) -> None:
    scripted = serve_scripted("--default-completion-tokens", "40", "--max-completion-tokens", "4000")
    answer(scripted, ask())
    assert generation(scripted).max_tokens == 40
    answer(scripted, ask(max_tokens=4000))
    assert generation(scripted).max_tokens == CONTEXT_TOKENS - len(scripted.engine.requests[-1].tokens)


def test_the_sampling_is_the_callers(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    answer(scripted, ask(temperature=0.5, top_k=40, top_p=0.9, seed=2**64 - 1))
    sampling = generation(scripted).sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 40, 2**64 - 1)
    assert sampling.top_p == pytest.approx(0.9)
    answer(scripted, ask(temperature=0.5))
    answer(scripted, ask(temperature=0.5))
    seeds = [request.task.sampling.seed for request in scripted.engine.requests[1:]]  # type: ignore[union-attr]
    assert seeds[0] != seeds[1]  # without a seed, two answers may differ
    answer(scripted, ask())
    assert generation(scripted).sampling.temperature == 0.0


def test_an_answer_ends_at_the_models_end_token(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    answer(scripted, ask())
    assert scripted.server.server.served is not None
    assert generation(scripted).stop_token_ids == scripted.server.server.served.tokenizer.end_token_ids != ()


def prompt_text(scripted: Scripted) -> str:
    """The text of the last prompt; shop tokens have none."""
    assert scripted.server.server.served is not None
    tokenizer = scripted.server.server.served.tokenizer
    return b"".join(map(tokenizer.token_bytes, scripted.engine.requests[-1].tokens)).decode()


def test_the_shops_texts_are_put_before_the_question_and_cited(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    _, summary = answer(scripted, ask("Can I return something?"))
    assert [(citation.source, citation.title) for citation in summary.citations] == [("service.md", "Returns")]
    assert "within 30 days" in summary.citations[0].text
    assert "within 30 days" in prompt_text(scripted)
    assert "free over 50" not in prompt_text(scripted)


def test_a_follow_up_finds_what_the_question_before_it_was_about(serve_scripted: Serve) -> None:
    scripted = serve_scripted()

    def cited(*texts: str) -> list[str]:
        roles = ("user", "assistant") * len(texts)
        messages = [pb.Message(role=role, content=text) for role, text in zip(roles, texts, strict=False)]
        return [citation.title for citation in answer(scripted, pb.ChatRequest(messages=messages))[1].citations]

    assert cited("Can I return something?", "Yes, the delivery too.", "How long?") == ["Returns"]
    assert cited("Can I return something?", "Yes.", "And how much is delivery?") == ["Delivery"]
    assert cited("How long?") == []


def conversation(*texts: str, system: str = "", **fields: object) -> pb.ChatRequest:
    """Turns of the user and the assistant, the user's last."""
    turns = [pb.Message(role=("user", "assistant")[at % 2], content=text) for at, text in enumerate(texts)]
    before = [pb.Message(role="system", content=system)] if system else []
    return pb.ChatRequest(messages=[*before, *turns], **fields)  # type: ignore[arg-type]


def test_what_passages_answer_is_read_without_earlier_topics(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    turns = ("Can I return something?", "Certainly so.", "And how long?", "A month.", "And how much is delivery?")
    _, summary = answer(scripted, conversation(*turns, system="Speak plainly."))
    read = prompt_text(scripted)
    assert [citation.title for citation in summary.citations] == ["Delivery"]
    assert "Speak plainly." in read and turns[-1] in read
    assert not any(text in read for text in turns[:-1])
    answer(scripted, conversation(*turns, "Not much.", "How long?"))  # of a follow-up, the topic's turns
    read = prompt_text(scripted)
    assert all(text in read for text in (turns[-1], "Not much.", "How long?"))
    assert not any(text in read for text in turns[:-1])


@pytest.mark.parametrize(
    ("last", "grounding"), [("My name?", pb.GROUNDING_ON), ("And how much is delivery?", pb.GROUNDING_OFF)]
)
def test_without_passages_the_whole_conversation_is_read(
    serve_scripted: Serve, last: str, grounding: pb.Grounding.ValueType
) -> None:
    scripted = serve_scripted()
    turns = ("I am Ann.", "Hello Ann.", "Can I return something?", "Certainly so.", last)
    _, summary = answer(scripted, conversation(*turns, grounding=grounding))
    assert not summary.citations
    assert all(text in prompt_text(scripted) for text in turns)


def test_without_grounding_only_the_conversation_counts(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    _, summary = answer(scripted, ask("Can I return something?", grounding=pb.GROUNDING_OFF))
    assert not summary.citations
    assert "within 30 days" not in prompt_text(scripted)


def test_passages_give_way_to_a_conversation_that_needs_the_room(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    answer(scripted, ask("delivery", grounding=pb.GROUNDING_OFF))
    free = CONTEXT_TOKENS - len(scripted.engine.requests[-1].tokens)
    # Twenty tokens stay: enough for an answer, not for the passage.
    _, summary = answer(scripted, ask("delivery" + "@" * (free - 20)))
    assert not summary.citations
    assert len(scripted.engine.requests[-1].tokens) < CONTEXT_TOKENS


def test_the_history_stands_before_the_conversation(serve_scripted: Serve) -> None:
    scripted = serve_scripted()
    _, summary = answer(scripted, ask(customer=shop_pb2.Customer(customer_id=DEMO_CUSTOMER)))
    request = scripted.engine.requests[-1]
    assert 0 < request.history_tokens == summary.usage.history_tokens < len(request.tokens)
    answer(scripted, ask("something else", customer=shop_pb2.Customer(customer_id=DEMO_CUSTOMER)))
    other = scripted.engine.requests[-1]
    assert other.tokens[: other.history_tokens] == request.tokens[: request.history_tokens]


def test_a_customer_whom_the_shop_does_not_know_is_said(serve_scripted: Serve) -> None:
    _, summary = answer(serve_scripted(), ask(customer=shop_pb2.Customer(customer_id="nobody")))
    assert [warning.code for warning in summary.warnings] == ["EMPTY_HISTORY"]
    looked = shop_pb2.Event(item_id=item_id(3), type=shop_pb2.EVENT_TYPE_VIEW, time=Timestamp(seconds=1_500_000_000))
    _, summary = answer(serve_scripted(), ask(customer=shop_pb2.Customer(customer_id="looked", events=[looked])))
    assert [warning.code for warning in summary.warnings] == ["EMPTY_HISTORY"]


def test_a_visitor_gets_no_warning(serve_scripted: Serve) -> None:
    _, summary = answer(serve_scripted(), ask())
    assert not summary.warnings


def test_long_texts_are_searched_and_encoded_beside_the_event_loop(
    serve_scripted: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = serve_scripted()
    threads: list[int] = []
    search, chat = Grounding.search, PromptBuilder.chat

    def noted_search(*arguments: Any) -> list[Passage]:
        threads.append(threading.get_ident())
        return search(*arguments)

    def noted_chat(*arguments: Any) -> tuple[int, ...]:
        threads.append(threading.get_ident())
        return chat(*arguments)

    monkeypatch.setattr(Grounding, "search", noted_search)
    monkeypatch.setattr(PromptBuilder, "chat", noted_chat)
    loop_thread = scripted.server.run(identified())
    answer(scripted, ask("short"))
    assert threads == [loop_thread] * 2
    threads.clear()
    with pytest.raises(grpc.RpcError, match="max_context_tokens"):
        answer(scripted, ask("long " * 4000))
    assert len(threads) == 2 and loop_thread not in threads


async def identified() -> int:
    return threading.get_ident()
