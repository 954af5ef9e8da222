"""A request on its way through the engine: its tokens, how many are computed, and the pages they are in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoplm.cache.prefix import Node
from shoplm.request import Degradation, Explain, Generate, Request, Tokens, forks_start, token_ids

if TYPE_CHECKING:
    from shoplm.scheduler.drafts import Lookup
    from shoplm.scheduler.fairness import Tenant


@dataclass(eq=False, slots=True)
class Sequence:
    """Mutable state of one request. There is no prefill and no decode: `length` runs ahead, `computed` catches up."""

    request: Request  # as it is served: degraded, it is no longer what was submitted
    due_seconds: float  # when its first result should be there: what prompts are ordered by
    tokens: Tokens  # its own: prompt and the produced tokens that are known
    depth: int = 1  # codes per item, for Select
    lanes: int = 0  # of a beam row, for Select with depth > 1
    limit_seconds: float | None = None  # when its first result must be there, or it is a lost cause
    computed: int = 0  # leading tokens whose keys and values are computed or in flight
    unread: int = 0  # submitted steps that draw no token of it, and whose result is not in yet
    unknown: int = 0  # sampled tokens that are in flight
    level: int = 0  # Select: levels of the trie that are done or in flight
    parts: tuple[float, ...] = ()  # Explain: what the forks read that have ended
    nodes: list[Node] = field(default_factory=list)  # shared pages, from the start of the prompt
    pages: list[int] = field(default_factory=list)  # own pages behind them: linear ones
    page_table: Tokens = field(default_factory=lambda: token_ids(()))  # int32: the pages of `nodes`, then `pages`
    beam_pages: list[int] = field(default_factory=list)
    state_slot: int | None = None  # None: not running
    epoch: int = 0  # counts preemptions: results of an earlier life of a selection are void
    cached_tokens: int | None = None  # of the prompt, at first admission
    matched: list[Node] = field(default_factory=list)  # what the tree held of it when it came, until it has pages
    expected_cached: int = 0  # leading tokens of these
    expected_awaited: int = 0  # the last so many of them, which others had yet to compute
    queued_tokens: int = 0  # what it counts in the queue's bound while it waits
    ticket: int = 0  # of its place in the queue; 0: it does not wait
    lacks_since: float | None = None  # when it was its turn and there was no room for it; None: not yet, or it runs
    tenant: Tenant | None = None  # whom its work is charged to
    is_late: bool = False  # it has missed its target and nobody set a deadline: it gets what others leave, and a share
    patient_until: float = math.inf  # past it, what has missed its target and is due at its deadline has a share, too
    foreseen_seconds: float = 0.0  # from its arrival to its first result, as it was predicted when it was let in
    work_seconds: float = 0.0  # what it counts in the backlog until its first result
    work_bucket: int | None = None  # where it counts; None: nowhere
    degraded: tuple[Degradation, ...] = ()
    last_planned_seconds: float = 0.0  # when a part of it was last planned
    started_seconds: float | None = None  # when a step that computes something of it was first planned
    first_seconds: float | None = None
    last_token_seconds: float | None = None
    lookup: Lookup | None = None  # what its next tokens are guessed from
    ended: bool = False
    prompt_length: int = field(init=False)
    most_length: int = field(init=False)  # of prompt and answer
    stop_token_ids: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.tokens)
        self.serve(self.request)

    def serve(self, request: Request) -> None:
        """Serve this one, which is the request or a smaller one."""
        self.request = request
        task = request.task
        self.most_length, self.stop_token_ids = self.prompt_length, ()
        if isinstance(task, Generate):
            self.most_length += task.max_tokens
            self.stop_token_ids = task.stop_token_ids

    def restart(self) -> None:
        """It was preempted: everything is computed again."""
        self.computed = self.level = 0
        self.parts = ()
        self.epoch += 1

    @property
    def beam_tokens(self) -> int:
        """Tokens whose keys and values a search needs room for behind its prompt."""
        return self.lanes * (self.depth - 1)

    @property
    def shareable(self) -> int:
        """Leading tokens whose keys and values others may read, and which need not be computed where others have, but
        for the last one's hidden state. No forks: they read only a part of what is before them. Nor an answer's last
        token: it is no part of what is computed again after a preemption."""
        task = self.request.task
        if isinstance(task, Explain):
            return forks_start(self.prompt_length, task)
        return len(self.tokens) - (self.completion_tokens > 0)

    @property
    def in_flight(self) -> int:
        """Submitted steps of this sequence whose result is not in yet."""
        return self.unread + self.unknown

    @property
    def length(self) -> int:
        """Known tokens and those in flight."""
        return len(self.tokens) + self.unknown

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens that could be computed now."""
        return self.length - self.computed

    @property
    def is_prompt(self) -> bool:
        """The prompt, or what was known of it and its answer when it was preempted, is not computed to its end."""
        behind = self.computed < self.prompt_length or len(self.tokens) + self.unknown - self.computed > 1
        return behind and self.level == 0

    @property
    def wants_more(self) -> bool:
        """There is something left to submit."""
        if self.level:
            return self.level < self.depth
        if self.most_length > self.prompt_length and self.length >= self.most_length:
            return False
        return self.pending > 0
