"""What travels between the API process and the engine: requests one way, outputs the other.

Plain frozen msgspec structs: no torch, no protobuf. Times are seconds of the machine's monotonic clock
(`time.monotonic`, shared by the processes of one machine), so a deadline means the same on both sides.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sized
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    Tokens = array[int]
else:
    Tokens = array  # of int32: as it travels, and as pages of it are looked up


def token_ids(tokens: Iterable[int]) -> Tokens:
    """Tokens as requests hold them. Raises OverflowError where one does not fit into 32 bits."""
    return array("i", tokens)


class Service(StrEnum):
    """Who asked; the `service` label of every metric."""

    RECOMMENDATION = "recommendation"
    CHAT = "chat"
    PREDICTION = "prediction"


LEAST_TEMPERATURE = 1e-6  # below it the largest logit is all that can be drawn, and logits over it may overflow


class Sampling(msgspec.Struct, frozen=True):
    """How a token is drawn from the text rows of the LM head."""

    temperature: float = 0.0  # 0, or below LEAST_TEMPERATURE, is greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the token of the largest logit is taken."""
        return self.temperature < LEAST_TEMPERATURE


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Chat: many steps, one token each."""

    max_tokens: int
    sampling: Sampling = Sampling()
    stop_token_ids: tuple[int, ...] = ()  # ends the answer and is not part of it; empty: only max_tokens ends it


class ItemFilter(msgspec.Struct, frozen=True):
    """Which items may be selected. Hashable, so that the engine can keep the masks of common filters."""

    include_categories: tuple[str, ...] = ()
    exclude_categories: tuple[str, ...] = ()
    min_price: float | None = None
    max_price: float | None = None
    in_stock_only: bool = False


OWN_LANES = 16  # owned items that ride along in a beam search: those of the largest repeat terms
NEAR_LANES = 16  # items that go with the owned ones and ride along: those of the largest terms


class Select(msgspec.Struct, frozen=True, tag=True):
    """Recommendation: the best items of a trie, or the scores of given ones."""

    count: int
    beam_width: int
    trie: str = ""  # "": the bundle's catalogue
    item_filter: ItemFilter = ItemFilter()
    exclude_items: tuple[int, ...] = ()  # item rows
    candidates: tuple[int, ...] | None = None  # item rows to score (Rank); None: search
    own_items: tuple[int, ...] = ()  # item rows the customer bought, from the untruncated history
    own_counts: tuple[float, ...] = ()  # time-decayed counts, aligned with own_items
    own_terms: tuple[float, ...] = ()  # added to their scores, aligned with own_items; empty: nothing
    popularity_only: bool = False  # no history to read: score = popularity term alone, answered at level 0

    def __post_init__(self) -> None:
        if len(self.own_items) != len(self.own_counts):
            raise ValueError(f"own_items has {len(self.own_items)} rows but own_counts {len(self.own_counts)}")
        if self.own_terms and len(self.own_items) != len(self.own_terms):
            raise ValueError(f"own_items has {len(self.own_items)} rows but own_terms {len(self.own_terms)}")


class Predict(msgspec.Struct, frozen=True, tag=True):
    """Prediction: heads on the last hidden state and the dense features of the untruncated history."""

    features: tuple[float, ...]


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Training: the last hidden state itself (after the final norm)."""


class ItemScores(msgspec.Struct, frozen=True, tag=True):
    """What an explanation reads of a recommendation: the model's log-probability of each of these items."""

    items: tuple[int, ...]  # item rows
    trie: str = ""  # with codes of one token


class HeadValues(msgspec.Struct, frozen=True, tag=True):
    """What an explanation reads of predictions: the heads' raw values, with dense features of its own for each fork."""

    features: tuple[tuple[float, ...], ...]  # one row per fork


