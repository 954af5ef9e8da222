"""How true explanations are: their effects beside those of a history that is computed again without the part.

Everything is asked of the engine that serves, through its prefix cache, so a history without a part costs no more than
what lies behind the part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from shoplm.attribution import Floats, Forks, Part, gone_with, leave_out, parts_for, prefix_without
from shoplm.bundle import HeadSpec
from shoplm.engine.engine import Engine
from shoplm.features import dense_features
from shoplm.history import SECONDS_PER_DAY, History
from shoplm.model.backend import Backend
from shoplm.model.weights import DecoderWeights
from shoplm.prompt import Prefix, PromptBuilder
from shoplm.readout.answers import score_of
from shoplm.request import (
    Explain,
    FailedOutput,
    FinishedOutput,
    HeadValues,
    ItemScores,
    Request,
    Select,
    Service,
    Task,
    token_ids,
)
from shoplm.scheduler.config import SchedulerConfig
from shoplm.served import Shop as ServedShop
from shoplm.training.report import Deletion, ExplanationResult, known
from shoplm.training.shop import Shop

ITEM_PARTS, VISIT_PARTS = 8, 8  # of an explanation here; the server tries more, which would only take longer
ITEMS = 3  # recommendations explained per customer
DELETED = 3
LEAST_VISITS = 5  # of a customer, for there to be something to compare
_NEAREST = 5  # items like a cited one, among which its match is drawn

Advance = Callable[[int, int], None]  # customers done, customers


def shuffled(weights: DecoderWeights, seed: int) -> DecoderWeights:
    """Every matrix of the layers with its numbers in random order: as large, and knowing nothing."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(matrix: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(matrix.numel(), generator=generator)
        return matrix.flatten()[order].view(matrix.shape)

    return replace(weights, layers=tuple(layer.with_products(shuffle) for layer in weights.layers))


class Asker:
    """Runs requests to their end on an engine of its own."""

    def __init__(self, backend: Backend) -> None:
        self._engine = Engine(backend, SchedulerConfig())
        self._asked = 0

    def ask(self, work: Sequence[tuple[tuple[int, ...], Task]]) -> list[FinishedOutput]:
        """The answers, in order. Raises RuntimeError for one that fails."""
        names = []
        for tokens, task in work:
            self._asked += 1
            names.append(str(self._asked))
            self._engine.submit(Request(names[-1], Service.PREDICTION, token_ids(tokens), task, time.monotonic()))
        found: dict[str, FinishedOutput] = {}
        while len(found) < len(names):
            for output in self._engine.step():
                if isinstance(output, FailedOutput):
                    raise RuntimeError(f"a prompt to be explained failed: {output.message}")
                if isinstance(output, FinishedOutput):
                    found[output.request_id] = output
        return [found[name] for name in names]


@dataclass(frozen=True)
class Measured:
    """Who is asked, and how scores are made."""

    asker: Asker
    randomised: Asker  # the same model with its weights shuffled
    builder: PromptBuilder
    shop: ServedShop

    def other(self, history: History, rows: Sequence[int]) -> Floats:
        """What a score has beside the model's term that depends on the history."""
        return self.shop.habits.beside(self.shop.own_items(history), rows).astype(np.float64)

    def features(self, history: History) -> tuple[float, ...]:
        return tuple(dense_features(history, self.shop.catalog.prices).tolist())

    def again(self, history: History, prefix: Prefix, gone: Sequence[NDArray[np.bool_]], rows: Sequence[int]) -> Floats:
        """The model's terms without these events, everything computed again: [cases, items]."""
        work: list[tuple[tuple[int, ...], Task]] = []
        for each in gone:
            left = prefix_without(self.builder, history, prefix, each)
            prompt = self.builder.recommend(left, leave_out(history, each))
            work.append((prompt, Explain(len(prompt) - len(left.tokens), ((),), ItemScores(tuple(rows)))))
        return np.array([answer.values for answer in self.asker.ask(work)])

    def predicted_again(
        self, history: History, prefix: Prefix, gone: Sequence[NDArray[np.bool_]], specs: Sequence[HeadSpec]
    ) -> Floats:
        """The predictions without these events, on the scale of effects: [cases, targets]."""
        work: list[tuple[tuple[int, ...], Task]] = []
        for each in gone:
            left, known_then = prefix_without(self.builder, history, prefix, each), leave_out(history, each)
            prompt = self.builder.predict(left, known_then)
            reads = HeadValues((self.features(known_then),))
            work.append((prompt, Explain(len(prompt) - len(left.tokens), ((),), reads)))
        return np.array([[score_of(spec, answer.values) for spec in specs] for answer in self.asker.ask(work)])


