"""What moved an answer: forks of its prompt, asked of the engine behind the answer, and put into words.

The forks are one more request behind the same cached history. It has the call's own tenant, priority and deadline, so
it is admitted, charged, given up and cancelled as any other; `usage` says what it cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from shoplm.api.core import Context, Core
from shoplm.api.warnings import Warnings
from shoplm.attribution import (
    Floats,
    Part,
    PartKind,
    category_parts,
    fork_values,
    forked,
    item_parts,
    likeliest,
    visit_parts,
)
from shoplm.bundle import HeadSpec
from shoplm.errors import ExpiredError, OverloadedError
from shoplm.features import feature_groups
from shoplm.history import History
from shoplm.prompt import Prefix
from shoplm.readout.targets import score_of
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
    prompt: tuple[int, ...]
    context: Context = field(repr=False)
    allow_degraded: bool


class Explainer:
    """Explains the answers of both services."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def can_explain(self, history: History, warnings: Warnings, *, items: bool) -> bool:
        """Whether there is something to read; a warning says where it cannot be."""
        core = self._core
        if not len(history):
            return False
        served = core.config.explanation_forks > 0 and core.ready().can_explain
        if not served or (items and core.shop().manifest.depth > 1):
            warnings.add("NOT_EXPLAINED")
            return False
        return True

    async def items(self, asked: Asked, rows: Sequence[int]) -> Explanation:
        """What moved the model's log-probability of each of these items."""
        history, catalog = asked.history, self._core.shop().catalog
        visits = self._core.served.prompts.visits(history, asked.prefix)
        categories = {catalog.categories[row] for row in rows}

        def related(event: int) -> bool:
            return bool(history.has_item[event]) and catalog.categories[history.item[event]] in categories

        most = self._core.config.explanation_forks
        wide = likeliest(category_parts(history, visits, catalog), history, most // 2)
        parts = wide + likeliest(item_parts(history, visits), history, most - len(wide), related)
        values, tokens = await self._read(asked, parts, ItemScores(tuple(rows)))
        if values is None:
            return _dropped(len(rows))
        effects = values[0] - values[1:]
        names = [self._named(part, history) for part in parts]
        return Explanation([_strongest(names, column, _item_text) for column in effects.T], tokens)

    async def targets(self, asked: Asked, specs: Sequence[HeadSpec]) -> Explanation:
        """What moved each prediction."""
        core, history = self._core, asked.history
        visits = visit_parts(core.served.prompts.visits(history, asked.prefix))
        parts = likeliest(visits, history, core.config.explanation_forks)
        features, means = core.features(history), core.shop().feature_means
        groups = feature_groups()
        usual = []
        for members in groups.values():
            replaced = np.array(features, np.float32)
            replaced[list(members)] = means[list(members)]
            usual.append(tuple(replaced.tolist()))
        # A fork that hides nothing, with other features, is one without a habit.
        nothing = [Part(PartKind.VISIT, (), ())] * len(groups)
        rows = HeadValues((features,) * (1 + len(parts)) + tuple(usual))
        values, tokens = await self._read(asked, [*parts, *nothing], rows)
        if values is None:
            return _dropped(len(specs))
        names = [self._named(part, history) for part in parts] + [_habit(group) for group in groups]
        scores = np.array([[score_of(spec, row) for spec in specs] for row in values.tolist()])
        effects = scores[0] - scores[1:]
        return Explanation([_strongest(names, column, _target_text) for column in effects.T], tokens)

    async def _read(
        self, asked: Asked, parts: Sequence[Part], reads: ItemScores | HeadValues
    ) -> tuple[Floats | None, int]:
        """What each fork read, the first without nothing, and tokens; None where the caller is better off without."""
        core = self._core
        tokens, task = forked(asked.prompt, len(asked.prefix.tokens), parts, reads)
        request = core.request(
            *(asked.service, tokens, task, asked.context),
            history_tokens=len(asked.prefix.tokens),
            allow_degraded=asked.allow_degraded,
        )
        if asked.allow_degraded:
            request = _in_reserve(request)
        try:
            finished = await core.engine.run(request)
        except (OverloadedError, ExpiredError):
            if not asked.allow_degraded:
                raise
            return None, 0
        computed = len(tokens) - finished.cached_tokens
        core.metrics.observe_usage(asked.service.value, len(tokens), finished.cached_tokens, 0)
        return fork_values(finished.values, len(task.hidden)), computed

    def _named(self, part: Part, history: History) -> shop_pb2.Influence:
        """The part without its effect."""
        catalog = self._core.shop().catalog
        event = part.events[-1]
        row, known = int(history.item[event]), bool(history.has_item[event])
        newest = float(history.time[list(part.events)].max())
        named = Influence(time=_timestamp(newest), visits=len(np.unique(history.basket[list(part.events)])))
        match part.kind:
            case PartKind.ITEM:
                named.kind = Influence.KIND_ITEM
                named.item_id = catalog.item_ids[row] if known else ""
                named.title = catalog.titles[row] if known else catalog.type_texts[row].strip()
            case PartKind.CATEGORY:
                named.kind = Influence.KIND_CATEGORY
                named.title = catalog.categories[row] if known else catalog.type_texts[row].strip()
            case PartKind.VISIT:
                named.kind = Influence.KIND_VISIT
                named.title = f"the visit of {_day(newest)}, {len(part.events)} items"
        return named


def _strongest(
    names: Sequence[shop_pb2.Influence], effects: Floats, text: Callable[[shop_pb2.Influence], str]
) -> list[shop_pb2.Influence]:
    """Those of the largest effects, in order; none that is within the rounding."""
    found = []
    for index in np.argsort(-np.abs(effects), kind="stable")[:MOST_INFLUENCES].tolist():
        if abs(effects[index]) >= LEAST_EFFECT:
            influence = Influence()
            influence.CopyFrom(names[index])
            influence.effect = float(effects[index])
            influence.text = text(influence)
            found.append(influence)
    return found


def _item_text(influence: shop_pb2.Influence) -> str:
    return f"{_what(influence)}: makes the item {np.exp(influence.effect):.2f} times as likely for the model"


def _target_text(influence: shop_pb2.Influence) -> str:
    return f"{_what(influence)}: {'raises' if influence.effect > 0 else 'lowers'} it"


def _what(influence: shop_pb2.Influence) -> str:
    if influence.kind not in (Influence.KIND_ITEM, Influence.KIND_CATEGORY):
        return influence.title
    last = _day(influence.time.ToSeconds())
    name = influence.title if influence.kind == Influence.KIND_ITEM else f"everything of {influence.title}"
    return f"{name}, on {last}" if influence.visits == 1 else f"{name}, in {influence.visits} visits, last on {last}"


def _habit(group: str) -> shop_pb2.Influence:
    return Influence(kind=Influence.KIND_HABIT, title=group)


def _dropped(columns: int) -> Explanation:
    return Explanation([[]] * columns, degraded=(Degradation.NO_EXPLANATION,))


def _in_reserve(request: Request) -> Request:
    """The same, but given up early enough for the answer without it to be in time."""
    deadline = request.deadline_seconds
    if deadline is None:
        return request
    reserve = max(_LEAST_RESERVE, _RESERVED * (deadline - request.arrival_seconds))
    return msgspec.structs.replace(request, deadline_seconds=deadline - reserve)


def _timestamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