class Explain(msgspec.Struct, frozen=True, tag=True):
    """Explanation: what the model says when it does not see parts of the history.

    Behind the history, the prompt repeats the task's suffix once per *fork*. The suffix of a fork reads the history,
    but for the tokens that are hidden from it, and itself: nothing of the other forks, and at the positions that follow
    the history. So all forks share the history's keys and values, and differ only in what they read of them.
    """

    suffix_tokens: int  # of each fork
    hidden: tuple[tuple[tuple[int, int], ...], ...]  # per fork: spans [start, end) of the prompt, within the history
    reads: ItemScores | HeadValues

    def __post_init__(self) -> None:
        forks = len(self.hidden)
        if self.suffix_tokens < 1 or not forks:
            raise ValueError(f"{forks} forks of {self.suffix_tokens} tokens: at least one of each is needed")
        if isinstance(self.reads, HeadValues) and len(self.reads.features) != forks:
            raise ValueError(f"{len(self.reads.features)} rows of features for {forks} forks")


Task = Generate | Select | Predict | Embed | Explain


class Request(msgspec.Struct, frozen=True):
    """One unit of work for the engine. `tokens` ends with the task's suffix."""

    request_id: str
    service: Service
    tokens: Tokens
    task: Task
    arrival_seconds: float
    deadline_seconds: float | None = None  # absolute; None: the caller set none
    history_tokens: int = 0  # leading tokens that are the customer's prefix
    cache_root: str = ""  # base, bundle version, adapter, tenant: nothing is shared across roots
    tenant: str = ""  # who shares the engine fairly with whom; "" is a tenant like any other
    priority: int = 0  # larger is sooner, within a tenant
    allow_degraded: bool = False  # rather a smaller answer in time than none

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError(f"request {self.request_id}: tokens is empty")
        if isinstance(self.task, Explain):
            check_forks(self.tokens, self.task)
        if not 0 <= self.history_tokens <= len(self.tokens):
            raise ValueError(f"request {self.request_id}: history_tokens {self.history_tokens} outside the prompt")


def forks_start(tokens: int, task: Explain) -> int:
    """The token at which the forks begin, in a prompt of so many tokens."""
    return tokens - task.suffix_tokens * len(task.hidden)


def check_forks(tokens: Sized, task: Explain) -> None:
    """Raises ValueError where spans lie outside the history that the forks share."""
    start = forks_start(len(tokens), task)
    if start < 0:
        raise ValueError(f"{len(task.hidden)} forks of {task.suffix_tokens} tokens in a prompt of {len(tokens)}")
    for spans in task.hidden:
        if any(not 0 <= first < end <= start for first, end in spans):
            raise ValueError(f"a fork hides {spans} of a history of {start} tokens")


class Degradation(StrEnum):
    """What was taken from an answer, with the caller's leave, so that it came in time. Explanations go first."""

    NO_EXPLANATION = "no_explanation"
    NARROWER_BEAMS = "narrower_beams"
    FEWER_TOKENS = "fewer_tokens"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class SelectOutput(msgspec.Struct, frozen=True):
    """Items with the exact terms of their scores: score = model + repeat + popularity + goes_with, in nats; best
    first."""

    items: tuple[int, ...]  # item rows
    scores: tuple[float, ...]
    model: tuple[float, ...]
    repeat: tuple[float, ...]
    popularity: tuple[float, ...]
    goes_with: tuple[float, ...]


class Timings(msgspec.Struct, frozen=True):
    """Seconds since the request's arrival."""

    queue_seconds: float
    first_seconds: float
    total_seconds: float


class TokensOutput(msgspec.Struct, frozen=True, tag=True):
    """New tokens of a chat answer, the first among them unless it was preempted."""

    request_id: str
    tokens: tuple[int, ...]
    cached_tokens: int = 0  # of the prompt; known here too, for answers that a stop string ends


class StepTokensOutput(msgspec.Struct, frozen=True, tag=True):
    """The tokens of a step for the answers that go on, one each; none of them is its answer's first."""

    request_ids: list[str]
    tokens: list[int]  # aligned with request_ids


