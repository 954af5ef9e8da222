"""One run of `shoplm score`: questions, an engine, parts, the output."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from shoplm.config import ServerConfig
from shoplm.engine.client import EngineClient
from shoplm.errors import ConfigurationError
from shoplm.history import EVENT_KINDS, utc_moment
from shoplm.model.base import Base
from shoplm.served import Served, Shop, load_served
from shoplm.training.problems import Problem
from shoplm.training.score.parts import PART_QUESTIONS, Parts
from shoplm.training.score.questions import Questions, read_questions
from shoplm.training.score.scorer import Scorer

EngineFactory = Callable[[ServerConfig, Base], EngineClient]


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What `shoplm score` was asked for."""

    customers: Path
    events: Path | None
    out: Path
    count: int
    as_of: float | None  # Unix seconds; None: now
    timezone: str
    resume: bool


async def score(
    request: ScoreRequest,
    config: ServerConfig,
    base: Base,
    make_engine: EngineFactory,
    progress: Callable[[int, int], None],
    report: Callable[[tuple[Problem, ...]], None],
    say: Callable[[str], None],
) -> int:
    """Writes the output and returns its rows. `progress` gets (questions answered, questions), `report` what is wrong
    with the files, before the engine starts, `say` a line for people. Raises ConfigurationError for files or a bundle
    that cannot be used."""
    served = load_served(base, config.bundle, verify=config.verify_bundle)
    if served.shop is None:
        raise ConfigurationError("scoring needs a bundle: give --bundle")
    if not 1 <= request.count <= config.max_count:
        raise ConfigurationError(f"--count is {request.count}, expected 1 to {config.max_count} (max_count)")
    parts = Parts(request.out)
    if not request.resume:
        parts.discard()
    now, whole = time.time(), (served, served.shop, request)

    def moment(fingerprint: str) -> float:
        """A run that goes on must see customers from the moment that it began with."""
        as_of, goes_on = parts.open(_fingerprint(*whole, fingerprint), request.as_of, now)
        if goes_on:
            seen = "" if request.as_of is not None else f", which sees customers from {utc_moment(as_of)}"
            say(f"going on with the run that was stopped{seen}; --no-resume starts anew")
        return as_of

    questions = read_questions(
        request.customers,
        request.events,
        served.shop.catalog,
        served.shop.manifest.prompt.attributes,
        counted=EVENT_KINDS[served.shop.manifest.recommends],
        moment=moment,
        timezone=request.timezone,
        now=now,
    )
    report(questions.problems)
    engine = make_engine(config, base)
    try:
        await engine.start()
        scorer = Scorer(served, served.shop, engine, request.count, config.default_beam_width)
        await _answer(scorer, questions, parts, progress)
    finally:
        await engine.close()
    schema: dict[str, Any] = scorer.schema
    return parts.finish(schema)


async def _answer(scorer: Scorer, questions: Questions, parts: Parts, progress: Callable[[int, int], None]) -> None:
    answered = 0

    def done(count: int = 1) -> None:
        nonlocal answered
        answered += count
        progress(answered, len(questions))

    for start in range(0, len(questions), PART_QUESTIONS):
        asked = questions.asked[start : start + PART_QUESTIONS]
        if parts.has(start):
            done(len(asked))
        else:
            parts.write(start, await scorer.score(questions, asked, done))


def _fingerprint(served: Served, shop: Shop, request: ScoreRequest, asked: str) -> str:
    parts = (served.cache_root, msgspec.to_builtins(shop.manifest), asked, request.count, request.timezone)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
