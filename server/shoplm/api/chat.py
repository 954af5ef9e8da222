"""ChatService: an answer token by token, behind the customer's history, beside passages found for the question."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from shoplm.api.core import Context, Core
from shoplm.api.validation import Violations, quote, shown_outside
from shoplm.api.warnings import Warnings
from shoplm.errors import NotServingError
from shoplm.followup import latest_topic, question_of
from shoplm.grounding import Grounding
from shoplm.history import History
from shoplm.model.tokenizer import StopStrings, StreamDecoder
from shoplm.prompt import Prefix
from shoplm.request import Degradation, FinishedOutput, FinishReason, Generate, Request, Sampling, Service
from shoplm.retrieval import Passage
from shoplm.v1 import chat_pb2 as pb
from shoplm.v1.chat_pb2_grpc import ChatServiceServicer

Result = TypeVar("Result")

_SYSTEM, _USER, _ASSISTANT = ROLES = ("system", "user", "assistant")
MAX_TEMPERATURE = 10.0
MAX_STOP_BYTES = 256
_SERVICE = Service.CHAT
_LONG_TEXT_BYTES = 8 * 1024  # to search and to encode more than this takes milliseconds: not on the event loop
# Threads of their own: many long texts must not keep the default ones from a scrape or from noticing an engine's end.
_LONG_TEXTS = ThreadPoolExecutor(2, thread_name_prefix="long-texts")
_FINISH = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


@dataclass(frozen=True)
class _Turn:
    """A checked request."""

    history: History
    messages: list[tuple[str, str]]
    text_bytes: int
    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...]
    grounding: Grounding | None  # None: not to be used

    @property
    def on_topic(self) -> list[tuple[str, str]]:
        """What the last message is about: the messages from its topic on, and those of the system."""
        asked = [at for at, (role, _) in enumerate(self.messages) if role == _USER]
        start = asked[latest_topic([self.messages[at][1] for at in asked])]
        return [message for at, message in enumerate(self.messages) if at >= start or message[0] == _SYSTEM]


class ChatService(ChatServiceServicer):
    """See protos/shoplm/v1/chat.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def Chat(self, request: pb.ChatRequest, context: Context) -> AsyncIterator[pb.ChatResponse]:
        core, warnings = self._core, Warnings()
        core.check_chat()
        turn = self._read(request, warnings)
        # Without a customer, an empty history: the prompt has the shop's preamble alone, and that is no warning.
        prefix = core.prefix(turn.history) if self._reads_items else core.served.prompts.prefix(None)
        warnings.add("HISTORY_TRUNCATED", prefix.truncated_baskets)
        tokens, passages = await self._prompt(turn, prefix)
        room = core.ready().max_context_tokens - len(tokens)
        task = Generate(min(turn.max_tokens, room), turn.sampling, core.served.tokenizer.end_token_ids)
        suffix = tokens[len(prefix.tokens) :]
        work = core.request(_SERVICE, suffix, task, context, prefix=prefix, allow_degraded=request.allow_degraded)
        answer = _Answer(StreamDecoder(core.served.tokenizer), StopStrings(turn.stops))
        async with aclosing(self._deltas(work, answer)) as deltas:
            async for delta in deltas:
                yield pb.ChatResponse(delta=delta)
        yield pb.ChatResponse(
            summary=pb.ChatSummary(
                finish_reason=_FINISH[answer.finish_reason],
                usage=core.usage(work, answer.cached_tokens, answer.completion_tokens),
                citations=[pb.Citation(source=each.source, title=each.title, text=each.text) for each in passages],
                model=core.model_version,
                warnings=core.warned(_SERVICE, warnings),
                degradations=core.degraded(answer.degraded),
            )
        )

    async def _deltas(self, work: Request, answer: _Answer) -> AsyncGenerator[str]:
        """The answer's text as it comes. Leaving early cancels the request in the engine."""
        async with aclosing(self._core.engine.generate(work)) as outputs:
            async for output in outputs:
                if isinstance(output, FinishedOutput):
                    answer.finish_reason = output.finish_reason
                    answer.cached_tokens = output.cached_tokens
                    answer.completion_tokens = output.completion_tokens
                    answer.degraded = output.degraded
                    if rest := answer.stops.finish():
                        yield rest
                    return
                answer.cached_tokens = output.cached_tokens
                answer.completion_tokens += len(output.tokens)
                if text := answer.stops.push(answer.decoder.push(output.tokens)):
                    yield text
                if answer.stops.stopped is not None:
                    self._core.engine.answered(work.request_id)
                    return

    async def _prompt(self, turn: _Turn, prefix: Prefix) -> tuple[tuple[int, ...], list[Passage]]:
        """Prompt tokens and the passages in them. Passages that do not fit are left out; they are an offer."""
        passages = await _aside(turn, lambda: self._passages(turn))
        # An adapter is taught single questions. Behind answers to others it repeats these instead of the passages.
        on_topic = bool(passages) and self._reads_items
        tokens = await self._encode(turn, prefix, turn.on_topic if on_topic else turn.messages, passages)
        if passages and len(tokens) >= self._core.ready().max_context_tokens:
            passages = []
            tokens = await self._encode(turn, prefix, turn.messages, passages)
        self._core.check_prompt("messages", len(tokens), produced=1)
        return tokens, passages

    def _passages(self, turn: _Turn) -> list[Passage]:
        if turn.grounding is None:
            return []
        question = question_of([content for role, content in turn.messages if role == _USER])
        passages = turn.grounding.search(question, turn.history, self._core.config.max_passages)
        # A base that cannot read the history gets it in words; not beside others, for a small one mixes them up.
        if not passages and not self._reads_items:
            return turn.grounding.habits(turn.history)
        return passages

    @property
    def _reads_items(self) -> bool:
        """Whether the base reads a customer's history: it was adapted to the shop, or there is none."""
        shop = self._core.served.shop
        return shop is None or shop.manifest.prompt.chat_reads_item_tokens

    async def _encode(
        self, turn: _Turn, prefix: Prefix, messages: list[tuple[str, str]], passages: list[Passage]
    ) -> tuple[int, ...]:
        texts = [passage.line for passage in passages]
        return await _aside(turn, lambda: self._core.served.prompts.chat(prefix, messages, texts))

    def _read(self, request: pb.ChatRequest, warnings: Warnings) -> _Turn:
        config, violations = self._core.config, Violations()
        history = self._core.customers.read(request.customer, violations, warnings)
        # A visitor has none to go by; whoever is named was expected to.
        shop = self._core.served.shop
        is_known = shop is not None and shop.knows(history)
        warnings.add("EMPTY_HISTORY", int(bool(request.customer.customer_id) and not is_known))
        text_bytes = self._check_messages(request, violations)
        violations.at_most("max_tokens", request.max_tokens, config.max_completion_tokens, "max_completion_tokens")
        if request.HasField("temperature"):
            violations.number("temperature", request.temperature, 0.0, MAX_TEMPERATURE)
        if request.HasField("top_p") and not 0.0 < request.top_p <= 1.0:
            violations.add(
                "top_p", f"is {shown_outside(request.top_p, 0.0, 1.0)}, expected a number above 0 and up to 1"
            )
        if violations.length("stop", request.stop, config.max_stop_strings, "max_stop_strings"):
            for index, stop in enumerate(request.stop):
                violations.text(f"stop[{index}]", stop, MAX_STOP_BYTES, required=True)
        if request.grounding not in pb.Grounding.values():
            violations.add("grounding", f"is {request.grounding}, which is no grounding")
        violations.raise_if_any()
        return _Turn(
            history=history,
            messages=[(message.role, message.content) for message in request.messages],
            text_bytes=text_bytes,
            sampling=Sampling(
                temperature=request.temperature,
                top_k=min(request.top_k, self._core.served.base.config.vocab_size),
                top_p=request.top_p if request.HasField("top_p") else 1.0,
                seed=request.seed if request.HasField("seed") else secrets.randbits(64),
            ),
            max_tokens=request.max_tokens or config.default_completion_tokens,
            stops=tuple(request.stop),
            grounding=self._grounding(request),
        )

    def _check_messages(self, request: pb.ChatRequest, violations: Violations) -> int:
        """Bytes of all contents."""
        config = self._core.config
        if not request.messages:
            violations.add("messages", "is empty; the last message is the user's")
            return 0
        if not violations.length("messages", request.messages, config.max_messages, "max_messages"):
            return 0
        sizes = [len(message.content.encode()) for message in request.messages]
        if sum(sizes) > config.max_text_bytes:
            longest = sizes.index(max(sizes))
            violations.add(
                f"messages[{longest}].content",
                f"has {sizes[longest]} bytes, and all messages together {sum(sizes)}; "
                f"at most {config.max_text_bytes} are allowed (max_text_bytes)",
            )
        for index, message in enumerate(request.messages):
            if message.role not in ROLES:
                violations.add(f"messages[{index}].role", f"is {quote(message.role)}, expected {', '.join(ROLES)}")
        last = len(request.messages) - 1
        if request.messages[last].role in (_SYSTEM, _ASSISTANT):
            violations.add(
                f"messages[{last}].role", f"is {request.messages[last].role!r}, but the last message is the user's"
            )
        return sum(sizes)

    def _grounding(self, request: pb.ChatRequest) -> Grounding | None:
        shop = self._core.served.shop
        if request.grounding == pb.GROUNDING_OFF:
            return None
        if shop is not None:
            return shop.grounding
        if request.grounding == pb.GROUNDING_ON:
            raise NotServingError(
                "grounding is GROUNDING_ON, but this server has no bundle, whose texts and items could be used; "
                "start it with --bundle"
            )
        return None


async def _aside(turn: _Turn, work: Callable[[], Result]) -> Result:
    """What `work` returns; where texts are long it is done in a thread, so that other calls go on meanwhile."""
    if turn.text_bytes <= _LONG_TEXT_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_LONG_TEXTS, work)


@dataclass
class _Answer:
    """An answer while it is streamed."""

    decoder: StreamDecoder
    stops: StopStrings
    finish_reason: FinishReason = FinishReason.STOP
    cached_tokens: int = 0
    completion_tokens: int = 0
    degraded: tuple[Degradation, ...] = ()
