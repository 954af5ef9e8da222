"""Asks the engine: per question one selection and one prediction, which share the history's pages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import polars as pl
from shoplm.bundle import HeadSpec
from shoplm.features import dense_features
from shoplm.history import History
from shoplm.readout.answers import Answer, answer, applies, seconds_since_purchase, usual
from shoplm.readout.targets import PROBABILITIES
from shoplm.request import FinishedOutput, Predict, Request, Select, Service, Task, token_ids
from shoplm.served import Served, Shop
from shoplm.training.score.questions import Question, Questions

IN_FLIGHT = 64  # questions the engine has at once: enough to fill its steps, few enough for its queue


class Engine(Protocol):
    """What scoring needs of `shoplm.engine.client.EngineClient`."""

    async def run(self, request: Request) -> FinishedOutput: ...


@dataclass(frozen=True)
class Scorer:
    """Scores questions with one bundle."""

    served: Served
    shop: Shop
    engine: Engine
    count: int  # items per question
    beam_width: int

    @property
    def schema(self) -> dict[str, Any]:
        """Columns of the answer and their types."""
        columns: dict[str, Any] = {
            "number": pl.UInt32,
            "customer_id": pl.String,
            "as_of": pl.Datetime("us", "UTC"),
            "items": pl.List(pl.String),
            "scores": pl.List(pl.Float32),
        }
        for spec in self.shop.targets:
            columns |= dict.fromkeys(target_columns(spec), pl.Float64)
        return columns

    async def score(self, questions: Questions, asked: Sequence[Question], done: Callable[[], None]) -> pl.DataFrame:
        """Answers to some of the questions, in their order; `done` is called after each. Raises the ShopLMError of
        the first request that fails, after cancelling the others."""
        room = asyncio.Semaphore(IN_FLIGHT)

        async def one(question: Question) -> dict[str, object]:
            async with room:
                row = await self._answer(question, questions.history(question))
            done()
            return row

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(question)) for question in asked]
        except ExceptionGroup as failures:
            # The first one is why; the others were under way when the engine was lost.
            raise failures.exceptions[0] from failures
        frame = pl.DataFrame([task.result() for task in tasks], schema={**self.schema, "as_of": pl.Float64})
        moment = pl.from_epoch((pl.col("as_of") * 1e6).round().cast(pl.Int64), time_unit="us")
        return frame.with_columns(moment.dt.replace_time_zone("UTC").alias("as_of"))

    async def _answer(self, question: Question, history: History) -> dict[str, object]:
        prompts = self.served.prompts
        prefix = prompts.prefix(history)
        own = self.shop.own_items(history)
        knows = self.shop.knows(history)
        select = Select(
            count=min(self.count, len(self.shop.catalog)),
            beam_width=max(self.beam_width, min(self.count, len(self.shop.catalog))),
            own_items=own.items,
            own_counts=own.counts,
            own_terms=own.terms,
            popularity_only=not knows,
        )
        asked: list[tuple[Service, tuple[int, ...], Task]] = [
            (Service.RECOMMENDATION, prompts.recommend(prefix, history), select)
        ]
        if self.shop.targets and knows:
            predict = Predict(tuple(dense_features(history, self.shop.catalog.prices).tolist()))
            asked.append((Service.PREDICTION, prompts.predict(prefix, history), predict))
        found = await asyncio.gather(
            *(
                self.engine.run(
                    Request(
                        request_id=f"{service.value}-{question.number}",
                        service=service,
                        tokens=token_ids(tokens),
                        task=task,
                        arrival_seconds=time.monotonic(),
                        history_tokens=len(prefix.tokens),
                        cache_root=self.served.cache_root,
                    )
                )
                for service, tokens, task in asked
            )
        )
        selected = found[0].selected
        assert selected is not None
        row: dict[str, object] = {
            "number": question.number,
            "customer_id": question.customer_id,
            "as_of": question.as_of,
            "items": [self.shop.catalog.item_ids[item] for item in selected.items],
            "scores": list(selected.scores),
        }
        for spec in self.shop.targets:
            row |= _predicted(spec, answer(spec, found[1].values) if knows else usual(spec), history)
        return row


def target_columns(spec: HeadSpec) -> tuple[str, ...]:
    """The columns of one target: a probability, or an amount with the ends of its 90 % interval where it has one."""
    name = f"{spec.kind}_{spec.campaign_type}" if spec.campaign_type else f"{spec.kind}_{spec.horizon_days}d"
    return (name,) if spec.transform in PROBABILITIES else (name, f"{name}_low", f"{name}_high")


def _predicted(spec: HeadSpec, found: Answer, history: History) -> dict[str, float | None]:
    """Null where the target does not apply, such as churn of someone who has not bought for long."""
    columns = target_columns(spec)
    if not applies(spec, seconds_since_purchase(history)):
        return dict.fromkeys(columns)
    if found.probability is not None:
        return {columns[0]: found.probability}
    return dict(zip(columns, (found.amount, found.interval_low, found.interval_high), strict=True))
