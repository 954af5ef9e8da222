"""The gate of formats of fewer bits: what they may cost a bundle, beside the same bundle without rounding.

Rankings, probabilities and talk, all measured on a CPU: with the rounding that the GPU's kernels do, or with the C++
decoder's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from shoplm.bundle import read_manifest
from shoplm.catalog.items import read_catalog
from shoplm.engine.cpu import FORMATS
from shoplm.model.base import Base, bundle_base
from shoplm.model.chat_template import ChatTemplate
from shoplm.model.decoder import Decoder
from shoplm.model.tokenizer import Tokenizer
from shoplm.model.weights import DecoderWeights
from shoplm.model.whole_prompt import whole_prompt
from shoplm.prompt import PromptBuilder
from shoplm.training.adapt.chat_kept import held_out
from shoplm.training.formats import Formats
from shoplm.training.log import ShopLog
from shoplm.training.native_scorer import NativeScorer
from shoplm.training.reader import base_weights
from shoplm.training.report import OURS, RankingResult, Report, Sample
from shoplm.training.run import evaluate_bundle
from shoplm.training.watch import Watch
from shoplm.vocabulary import ShopVocabulary
from torch.nn import functional

NDCG_SHARE = 0.01  # of NDCG@10 that a format may lose
BRIER_RISE = 0.002  # by which a probability's Brier score may grow


@dataclass(frozen=True)
class Loss:
    """One metric with and without the format."""

    metric: str
    reference: float
    found: float
    loss: float  # below 0: the format happens to be better
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the loss is within its limit."""
        return self.loss <= self.limit


def losses(reference: Report, found: Report) -> list[Loss]:
    """Relative loss of NDCG@10 by split, and rise of the Brier score by target, of two reports on the same customers.

    Raises ValueError where they are not.
    """
    if (reference.seed, reference.customers) != (found.seed, found.customers):
        raise ValueError(f"the reports are of {reference.customers} and {found.customers} customers: not comparable")
    result = []
    for before, after in zip(reference.rankings, found.rankings, strict=True):
        best, now = _ndcg(before), _ndcg(after)
        share = (best - now) / best if best > 0 else 0.0
        result.append(Loss(f"NDCG@10, {before.split}", best, now, share, NDCG_SHARE))
    for row, other in zip(reference.probabilities, found.probabilities, strict=True):
        result.append(Loss(f"Brier, {row.target}", row.brier, other.brier, other.brier - row.brier, BRIER_RISE))
    return result


def weigh(
    folder: Path,
    log: ShopLog,
    formats: Formats,
    *,
    base: str | None,
    work: Path,
    max_customers: int | None,
    watch: Watch,
) -> tuple[Report, list[Loss]]:
    """The bundle's report in these formats, and what they cost. Raises as `evaluate_bundle`, and ConfigurationError for
    an unknown format or one that does not suit the base."""

    def measured(formats: Formats) -> Report:
        return evaluate_bundle(
            folder, log, base=base, work=work, max_customers=max_customers, explained=0, watch=watch, formats=formats
        )

    report = measured(formats)
    costs = losses(measured(formats.reference), report)
    resolved = bundle_base(folder, base)
    talk = _talk(folder, resolved, work, watch)
    adapter = folder if read_manifest(folder).has_adapter else None
    before, after = (perplexity(resolved, adapter, talk, each, watch) for each in (formats.reference, formats))
    costs.append(Loss("perplexity of talk", before, after, after / before - 1.0, formats.perplexity_rise))
    return report, costs


Talk = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]  # prompts and answers, as tokens
Nats = Callable[[Sequence[int], int], float]  # of a text's tokens from the n-th on, each behind those before it


def _talk(folder: Path, base: Base, work: Path, watch: Watch) -> Talk:
    """The base's own answers to ordinary prompts, those that a bundle's adapter is judged by too."""
    manifest, catalog = read_manifest(folder), read_catalog(folder)
    tokenizer = Tokenizer.from_folder(base.folder)
    vocabulary = ShopVocabulary(manifest.base.vocab_size, manifest.level_sizes, manifest.type_count)
    builder = PromptBuilder(tokenizer, ChatTemplate.from_folder(base.folder), manifest.prompt, vocabulary)
    seed = msgspec.json.decode((folder / "metrics.json").read_bytes(), type=Sample).seed
    replays = held_out(work / "held-out.json", catalog, base, builder, tokenizer, seed, watch)
    bare = builder.prefix(None).tokens
    return [((*bare, *replay.suffix), replay.answer) for replay in replays]


@torch.inference_mode()
def perplexity(base: Base, adapter: Path | None, talk: Talk, formats: Formats, watch: Watch) -> float:
    """Per token of the answers, of the base with the adapter in that folder; a GPU's formats by products in fp32 of the
    rounded base."""
    weights = base_weights(base, torch.bfloat16, adapter, formats)
    longest = max(len(prompt) + len(answer) for prompt, answer in talk)
    nats_of: Nats
    if formats.of_cpu:
        scorer = NativeScorer(base.config, weights, FORMATS[formats.weights], longest, formats.kv or "model")
        nats_of = scorer.nats
    else:
        nats_of = _nats_of_rounded(base, weights, formats, longest)
    nats, count = 0.0, 0
    for done, (prompt, answer) in enumerate(talk):
        nats += nats_of((*prompt, *answer), len(prompt))
        count += len(answer)
        watch.advance("perplexity", done + 1, len(talk))
    return math.exp(nats / count)


def _nats_of_rounded(base: Base, weights: DecoderWeights, formats: Formats, longest: int) -> Nats:
    weights = weights.float()
    decoder = Decoder(base.config, weights, None, longest)

    def nats(tokens: Sequence[int], first: int) -> float:
        places = range(first - 1, len(tokens) - 1)  # each predicts the token behind it
        step = whole_prompt(base.config, tokens, places, torch.float32, formats.kv or "model")
        logits = functional.linear(decoder.forward(*step), weights.lm_head)
        return float(functional.cross_entropy(logits, torch.tensor(tokens[first:]), reduction="sum"))

    return nats


def _ndcg(result: RankingResult) -> float:
    return next(row.ndcg for row in result.rows if row.name == OURS)