@dataclass
class _Found:
    """What was measured of each answer."""

    score: list[float] = field(default_factory=list)
    model: list[float] = field(default_factory=list)
    randomised: list[float] = field(default_factory=list)
    predictions: dict[str, list[float]] = field(default_factory=dict)
    cited: list[float] = field(default_factory=list)
    matched: list[float] = field(default_factory=list)
    model_cited: list[float] = field(default_factory=list)
    model_matched: list[float] = field(default_factory=list)
    in_history: list[bool] = field(default_factory=list)


def measure_explanations(
    shop: Shop,
    served: ServedShop,
    builder: PromptBuilder,
    backend: Backend,
    randomised: Backend,
    *,
    customers: int,
    seed: int,
    advance: Advance,
) -> ExplanationResult:
    """Measure explanations for random customers, seen from the moment when the test begins. `backend` serves the
    bundle, and `randomised` the same with weights that `shuffled` gave it."""
    measured = Measured(Asker(backend), Asker(randomised), builder, served)
    generator = np.random.default_rng(seed)
    found, done = _Found(predictions={spec.label: [] for spec in _targets(served)}), 0
    for history in _histories(shop, generator):
        if done == customers:
            break
        done += _measure(measured, history, generator, found)
        advance(done, customers)
    return ExplanationResult(
        customers=done,
        parts=ITEM_PARTS + VISIT_PARTS,
        score=_mean(found.score),
        model=_mean(found.model),
        predictions={label: _mean(values) for label, values in found.predictions.items()},
        randomised=_mean(found.randomised),
        deletion=_deletion(found.cited, found.matched),
        model_deletion=_deletion(found.model_cited, found.model_matched),
        cited_in_history=float(np.mean(found.in_history)) if found.in_history else 1.0,
    )


def _histories(shop: Shop, generator: np.random.Generator) -> Iterator[History]:
    for customer in generator.permutation(len(shop.histories)).tolist():
        history = shop.histories[customer].before(shop.timeline.test_at)
        if len(np.unique(history.basket)) >= LEAST_VISITS:
            yield history


def _targets(shop: ServedShop) -> tuple[HeadSpec, ...]:
    """Chances and numbers of purchases at the longest horizon: shorter ones are read from the same values."""
    longest = max((spec.horizon_days for spec in shop.targets), default=0)
    return tuple(spec for spec in shop.targets if spec.horizon_days == longest)


