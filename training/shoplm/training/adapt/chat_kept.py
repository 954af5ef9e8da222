"""What an adapter did to ordinary talk: perplexity of the base's own answers to prompts that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from shoplm.bundle import PromptSchema
from shoplm.catalog.items import Catalog
from shoplm.engine.shop_texts import token_texts
from shoplm.model.base import Base
from shoplm.model.chat_template import ChatTemplate
from shoplm.model.tokenizer import Tokenizer
from shoplm.prompt import PromptBuilder
from shoplm.training.adapt.conversations import talk_prompts
from shoplm.training.adapt.model import AdaptedModel, TalkingModel
from shoplm.training.adapt.replay import Replay, replays_of
from shoplm.training.ranker import OutputRows
from shoplm.training.report import ChatKept
from shoplm.training.shop import Shop
from shoplm.training.watch import Watch
from torch.nn import functional

TALK_PROMPTS = 480  # that an adapter is trained on
HELD_OUT_PROMPTS = 40
MOST_INCREASE = 0.05  # of the perplexity of ordinary talk
STRENGTHS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
_CUSTOMERS = 16
_STAGE = "chat kept"


def measure_adapter(
    shop: Shop, catalog: Catalog, base: Base, schema: PromptSchema, adapter: Path, work: Path, seed: int, watch: Watch
) -> ChatKept:
    """What the adapter in a folder, trained with `seed`, left of ordinary talk. The base's answers are kept in
    `work`."""
    tokenizer = Tokenizer.from_folder(base.folder)
    vocabulary = shop.items.vocabulary(base.config.vocab_size)
    builder = PromptBuilder(tokenizer, ChatTemplate.from_folder(base.folder), schema, vocabulary)
    replays = held_out(work / "held-out.json", catalog, base, builder, tokenizer, seed, watch)
    none = OutputRows(torch.zeros(0, base.config.hidden_size), torch.zeros(0))
    texts = [tokenizer.encode(text) for text in token_texts(catalog)]
    model = AdaptedModel(base.folder, texts, none, 0.0, 0, rank=1, adapter=adapter)
    return measure_kept(model, builder, replays, some_prefixes(shop, builder, seed), watch)


def held_out(
    path: Path,
    catalog: Catalog,
    base: Base,
    builder: PromptBuilder,
    tokenizer: Tokenizer,
    seed: int,
    watch: Watch,
    *,
    part: int = 0,
) -> list[Replay]:
    """The base's answers to prompts that training with `seed` does not draw; no two parts share a prompt."""
    trained = set(talk_prompts(catalog, TALK_PROMPTS, np.random.default_rng(seed)))
    drawn = talk_prompts(catalog, 10 * HELD_OUT_PROMPTS, np.random.default_rng(seed + 1))
    prompts = [prompt for prompt in dict.fromkeys(drawn) if prompt not in trained]
    return replays_of(
        path,
        base.folder,
        builder,
        prompts[part * HELD_OUT_PROMPTS :][:HELD_OUT_PROMPTS],
        tokenizer.end_token_ids,
        seed=seed + 1,
        progress=lambda done, total: watch.advance("the base's held-out answers", done, total),
    )


def some_prefixes(shop: Shop, builder: PromptBuilder, seed: int) -> list[tuple[int, ...]]:
    """Prefixes of a few customers, as they were when the test began."""
    histories, until = shop.histories, shop.timeline.test_at
    chosen = np.random.default_rng(seed + 1).choice(len(histories), min(_CUSTOMERS, len(histories)), replace=False)
    return [builder.prefix(histories[customer].before(until)).tokens for customer in chosen.tolist()]


@torch.inference_mode()
def strength_that_keeps_chat(
    model: AdaptedModel, builder: PromptBuilder, replays: Sequence[Replay], watch: Watch
) -> float:
    """The largest of STRENGTHS at which the perplexity of `replays` rises by at most MOST_INCREASE; the smallest where
    none does. They must be others than those that the result is measured on."""
    model.train(False)
    bare = builder.prefix(None).tokens

    def total(*, adapted: bool) -> float:
        return sum(_loss(model, bare, replay, adapted=adapted) for replay in replays)

    most = total(adapted=False) + math.log1p(MOST_INCREASE) * sum(len(replay.answer) for replay in replays)
    for index, strength in enumerate(STRENGTHS):
        watch.advance("strength of the adapter", index, len(STRENGTHS))
        with model.at_strength(strength):
            if total(adapted=True) <= most:
                return strength
    return STRENGTHS[-1]


@torch.inference_mode()
def measure_kept(
    model: TalkingModel,
    builder: PromptBuilder,
    replays: Sequence[Replay],
    histories: Sequence[tuple[int, ...]],
    watch: Watch,
) -> ChatKept:
    """`histories` are customers' prefixes, used in turn."""
    model.train(False)
    bare = builder.prefix(None).tokens
    sums = {"base": 0.0, "adapted": 0.0, "adapted_behind_history": 0.0, "base_behind_history": 0.0}
    tokens = 0
    for index, replay in enumerate(replays):
        history = histories[index % len(histories)]
        tokens += len(replay.answer)
        for name in sums:
            prefix = history if name.endswith("history") else bare
            sums[name] += _loss(model, prefix, replay, adapted=name.startswith("adapted"))
        watch.advance(_STAGE, index + 1, len(replays))
    means = {name: math.exp(total / max(tokens, 1)) for name, total in sums.items()}
    return ChatKept(len(replays), tokens, **means)


def _loss(model: TalkingModel, prefix: Sequence[int], replay: Replay, *, adapted: bool) -> float:
    """Nats of the whole answer."""
    logits = model.answer_logits(prefix, replay, adapted=adapted)
    return float(functional.cross_entropy(logits, torch.tensor(replay.answer, device=logits.device), reduction="sum"))