class FinishedOutput(msgspec.Struct, frozen=True, tag=True):
    """The end of a request that was served. Every request ends with exactly one Finished or Failed."""

    request_id: str
    timings: Timings
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: FinishReason = FinishReason.STOP
    selected: SelectOutput | None = None  # for Select
    # For Predict: head outputs; for Embed: the hidden state; for Explain: what each fork reads, one fork after another.
    values: tuple[float, ...] = ()
    degraded: tuple[Degradation, ...] = ()  # empty: the answer is what was asked for


class FailureKind(StrEnum):
    OVERLOADED = "overloaded"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    INVALID = "invalid"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


class FailedOutput(msgspec.Struct, frozen=True, tag=True):
    """The end of a request that was not served."""

    request_id: str
    kind: FailureKind
    message: str
    reason: str  # stable UPPER_SNAKE code
    retry_seconds: float = 0.0  # when it would be worth trying again; 0: it would not


class StepStats(msgspec.Struct, frozen=True):
    """Counts since the last message, and gauges; the API process turns them into Prometheus metrics."""

    step_seconds: tuple[float, ...] = ()  # one entry per step
    tokens: dict[str, int] = {}  # by service
    rows: dict[str, int] = {}  # by service, summed over the steps
    mixed_steps: int = 0  # steps that served more than one service
    queue_seconds: dict[str, tuple[float, ...]] = {}  # by service, one entry per request first computed
    first_seconds: dict[str, tuple[float, ...]] = {}
    inter_token_seconds: tuple[tuple[float, int], ...] = ()  # and how many tokens had this one
    total_seconds: dict[str, tuple[float, ...]] = {}
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    evicted_pages: int = 0
    failures: dict[str, int] = {}  # "service:kind" -> count
    submitted: dict[str, int] = {}  # by service; each ends in total_seconds or in failures
    refusals: dict[str, int] = {}  # "service:reason" -> count, of the overloaded among the failures
    degraded: dict[str, int] = {}  # "service:degradation" -> count
    preemptions: int = 0
    drafted_tokens: int = 0  # guessed tokens of answers that steps have checked
    accepted_tokens: int = 0  # of these, those that were right
    cost_errors: tuple[float, ...] = ()  # |predicted - measured| / measured, one entry per step
    wait_corrections: dict[str, float] = {}  # by service: the factor on predicted waits that fits those observed
    queued_requests: dict[str, int] = {}
    running_requests: dict[str, int] = {}
    queued_tokens: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_free: int = 0


class StatsOutput(msgspec.Struct, frozen=True, tag=True):
    """Statistics of the engine, sent a few times a second while it works."""

    stats: StepStats


class ReadyOutput(msgspec.Struct, frozen=True, tag=True):
    """The engine is loaded. Sent once, before anything else."""

    pages: int
    page_size: int
    max_context_tokens: int
    backend: str
    tries: dict[str, int]  # name -> items
    trie_depths: dict[str, int]  # name -> codes per item


CallOutput = TokensOutput | FinishedOutput | FailedOutput
EngineOutput = TokensOutput | StepTokensOutput | FinishedOutput | FailedOutput | StatsOutput | ReadyOutput


def by_request(outputs: Iterable[EngineOutput]) -> Iterator[CallOutput]:
    """The outputs that belong to a request, each token of a step as an output of its own."""
    for output in outputs:
        if isinstance(output, StepTokensOutput):
            for request_id, token in zip(output.request_ids, output.tokens, strict=True):
                yield TokensOutput(request_id, (token,))
        elif isinstance(output, TokensOutput | FinishedOutput | FailedOutput):
            yield output


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Compute no more of it. `answered`: its caller has all that was wanted, so it counts as finished."""

    request_id: str
    answered: bool = False


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Finish what was submitted, then exit."""


EngineInput = Submit | Cancel | Drain