def _measure(measured: Measured, history: History, generator: np.random.Generator, found: _Found) -> bool:
    """One customer; False where no part of the history can be told apart."""
    prefix = measured.builder.prefix(history)
    own = measured.shop.own_items(history)
    select = Select(ITEMS, ITEMS, own_items=own.items, own_counts=own.counts, own_terms=own.terms)
    selected = measured.asker.ask([(measured.builder.recommend(prefix, history), select)])[0].selected
    assert selected is not None
    rows = selected.items
    visits = measured.builder.visits(history, prefix)
    parts = parts_for(rows, history, visits, measured.shop.catalog.categories, items=ITEM_PARTS, lately=VISIT_PARTS)
    forks = Forks.of(history, prefix, parts, measured.builder.recommend_suffix)
    if len(forks.parts) < LEAST_VISITS:
        return False
    task = forks.task(ItemScores(rows))
    read, by_chance = (
        forks.values(asker.ask([(forks.tokens, task)])[0].values) for asker in (measured.asker, measured.randomised)
    )
    fast, random = read[0] - read[1:], by_chance[0] - by_chance[1:]
    exact = np.array([measured.other(each, rows) for each in forks.histories])
    gone = [gone_with(history, (part,)) for part in forks.parts]
    base = read[0]
    true = base - measured.again(history, prefix, gone, rows)
    change = exact[0] - exact[1:]
    for at in range(len(rows)):
        found.score.append(_spearman(fast[:, at] + change[:, at], true[:, at] + change[:, at]))
        found.model.append(_spearman(fast[:, at], true[:, at]))
        found.randomised.append(_spearman(random[:, at], true[:, at]))
    _measure_predictions(measured, history, prefix, forks.parts, gone, found)
    for whole, score, effects, cited, matched in (
        (True, base[0] + exact[0, 0], fast[:, 0] + change[:, 0], found.cited, found.matched),
        (False, base[0], fast[:, 0], found.model_cited, found.model_matched),
    ):
        chosen = _strongest(forks.parts, effects)
        found.in_history += [bool(gone_with(history, (part,)).any()) for part in chosen]
        cases = [gone_with(history, chosen), _matches(history, chosen, generator)]
        left = measured.again(history, prefix, cases, rows[:1])[:, 0]
        if whole:
            left += [measured.other(leave_out(history, case), rows[:1])[0] for case in cases]
        cited.append(float(abs(score - left[0])))
        matched.append(float(abs(score - left[1])))
    return True


def _strongest(parts: Sequence[Part], effects: Floats) -> list[Part]:
    """The items of the largest effects."""
    items = [at for at, part in enumerate(parts) if not part.is_visit]
    return [parts[at] for at in sorted(items, key=lambda at: -abs(effects[at]))[:DELETED]]


def _measure_predictions(
    measured: Measured,
    history: History,
    prefix: Prefix,
    parts: Sequence[Part],
    gone: Sequence[NDArray[np.bool_]],
    found: _Found,
) -> None:
    specs = _targets(measured.shop)
    if not specs:
        return
    forks = Forks.of(history, prefix, parts, measured.builder.predict_suffix)
    reads = HeadValues(tuple(map(measured.features, forks.histories)))
    read = forks.values(measured.asker.ask([(forks.tokens, forks.task(reads))])[0].values)
    fast = np.array([[score_of(spec, row) for spec in specs] for row in read.tolist()])
    true = fast[0] - measured.predicted_again(history, prefix, gone, specs)
    for at, spec in enumerate(specs):
        found.predictions[spec.label].append(_spearman(fast[0, at] - fast[1:, at], true[:, at]))


def _matches(history: History, cited: Sequence[Part], generator: np.random.Generator) -> NDArray[np.bool_]:
    """[E]: the events of as many other items, each drawn among those most like a cited one in count and recency."""
    names, inverse = np.unique(history.item_keys, return_inverse=True)
    last = np.zeros(len(names))
    np.maximum.at(last, inverse, history.time)
    age = np.log1p((history.as_of - last) / SECONDS_PER_DAY)
    count = np.log1p(np.bincount(inverse))
    taken = {int(inverse[part.events[0]]) for part in cited}
    gone = np.zeros(len(history), np.bool_)
    for part in cited:
        at = int(inverse[part.events[0]])
        distance = np.abs(age - age[at]) + np.abs(count - count[at])
        nearest = [index for index in np.argsort(distance, kind="stable").tolist() if index not in taken][:_NEAREST]
        if nearest:
            chosen = int(generator.choice(nearest))
            taken.add(chosen)
            gone |= inverse == chosen
    return gone


def _spearman(one: Floats, other: Floats) -> float:
    """NaN where all effects on one side are the same."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(spearmanr(one, other).statistic)


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return known(float(np.mean(finite))) if finite else None


def _deletion(cited: Sequence[float], matched: Sequence[float]) -> Deletion:
    return Deletion(float(np.mean(cited)) if cited else 0.0, float(np.mean(matched)) if matched else 0.0)
