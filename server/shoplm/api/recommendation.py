"""RecommendationService: the best items of the catalogue for a customer, or the scores of given ones."""

from __future__ import annotations

import msgspec
from shoplm.api.core import Context, Core
from shoplm.api.customers import MAX_ID_BYTES
from shoplm.api.explanations import Asked, Explainer, Explanation
from shoplm.api.filters import excluded_rows, read_filter
from shoplm.api.reasons import reasons
from shoplm.api.validation import Violations
from shoplm.api.warnings import Warnings
from shoplm.history import History
from shoplm.request import FinishedOutput, Select, SelectOutput, Service
from shoplm.served import Shop
from shoplm.v1 import recommendation_pb2 as pb
from shoplm.v1.recommendation_pb2_grpc import RecommendationServiceServicer
from shoplm.v1.shop_pb2 import Usage

DEFAULT_COUNT = 10
NAMED_SOURCES = 3  # own items that a reason names
_SERVICE = Service.RECOMMENDATION


class RecommendationService(RecommendationServiceServicer):
    """See protos/shoplm/v1/recommendation.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._explainer = Explainer(core)

    async def Recommend(self, request: pb.RecommendRequest, context: Context) -> pb.RecommendResponse:
        shop, config = self._core.shop(), self._core.config
        violations, warnings = Violations(), Warnings()
        history = self._core.customers.read(request.customer, violations, warnings)
        violations.at_most("count", request.count, config.max_count, "max_count")
        widest = self._core.max_beam_width(shop.manifest.depth)
        violations.at_most("beam_width", request.beam_width, widest, "max_beam_width, max_step_tokens")
        item_filter = read_filter(request.filter, shop.catalog, config, violations)
        excluded = excluded_rows(request.filter, shop.catalog, history, config, violations, warnings)
        violations.raise_if_any()
        count = min(request.count or DEFAULT_COUNT, len(shop.catalog))
        select = Select(
            count=count,
            # A search narrower than its answer might not fill it.
            beam_width=min(max(request.beam_width or config.default_beam_width, count), widest),
            item_filter=item_filter,
            exclude_items=excluded,
        )
        response = pb.RecommendResponse()
        await self._answer(response, request, select, history, context, warnings)
        return response

    async def Rank(self, request: pb.RankRequest, context: Context) -> pb.RankResponse:
        shop = self._core.shop()
        violations, warnings = Violations(), Warnings()
        history = self._core.customers.read(request.customer, violations, warnings)
        if not request.item_ids:
            violations.add("item_ids", "is empty; give the items to score")
        if violations.length("item_ids", request.item_ids, self._core.max_candidates, "max_candidates"):
            for index, item_id in enumerate(request.item_ids):
                violations.text(f"item_ids[{index}]", item_id, MAX_ID_BYTES, required=True)
        violations.raise_if_any()
        found = [shop.catalog.rows.get(item_id) for item_id in request.item_ids]
        candidates = tuple(sorted({row for row in found if row is not None}))
        warnings.add("UNKNOWN_ITEM", found.count(None))
        if not candidates:
            return pb.RankResponse(
                model=self._core.model_version, usage=Usage(), warnings=self._core.warned(_SERVICE, warnings)
            )
        select = Select(count=len(candidates), beam_width=0, candidates=candidates)
        response = pb.RankResponse()
        await self._answer(response, request, select, history, context, warnings)
        return response

    async def _answer(
        self,
        response: pb.RecommendResponse | pb.RankResponse,
        request: pb.RecommendRequest | pb.RankRequest,
        wanted: Select,
        history: History,
        context: Context,
        warnings: Warnings,
    ) -> None:
        """Fill the response to a selection, which knows nothing of the customer yet."""
        core, shop = self._core, self._core.shop()
        own, prefix = core.own_items(history), core.prefix(history)
        select = msgspec.structs.replace(
            wanted,
            own_items=own.items,
            own_counts=own.counts,
            own_terms=own.terms,
            popularity_only=not shop.knows(history),
        )
        warnings.add("HISTORY_TRUNCATED", prefix.truncated_baskets)
        warnings.add("EMPTY_HISTORY", int(select.popularity_only))
        suffix = core.served.prompts.recommend_suffix(history)
        core.check_prompt("customer", len(prefix.tokens) + len(suffix), shop.manifest.depth - 1)
        work = core.request(_SERVICE, suffix, select, context, prefix=prefix, allow_degraded=request.allow_degraded)
        finished = await core.engine.run(work)
        selected = finished.selected
        if selected is None:
            raise RuntimeError("the engine answered a selection without items")
        core.fill_usage(response.usage, work, finished.cached_tokens, finished.completion_tokens)
        why = Explanation([()] * len(selected.items))
        if request.explain and selected.items:
            asked = Asked(_SERVICE, history, prefix, context, request.allow_degraded)
            why = await self._explain(asked, finished, selected, warnings)
        response.usage.explanation_tokens = why.tokens
        response.items.extend(_items(shop, select, selected, history, request.explain, why))
        response.model.CopyFrom(core.model_version)
        response.warnings.extend(core.warned(_SERVICE, warnings))
        response.degradations.extend(core.degraded((*why.degraded, *finished.degraded)))

    async def _explain(
        self, asked: Asked, finished: FinishedOutput, selected: SelectOutput, warnings: Warnings
    ) -> Explanation:
        """What moved the model's terms of the selected items."""
        if not self._explainer.can_explain(asked.history, asked.prefix, warnings, items=True):
            return Explanation([()] * len(selected.items))
        if finished.degraded:  # there was no time for the answer itself
            return self._explainer.dropped(_SERVICE, len(selected.items))
        return await self._explainer.items(asked, selected.items)


def _items(
    shop: Shop, select: Select, selected: SelectOutput, history: History, explain: bool, why: Explanation
) -> list[pb.RecommendedItem]:
    catalog = shop.catalog
    items = []
    for index, (row, score) in enumerate(zip(selected.items, selected.scores, strict=True)):
        item = pb.RecommendedItem(
            item_id=catalog.item_ids[row], title=catalog.titles[row], category=catalog.categories[row], score=score
        )
        price = float(catalog.prices[row])
        if price == price:  # NaN: unknown
            item.price = price
        if explain:
            near = shop.habits.sources(row, select.own_items, select.own_counts, NAMED_SOURCES)
            titles = [catalog.titles[each] for each in near]
            item.reasons.extend(reasons(selected, index, history, titles, is_read=not select.popularity_only))
            item.influences.extend(why.influences[index])
        items.append(item)
    return items
