"""What moved an answer: forks of its prompt, asked of the engine behind the answer, and put into words.

The forks are one more request behind the same cached history. It has the call's own tenant, priority and deadline, so
it is admitted, charged, given up and cancelled as any other; `usage` says what it cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from shoplm.api.core import Context, Core
from shoplm.api.warnings import Warnings
from shoplm.attribution import Floats, Forks, Part, likeliest, parts_for, visit_parts
from shoplm.bundle import HeadSpec
from shoplm.errors import EngineUnavailableError, ExpiredError, OverloadedError
from shoplm.features import FEATURE_GROUPS, dense_features, feature_groups
from shoplm.history import History, utc_day
from shoplm.prompt import SUFFIX_TOKENS, Prefix
from shoplm.readout.answers import score_of
from shoplm.request import Degradation, HeadValues, ItemScores, Request, Service
from shoplm.v1 import shop_pb2

MOST_INFLUENCES = 5  # of one item or prediction
LEAST_EFFECT = 0.01  # nats; smaller ones are within what bf16 rounds off
_LEAST_RESERVE, _RESERVED = 0.005, 0.1  # seconds, and share of the time that is left, that an answer keeps for its way

Influence = shop_pb2.Influence


@dataclass(frozen=True)
class Explanation:
    """What moved each column of an answer: an item, or a target."""

    influences: Sequence[Sequence[shop_pb2.Influence]]  # one list per column
    tokens: int = 0  # that were computed for it
    degraded: tuple[Degradation, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """The answer that is to be explained."""

    service: Service
    history: History
    prefix: Prefix
    context: Context = field(repr=False)
    allow_degraded: bool


class Explainer:
    """Explains the answers of both services."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def can_explain(self, history: History, prefix: Prefix, warnings: Warnings, *, items: bool) -> bool:
        """Whether there is something to read; a warning says where it cannot be."""
        core = self._core
        shop = core.shop()
        if not shop.knows(history) or self._room(prefix) < 1 or (items and shop.manifest.depth > 1):
            warnings.add("NOT_EXPLAINED")
            return False
        return True

    def _room(self, prefix: Prefix) -> int:
        """Parts that may be tried: as many as are allowed, and fit into the context behind the whole answer's fork and
        those without a habit."""
        core = self._core
        forks = (core.ready().max_context_tokens - len(prefix.tokens)) // SUFFIX_TOKENS
        return min(core.config.explanation_forks, forks - 1 - len(FEATURE_GROUPS))

    def dropped(self, service: Service, columns: int) -> Explanation:
        """None, where the answer would not be in time with it, or the engine was lost; also counted in the metrics."""
        degradation = Degradation.NO_EXPLANATION
        self._core.metrics.degraded.labels(service.value, degradation.value).inc()
        return Explanation([()] * columns, degraded=(degradation,))

    async def items(self, asked: Asked, rows: Sequence[int]) -> Explanation:
        """What moved the score of each of these items."""
        history, prompts = asked.history, self._core.served.prompts
        most, visits = self._room(asked.prefix), prompts.visits(history, asked.prefix)
        categories = self._core.shop().catalog.categories
        parts = parts_for(rows, history, visits, categories, items=most - most // 4, lately=most // 4)
        forks = Forks.of(history, asked.prefix, parts, prompts.recommend_suffix)
        read, tokens = await self._read(asked, forks, ItemScores(tuple(rows)))
        if read is None:
            return self.dropped(asked.service, len(rows))
        other = np.array([self._habit_terms(each, rows) for each in forks.histories])
        model = read[0] - read[1:]
        effects = model + other[0] - other[1:]
        names = [self._named(part, history) for part in forks.parts]
        return Explanation(
            [_strongest(names, effects[:, at], model[:, at]) for at in range(len(rows))],
            tokens,
        )

    async def targets(self, asked: Asked, specs: Sequence[HeadSpec]) -> Explanation:
        """What moved each prediction."""
        core, history = self._core, asked.history
        shop, prompts = core.shop(), core.served.prompts
        visits = likeliest(visit_parts(prompts.visits(history, asked.prefix)), history, self._room(asked.prefix))
        groups = feature_groups()
        # A fork that hides nothing, with other features, is one without a habit.
        forks = Forks.of(history, asked.prefix, visits, prompts.predict_suffix).repeated(len(groups))
        features = [tuple(dense_features(each, shop.catalog.prices).tolist()) for each in forks.histories]
        for at, members in enumerate(groups.values(), start=len(features) - len(groups)):
            usual = np.array(features[0], np.float32)
            usual[list(members)] = shop.feature_means[list(members)]
            features[at] = tuple(usual.tolist())
        read, tokens = await self._read(asked, forks, HeadValues(tuple(features)))
        if read is None:
            return self.dropped(asked.service, len(specs))
        names = [self._named(part, history) for part in forks.parts[: -len(groups)]]
        names += [Influence(kind=Influence.KIND_HABIT, title=group) for group in groups]
        scores = np.array([[score_of(spec, row) for spec in specs] for row in read.tolist()])
        effects = scores[0] - scores[1:]
        return Explanation([_strongest(names, column) for column in effects.T], tokens)

    def _habit_terms(self, history: History, rows: Sequence[int]) -> Floats:
        """What the score of each item has beside the model's term that depends on the history."""
        shop = self._core.shop()
        return shop.habits.beside(shop.own_items(history), rows).astype(np.float64)

    async def _read(self, asked: Asked, forks: Forks, reads: ItemScores | HeadValues) -> tuple[Floats | None, int]:
        """What each fork read, and tokens; None where the caller is better off without."""
        core = self._core
        request = core.request(
            asked.service,
            forks.tokens[len(asked.prefix.tokens) :],
            forks.task(reads),
            asked.context,
            prefix=asked.prefix,
            allow_degraded=asked.allow_degraded,
        )
        if asked.allow_degraded:
            request = _in_reserve(request)
        try:
            finished = await core.engine.run(request)
        except (OverloadedError, ExpiredError, EngineUnavailableError):
            if not asked.allow_degraded:
                raise
            return None, 0
        core.metrics.calls.used(asked.service.value, len(forks.tokens), finished.cached_tokens, 0)
        return forks.values(finished.values), len(forks.tokens) - finished.cached_tokens

    def _named(self, part: Part, history: History) -> shop_pb2.Influence:
        """The part without its effect."""
        catalog, events = self._core.shop().catalog, list(part.events)
        newest = float(history.time[events].max())
        visits = len(np.unique(history.basket[events]))
        if part.is_visit:
            title = f"the visit of {utc_day(newest)} ({len(events)} item{'s' if len(events) > 1 else ''})"
            return Influence(kind=Influence.KIND_VISIT, title=title, time=_timestamp(newest), visits=visits)
        row, known = int(history.item[events[0]]), bool(history.has_item[events[0]])
        return Influence(
            kind=Influence.KIND_ITEM,
            item_id=catalog.item_ids[row] if known else "",
            title=catalog.event_title(row, known),
            time=_timestamp(newest),
            visits=visits,
        )


def _strongest(
    names: Sequence[shop_pb2.Influence], effects: Floats, model: Floats | None = None
) -> list[shop_pb2.Influence]:
    """Those of the largest effects, in order; none that is within the rounding. `model` is the model's share."""
    found = []
    for index in np.argsort(-np.abs(effects), kind="stable")[:MOST_INFLUENCES].tolist():
        effect = float(effects[index])
        if abs(effect) < LEAST_EFFECT:
            break
        influence = Influence()
        influence.CopyFrom(names[index])
        influence.effect, influence.text = effect, _text(names[index], effect)
        if model is not None:
            influence.model_effect = float(model[index])
        found.append(influence)
    return found


def _text(influence: shop_pb2.Influence, effect: float) -> str:
    change = f"{'raises' if effect > 0 else 'lowers'} it by {abs(effect):.2f}"
    if influence.kind != Influence.KIND_ITEM:
        return f"{influence.title} {change}"
    last = utc_day(influence.time.ToSeconds())
    when = f"on {last}" if influence.visits == 1 else f"in {influence.visits} visits, last on {last}"
    return f"{influence.title}, {when}, {change}"


def _in_reserve(request: Request) -> Request:
    """The same, but given up early enough for the answer without it to be in time."""
    deadline = request.deadline_seconds
    if deadline is None:
        return request
    reserve = max(_LEAST_RESERVE, _RESERVED * (deadline - request.arrival_seconds))
    return msgspec.structs.replace(request, deadline_seconds=deadline - reserve)


def _timestamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
