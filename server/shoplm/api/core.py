"""What the services share: the shop, the engine, and the way from a prompt to a `Request` and back to `Usage`."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import grpc.aio
from shoplm.api.caller import caller
from shoplm.api.customer_cache import Memo
from shoplm.api.customers import CustomerReader
from shoplm.api.warnings import Warnings
from shoplm.config import ServerConfig
from shoplm.errors import EngineUnavailableError, InvalidRequestError, NotServingError
from shoplm.features import dense_features
from shoplm.history import History
from shoplm.logs import request_id
from shoplm.metrics import Metrics
from shoplm.model.origin import Origin
from shoplm.prompt import Prefix
from shoplm.readout.answers import last_purchase
from shoplm.readout.rebuy import OwnItems
from shoplm.request import (
    NEAR_LANES,
    OWN_LANES,
    Degradation,
    FinishedOutput,
    ReadyOutput,
    Request,
    Service,
    Task,
    TokensOutput,
    token_ids,
)
from shoplm.served import Served, Shop
from shoplm.v1 import shop_pb2

_DEGRADATIONS = {
    Degradation.NO_EXPLANATION: shop_pb2.DEGRADATION_NO_EXPLANATION,
    Degradation.NARROWER_BEAMS: shop_pb2.DEGRADATION_NARROWER_BEAMS,
    Degradation.FEWER_TOKENS: shop_pb2.DEGRADATION_FEWER_TOKENS,
}

_NOBODYS = Prefix((), 0)

Context = grpc.aio.ServicerContext[Any, Any]


class Engine(Protocol):
    """What the services need of `shoplm.engine.client.EngineClient`."""

    @property
    def ready(self) -> ReadyOutput | None: ...

    def generate(self, request: Request) -> AsyncGenerator[TokensOutput | FinishedOutput]:
        """Submits; the last item is the FinishedOutput. Closing or cancelling it cancels the request."""
        ...

    def answered(self, request_id: str) -> None:
        """Before the generator is closed: the caller has all it wanted, and the request counts as finished."""
        ...

    async def run(self, request: Request) -> FinishedOutput:
        """Submits and waits for the end."""
        ...


@dataclass(frozen=True)
class Core:
    """Given to every service."""

    served: Served
    engine: Engine
    config: ServerConfig
    metrics: Metrics
    customers: CustomerReader
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @cached_property
    def model_version(self) -> shop_pb2.ModelVersion:
        """What every response names."""
        return shop_pb2.ModelVersion(**self.served.model_version._asdict())

    @cached_property
    def prefix(self) -> Memo[History, Prefix]:
        """The customer's part of the prompt; the same at every moment after the last event."""
        return Memo(self.served.prompts.prefix, lambda history: history.time)

    @cached_property
    def features(self) -> Memo[History, tuple[float, ...]]:
        """What the heads read beside the hidden state. Raises NotServingError without a bundle."""
        prices = self.shop().catalog.prices
        return Memo(lambda history: tuple(dense_features(history, prices).tolist()), lambda history: history)

    @cached_property
    def last_purchase(self) -> Memo[History, float]:
        """When a customer last bought, in Unix seconds; the same at every moment after the last event."""
        return Memo(last_purchase, lambda history: history.time)

    @cached_property
    def own_items(self) -> Memo[History, OwnItems]:
        """What scores read of the customer's purchases."""
        return Memo(self.shop().own_items, lambda history: history)

    def shop(self) -> Shop:
        """The bundle. Raises NotServingError without one."""
        if self.served.shop is None:
            raise NotServingError("this server has no bundle and serves chat only; start it with --bundle")
        return self.served.shop

    @property
    def max_candidates(self) -> int:
        """Items of one Rank call. Where their codes have several tokens, a step holds a lane for each of them."""
        config, shop = self.config, self.served.shop
        one_token = shop is None or shop.manifest.depth == 1
        return config.max_candidates if one_token else min(config.max_candidates, config.max_step_tokens)

    def max_beam_width(self, depth: int) -> int:
        """The widest search over codes of so many tokens. A step holds its beams, and the items that ride along."""
        most, lanes = self.config.max_beam_width, OWN_LANES + NEAR_LANES
        return most if depth == 1 else min(most, self.config.max_step_tokens - lanes)

    def check_chat(self) -> None:
        """Raises NotServingError where the base has no words."""
        if self.served.base.origin is Origin.SCRATCH:
            raise NotServingError(
                "this bundle's base was trained on the shop's log alone and cannot chat; train one on a language model"
            )

    def ready(self) -> ReadyOutput:
        """Raises EngineUnavailableError while the engine has never been loaded."""
        ready = self.engine.ready
        if ready is None:
            raise EngineUnavailableError("the engine is starting")
        return ready

    def request(
        self,
        service: Service,
        suffix: tuple[int, ...],
        task: Task,
        context: Context,
        *,
        prefix: Prefix = _NOBODYS,
        cache_root: str | None = None,
        allow_degraded: bool = False,
    ) -> Request:
        """A request that arrives now, with the call's own deadline, tenant and priority. `suffix` follows the
        customer's prefix."""
        now, who = time.monotonic(), caller.get()
        root = self.served.cache_root if cache_root is None else cache_root
        remaining = context.time_remaining()
        return Request(
            # Two calls may carry the same id; the engine needs one that is unique.
            request_id=f"{request_id.get() or 'call'}#{next(self._numbers)}",
            service=service,
            tokens=prefix.packed + token_ids(suffix),
            task=task,
            arrival_seconds=now,
            deadline_seconds=None if remaining is None else now + remaining,
            history_tokens=len(prefix.tokens),
            # How fast an answer comes tells what is cached: no tenant learns that of another.
            cache_root=f"{root}|{who.tenant}" if who.tenant else root,
            tenant=who.tenant,
            priority=who.priority,
            allow_degraded=allow_degraded,
        )

    def check_prompt(self, field_path: str, tokens: int, produced: int = 0) -> None:
        """Raises InvalidRequestError naming the field if the prompt leaves no room for `produced` tokens."""
        limit = self.ready().max_context_tokens - produced
        if tokens > limit:
            raise InvalidRequestError(
                (
                    field_path,
                    f"the prompt takes {tokens} tokens, at most {limit} are allowed "
                    "(max_context_tokens or kv_cache_mib)",
                )
            )

    def usage(self, request: Request, cached: int, completion: int) -> shop_pb2.Usage:
        """What an answered request cost, without an explanation's tokens; also counted in the metrics."""
        self.fill_usage(usage := shop_pb2.Usage(), request, cached, completion)
        return usage

    def fill_usage(self, usage: shop_pb2.Usage, request: Request, cached: int, completion: int) -> None:
        """`usage`, in place."""
        prompt = len(request.tokens)
        self.metrics.calls.used(request.service, prompt, cached, completion)
        usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens = prompt, cached, completion
        usage.history_tokens = request.history_tokens

    def warned(self, service: Service, warnings: Warnings) -> list[shop_pb2.Warning]:
        """The warnings for the response; also counted in the metrics."""
        for code in warnings.codes():
            self.metrics.warnings.labels(service.value, code).inc()
        return warnings.messages()

    def degraded(self, degradations: Sequence[Degradation]) -> list[shop_pb2.Degradation.ValueType]:
        """What was taken from the answer, as responses name it."""
        return [_DEGRADATIONS[degradation] for degradation in degradations]
